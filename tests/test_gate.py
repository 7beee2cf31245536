"""The gate against made-up models: harm is refused, help and rounding are let through, noise does not decide."""

import numpy as np
import pytest
import torch

from onnx_optshift.decide import decision
from onnx_optshift.decide.decision import Grounds, Way, decided
from onnx_optshift.decide.gate import FEW_SAMPLES, UNLABELLED_DISTANCE, Gate, paired
from onnx_optshift.prove.floor import Promise
from onnx_optshift.run.candidate import Candidate, Solved
from onnx_optshift.run.world import ALONE
from onnx_optshift.solve.shift import Outcome, Shift


class Batch:
    def __init__(self, labels, indices):
        self.labels, self.indices = labels, indices


class Held:
    def __init__(self, labels):
        self.labels, self.source = labels, "heldout.npz"


class Outputs:
    """Stands in for a model's runs: outputs are the original logits plus whatever the trial arrays add to them."""

    world = ALONE

    def __init__(self, logits, labels):
        self.logits = logits
        self.batch = Batch(labels, np.arange(len(logits)))
        self.runs = 0

    def share(self, samples):
        return samples

    def reference(self, samples):
        yield self.batch, {"y": self.logits}

    def trial(self, samples, arrays):
        self.runs += 1
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
    return Gate(Outputs(logits, labels), Held(labels), tolerance), logits, labelled(n, seed)[1]


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


def test_the_same_weights_are_not_judged_twice():
    logits, labels = labelled(50)
    outputs = Outputs(logits, labels)
    judge = Gate(outputs, Held(labels), 0.0)
    before = outputs.runs
    first = judge.judge({"w": 0.1 * logits}, "first", 0.1)
    assert judge.judge({"w": (0.1 * logits).copy()}, "again", 0.1) == first
    assert (outputs.runs, len(judge.tried)) == (before + 1, 1)
    # Negative controls: other content, another name.
    judge.judge({"w": 0.2 * logits}, "other content", 0.1)
    judge.judge({"v": 0.1 * logits}, "other name", 0.1)
    assert (outputs.runs, len(judge.tried)) == (before + 3, 3)


def candidate(arrays, residual=0.0):
    shift = Shift.unchanged(torch.zeros(1, 1, 1), Outcome.SHIFTED)
    return Candidate({name: Solved(shift, array, residual) for name, array in arrays.items()}, residual)


def decide(judge, arrays, **options):
    """A decision among made-up layers, solved alike for what fits and for what is written."""
    way = Way("made up", lambda residual: candidate(arrays, residual), lambda residual: candidate(arrays, residual))
    grounds = Grounds(None, None, None, judge, None, None, 0)
    return decided(grounds, way, 0.0, Promise(0.0, "noise", None), "exact", **options)


def harmful(logits, labels, count=8, bad=(2, 5)):
    harm = np.zeros_like(logits)
    harm[np.arange(len(labels)), labels] = -0.5
    return {f"layer{i}": harm if i in bad else (1 + i) * 1e-4 * logits for i in range(count)}


def test_a_group_search_finds_the_harmful_layers_and_keeps_the_rest():
    judge, logits, labels = gate()
    layers = harmful(logits, labels)
    found = decide(judge, layers)
    assert sorted(found.rejected) == ["layer2", "layer5"]
    assert sorted(found.candidate.arrays) == sorted(set(layers) - set(found.rejected))
    # The verdict is that of exactly these layers together.
    assert found.verdict.accepted
    kept = {name: layers[name] for name in found.candidate.arrays}
    again, _ = gate()[0].judge(kept, "again", 0.0)
    assert (found.verdict.loss, found.verdict.mean_difference) == (again.loss, again.mean_difference)


def test_where_every_layer_does_harm_none_is_taken():
    judge, logits, labels = gate()
    found = decide(judge, harmful(logits, labels, bad=range(8)))
    assert found.candidate.arrays == {}
    assert found.verdict is None
    assert len(found.rejected) == 8


def test_a_search_that_is_cut_short_keeps_the_bytes_of_what_it_did_not_reach(monkeypatch):
    monkeypatch.setattr(decision, "MOST_GROUP_TRIALS", 3)
    judge, logits, labels = gate()
    layers = harmful(logits, labels)
    found = decide(judge, layers)
    assert set(found.rejected) | set(found.candidate.arrays) == set(layers)
    assert not set(found.rejected) & set(found.candidate.arrays)
    assert any("ended after 3 trials" in reason for reason in found.rejected.values())


def test_layers_that_may_no_longer_be_taken_are_not():
    judge, logits, labels = gate()
    layers = harmful(logits, labels, bad=())
    found = decide(judge, layers, names=["layer1", "layer3"])
    assert sorted(found.candidate.arrays) == ["layer1", "layer3"]
    assert found.verdict.loss == gate()[0].judge({n: layers[n] for n in ("layer1", "layer3")}, "", 0.0)[0].loss


def test_an_infinite_loss_has_no_error_and_no_warning():
    """As of the distance to an output that is all zeros."""
    mean, error = paired(np.array([np.inf, 1.0, 2.0]), np.zeros(3))
    assert mean == np.inf
    assert np.isnan(error)
