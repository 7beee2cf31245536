"""Sharing a tolerance out: used, never exceeded, whatever the outputs do with the layers' residuals."""

import numpy as np
import pytest

from onnx_optshift.decide.share import AIM_HIGH, AIM_LOW, PART, share_out


class Candidate:
    def __init__(self, tolerance):
        self.tolerance = tolerance
        self.arrays = {"w": tolerance}


class Outputs:
    """Outputs deviate as a given function of the layers' residual."""

    def __init__(self, response):
        self.response = response
        self.calls = 0

    def deviation(self, samples, arrays):
        self.calls += 1
        value = self.response(arrays["w"])

        class Found:
            @staticmethod
            def largest_rel():
                return value

        return Found


RESPONSES = {
    "proportional": lambda r: 1.7 * r,
    "damped": lambda r: 0.02 * r,
    "amplified": lambda r: 90 * r,
    "saturating": lambda r: 0.5 * r / (0.01 + r),
    "explosive": lambda r: np.expm1(40 * r) / 10,
    "square root": lambda r: 0.3 * np.sqrt(r),
}


@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("name", RESPONSES)
def test_the_tolerance_is_used_and_kept(name, tolerance):
    response = RESPONSES[name]
    outputs = Outputs(response)
    shared = share_out(outputs, [None] * 5, Candidate, tolerance, seed=0)
    assert shared.deviation == response(shared.candidate.tolerance)
    assert shared.deviation <= AIM_HIGH * tolerance
    if response(0.9) > tolerance:  # else even the largest residual does not use it up
        assert shared.deviation >= AIM_LOW * tolerance
    assert outputs.calls <= 12


def test_where_nothing_fits_the_exact_shift_remains():
    shared = share_out(Outputs(lambda r: 0.5), [None] * 5, Candidate, 0.01, seed=0)
    assert shared.candidate.tolerance == 0.0
    assert shared.deviation == 0.0


def test_the_part_follows_the_seed():
    class Samples(list):
        def select(self, indices):
            drawn.append(indices.tolist())
            return self

    drawn = []
    for seed in (0, 0, 1):
        share_out(Outputs(lambda r: r), Samples(range(3 * PART)), Candidate, 0.01, seed)
    assert drawn[0] == drawn[1] != drawn[2]


def test_many_samples_are_searched_in_part_and_finished_in_whole():
    class Samples(list):
        def select(self, indices):
            assert len(set(indices.tolist())) == PART
            return "part"

    class Twofold(Outputs):
        def deviation(self, samples, arrays):
            seen.append(samples if isinstance(samples, str) else "whole")
            # The part deviates less than the whole: what fits it must still be brought down.
            self.response = (lambda r: r) if samples == "part" else (lambda r: 1.5 * r)
            return super().deviation(samples, arrays)

    seen = []
    shared = share_out(Twofold(None), Samples(range(3 * PART)), Candidate, 0.01, seed=0)
    assert AIM_LOW * 0.01 <= shared.deviation <= AIM_HIGH * 0.01
    assert shared.deviation == 1.5 * shared.candidate.tolerance
    assert seen.count("whole") <= 3
    assert "part" in seen
