"""The gate against made-up models: harm is refused, help and rounding are let through, noise does not decide."""

import numpy as np
import pytest

from onnx_optshift.decide.choose import _groups
from onnx_optshift.decide.gate import FEW_SAMPLES, UNLABELLED_DISTANCE, Gate, paired


class Batch:
    def __init__(self, labels, indices):
        self.labels, self.indices = labels, indices


class Held:
    def __init__(self, labels):
        self.labels = labels


class Bench:
    """Stands in for a workbench: outputs are the original logits plus whatever the trial arrays add to them."""

    def __init__(self, logits, labels):
        self.logits = logits
        self.batch = Batch(labels, np.arange(len(logits)))

    def reference(self, samples):
        yield self.batch, {"y": self.logits}

    def trial_outputs(self, samples, arrays):
        yield self.batch, {"y": self.logits + sum(arrays.values(), 0.0)}, {"y": self.logits}


def labelled(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, size=n)
    logits = rng.normal(size=(n, 5))
    logits[np.arange(n), labels] += 1.5
    return logits, labels


def gate(n=200, tolerance=0.0, seed=0, with_labels=True):
    logits, labels = labelled(n, seed)
    labels = labels if with_labels else None
    return Gate(Bench(logits, labels), Held(labels), tolerance), logits, labelled(n, seed)[1]


def test_harm_is_refused_and_help_is_accepted():
    judge, logits, labels = gate()
    towards = np.zeros_like(logits)
    towards[np.arange(len(labels)), labels] = 0.5
    assert judge.judge({"w": towards}, "help", 0.1)[0].accepted
    refused, _ = judge.judge({"w": -towards}, "harm", 0.1)
    assert not refused.accepted
    assert "loss rises" in refused.reason
    assert [trial.what for trial in judge.tried] == ["help", "harm"]


@pytest.mark.parametrize("n", [FEW_SAMPLES - 10, 200])
def test_rounding_is_no_harm(n):
    judge, logits, _ = gate(n)
    assert judge.judge({"w": 1e-7 * np.ones_like(logits) * logits}, "rounding", 0.0)[0].accepted


def test_few_samples_get_no_benefit_of_the_doubt():
    # The same mild, uneven harm: within one standard error, which only many samples make believable.
    def verdict(n):
        judge, logits, labels = gate(n)
        mixed = np.zeros_like(logits)
        mixed[np.arange(n), labels] = np.where(np.arange(n) % 2, 0.2, -0.2) - 0.002
        return judge.judge({"w": mixed}, "mixed", 0.0)[0]

    few, many = verdict(FEW_SAMPLES - 2), verdict(400)
    assert few.mean_difference > 0 < many.mean_difference
    assert many.mean_difference < many.standard_error
    assert many.accepted
    assert not few.accepted


def test_without_labels_the_distance_is_bounded():
    judge, logits, _ = gate(with_labels=False)
    assert judge.judge({"w": 0.9 * UNLABELLED_DISTANCE * logits}, "near", 0.0)[0].accepted
    refused, _ = judge.judge({"w": 1.1 * UNLABELLED_DISTANCE * logits}, "far", 0.0)
    assert not refused.accepted
    assert "held-out outputs move" in refused.reason
    wide, _, _ = gate(with_labels=False, tolerance=0.1)
    assert wide.judge({"w": 0.19 * logits}, "within twice the tolerance", 0.1)[0].accepted


def test_paired_differences_by_hand():
    mean, error = paired(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert mean == pytest.approx(4 / 3)
    assert error == pytest.approx(np.std([0, 1, 3], ddof=1) / np.sqrt(3))
    assert paired(np.ones(1), np.zeros(1)) == (1.0, np.inf)


def test_a_group_search_finds_the_harmful_layers_and_keeps_the_rest():
    judge, logits, labels = gate()
    harm = np.zeros_like(logits)
    harm[np.arange(len(labels)), labels] = -0.5
    layers = {f"layer{i}": harm if i in (2, 5) else 1e-3 * logits for i in range(8)}
    accepted, rejected = _groups(judge, list(layers), lambda names: {n: layers[n] for n in names}, 0.0, "exact")
    assert sorted(rejected) == ["layer2", "layer5"]
    assert sorted(accepted) == sorted(set(layers) - set(rejected))
