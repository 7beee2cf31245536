import numpy as np
import pytest
from calibration_cases import INPUTS, X, arrays, feeds

from onnx_optshift.calibration.inputs import InputSpec, describe, fixed_batch, why_feeds
from onnx_optshift.calibration.load import load
from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.errors import InputError

F32 = np.dtype(np.float32)


def joined(samples, size, name="x"):
    """All batches without their padding, one after the other."""
    batches = list(samples.batches(size))
    return np.concatenate([batch.feeds[name][: len(batch.indices)] for batch in batches])


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_batches_of_any_size_give_the_samples_in_order(size):
    data = arrays(labels=True)
    samples = load([data], INPUTS)
    batches = list(samples.batches(size))
    assert [len(batch.indices) for batch in batches] == [min(size, 6 - start) for start in range(0, 6, size)]
    np.testing.assert_array_equal(joined(samples, size), data["x"])
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), np.arange(6))
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), data["labels"])
    assert all(batch.padding == 0 for batch in batches)


def test_batches_can_be_iterated_again_and_run_across_chained_sources():
    data = arrays()
    samples = load([{k: v[:4] for k, v in data.items()}, {k: v[4:] for k, v in data.items()}], INPUTS)
    first = [batch.feeds["x"].copy() for batch in samples.batches(3)]
    assert [len(array) for array in first] == [3, 3]  # the second batch takes one row of the first source
    np.testing.assert_array_equal(np.concatenate(first), joined(samples, 3))
    np.testing.assert_array_equal(np.concatenate(first), data["x"])


def test_batch_size_must_be_positive():
    with pytest.raises(InputError, match="at least 1, found 0"):
        next(load([arrays()], INPUTS).batches(0))


def test_fixed_batch_dimension_is_filled_with_the_last_sample():
    spec = InputSpec("x", F32, (4, 3))
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    samples = load([{"x": x, "labels": np.arange(6)}], [spec])
    full, last = samples.batches(64)
    assert (full.padding, last.padding) == (0, 2)
    assert (full.rows, full.size, last.rows, last.size) == (4, 4, 2, 4)
    assert full.feeds["x"].shape == last.feeds["x"].shape == (4, 3)
    np.testing.assert_array_equal(last.feeds["x"], x[[4, 5, 5, 5]])
    np.testing.assert_array_equal(last.indices, [4, 5])
    np.testing.assert_array_equal(last.labels, [4, 5])  # padding has none
    np.testing.assert_array_equal(samples.select([0]).batches(1).__next__().feeds["x"], x[[0, 0, 0, 0]])


def test_free_batch_dimension_is_never_padded():
    (batch,) = load([{"x": np.ones((3, 3), np.float32)}], [X]).batches(4)
    assert (len(batch.feeds["x"]), batch.padding) == (3, 0)


def test_select_is_a_view_in_the_order_given():
    data = arrays(labels=True)
    view = load([data], INPUTS).select([5, 1, 1, 2])
    np.testing.assert_array_equal(joined(view, 3), data["x"][[5, 1, 1, 2]])
    np.testing.assert_array_equal(view.labels, data["labels"][[5, 1, 1, 2]])
    np.testing.assert_array_equal(next(view.batches(9)).indices, np.arange(4))
    np.testing.assert_array_equal(joined(view.select([3, 0]), 1), data["x"][[2, 5]])
    for wrong in ([6], [-1]):
        with pytest.raises(IndexError):
            load([data], INPUTS).select(wrong)
    assert not list(view.select([]).batches(2))


def test_consecutive_rows_are_not_copied():
    data = arrays()
    batch = next(load([data], INPUTS).batches(4))
    assert np.shares_memory(batch.feeds["x"], data["x"])
    batch = next(load([data], INPUTS).select([0, 2]).batches(4))
    assert not np.shares_memory(batch.feeds["x"], data["x"])


def ragged():
    return [{"x": np.full((n, 3), n, np.float32), "ids": np.full((n, 5 - n), n)} for n in (1, 4, 2)]


def test_ragged_feeds_stay_whole_and_count_as_one_sample_each():
    samples = load([ragged()], INPUTS)
    assert len(samples) == 3
    batches = list(samples.batches(64))
    assert [batch.feeds["ids"].shape for batch in batches] == [(1, 4), (4, 1), (2, 3)]
    assert [batch.indices.tolist() for batch in batches] == [[0], [1], [2]]
    assert all(batch.rows == batch.size == 1 for batch in batches)
    assert [b.feeds["x"][0, 0] for b in samples.select([2, 0]).batches(1)] == [2, 1]


def test_stacked_files_of_different_shapes_do_not_share_a_batch():
    def part(count, width):
        return {"x": np.zeros((count, 3), np.float32), "ids": np.zeros((count, width), np.int64)}

    samples = load([part(2, 5), part(3, 5), part(2, 4)], INPUTS)
    assert [batch.feeds["ids"].shape for batch in samples.batches(4)] == [(4, 5), (1, 5), (2, 4)]


def test_feeds_and_stacked_arrays_may_be_chained():
    data = arrays()
    samples = load([data, ragged(), data], INPUTS)
    assert len(samples) == 15
    sizes = [len(batch.feeds["x"]) for batch in samples.batches(4)]
    assert sizes == [4, 2, 1, 4, 2, 4, 2]
    view = samples.select([14, 7, 0, 1])
    np.testing.assert_array_equal(next(view.batches(9)).feeds["x"], data["x"][[5]])
    assert [batch.rows for batch in view.batches(9)] == [1, 1, 2]


def test_labels_inside_feeds():
    one = load([feeds(arrays(labels=True))], INPUTS)
    np.testing.assert_array_equal(one.labels, np.arange(6) % 3)
    assert one.classes == 3
    rows = load([[feed | {"labels": np.arange(len(feed["x"]))} for feed in ragged()]], INPUTS)
    assert rows.labels is None  # there is no single label per sample
    assert rows.classes == 4
    assert [batch.labels.tolist() for batch in rows.batches(1)] == [[0], [0, 1, 2, 3], [0, 1]]


def test_targets_and_missing_labels_have_no_classes():
    data = arrays()
    assert load([data], INPUTS).classes is None
    targets = load([data | {"labels": np.ones((6, 2), np.float32)}], INPUTS)
    assert targets.classes is None
    assert targets.labels.shape == (6, 2)
    assert load([arrays(labels=True)], INPUTS).select([0, 3]).classes == 1


def test_sources_must_agree_about_labels():
    with pytest.raises(InputError, match=r"disagree about labels \(int64, none\)"):
        load([arrays(labels=True), arrays()], INPUTS)
    with pytest.raises(InputError, match=r"disagree about labels \(float64, int64\)"):
        load([arrays(labels=True), arrays() | {"labels": np.ones(6)}], INPUTS)


def test_fingerprint_depends_on_content_alone():
    data = arrays(labels=True)
    same = load([data], INPUTS).fingerprint
    assert len(same) == 64
    assert load([dict(reversed(data.items()))], INPUTS).fingerprint == same
    assert load([{k: np.asfortranarray(v) for k, v in data.items()}], INPUTS).fingerprint == same
    assert load([data], INPUTS).select(range(6)).fingerprint == same
    assert load([{k: v.astype(v.dtype.newbyteorder()) for k, v in data.items()}], INPUTS).fingerprint == same


def change(data, name, index, value):
    data[name][index] = value
    return data


@pytest.mark.parametrize(
    "other",
    [
        lambda d: change(d, "x", (5, 2), 1e-30),
        lambda d: change(d, "labels", 0, 2),
        lambda d: {k: v for k, v in d.items() if k != "labels"},
        lambda d: {k: v[::-1] for k, v in d.items()},
        lambda d: {k: v[:5] for k, v in d.items()},
        lambda d: d | {"ids": d["ids"].reshape(6, 2, 1)[:, :, 0].repeat(2, 1)},
    ],
    ids=["value", "label", "no labels", "order", "count", "shape"],
)
def test_fingerprint_sees_every_change(other):
    assert load([arrays(labels=True)], INPUTS).fingerprint != load([other(arrays(labels=True))], INPUTS).fingerprint


def test_fingerprint_tells_apart_a_feed_of_two_rows_from_two_feeds():
    data = {k: v[:2] for k, v in arrays().items()}
    assert load([[data]], INPUTS).fingerprint != load([feeds(data)], INPUTS).fingerprint


def test_distinct_counts_inputs_whatever_their_labels_and_storage():
    data = {"x": np.float32([[1, 1, 1], [2, 2, 2], [1, 1, 1], [-0.0, 0, 0], [0, 0, 0], [1, 1, 1]])}
    specs, labels = [X], {"labels": np.arange(6)}
    for source in (data, data | labels, feeds(data | labels)):
        samples = load([source], specs)
        assert samples.distinct == 4  # -0.0 has other bytes than 0.0
        assert samples.select([0, 2, 5]).distinct == 1
        assert samples.select([0, 0, 1]).distinct == 2
    both = load([data, feeds(data)], specs)
    assert (len(both), both.distinct) == (12, 4)
    assert load([{"x": np.ones((1000, 3), np.float32)}], specs).distinct == 1
    assert load([arrays()], INPUTS).distinct == 6


def test_each_sample_is_digested_once_for_all_views():
    reads = []
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    parts = [Part(3, True, lambda s=s: reads.append(s) or {"x": x[s : s + 3]}) for s in (0, 3)]
    samples = Samples(parts, source="counted")
    assert samples.select([0, 1]).distinct == 2
    assert reads == [0]
    prints = samples.fingerprint, samples.select([5, 1]).fingerprint
    assert reads == [0, 0, 3]  # row 2 was still unread
    assert samples.distinct == 6
    assert len(reads) == 3
    assert prints == (load([{"x": x}], [X]).fingerprint, load([{"x": x[[5, 1]]}], [X]).fingerprint)


def test_text_fingerprint_ignores_the_width_numpy_chose():
    spec = InputSpec("s", np.dtype(object), ("n",))
    prints = {load([{"s": np.array(["a", "bc"], kind)}], [spec]).fingerprint for kind in ("U2", "U9", object)}
    assert len(prints) == 1
    assert load([{"s": np.array(["ab", "c"])}], [spec]).fingerprint not in prints


def test_describe_and_batch_axis():
    specs = [X, InputSpec("s", np.dtype(object), (None, "?")), InputSpec("q", None, None)]
    assert describe(specs) == "x: float32[batch, 3], s: string[?, ?], q: unknown type[any shape]"
    assert fixed_batch([InputSpec("a", F32, (4, 2)), X]) == 4
    assert fixed_batch([InputSpec("a", F32, (4, 2)), InputSpec("b", F32, (5,))]) is None
    assert why_feeds([X, InputSpec("t", F32, ("batch", "batch2"))]) is None
    assert "axis 1 of input 'h'" in why_feeds([X, InputSpec("h", F32, (2, "batch", 4))])
    assert "scalar" in why_feeds([X, InputSpec("rate", F32, ())])
    assert why_feeds([InputSpec("a", F32, ("?", "?"))]) is None  # equal marks for unknown sizes mean nothing
