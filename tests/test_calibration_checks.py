import ml_dtypes
import numpy as np
import pytest
from calibration_cases import IDS, INPUTS, X, arrays, feeds

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.errors import InputError


def spec(dtype, shape=("n",), name="v"):
    return InputSpec(name, np.dtype(dtype), shape)


def loaded(values, dtype):
    """The values as an input of `dtype` would get them, and the notes."""
    samples = load([{"v": values}], [spec(dtype)])
    return next(samples.batches(100)).feeds["v"], samples.notes


EXACT = [
    (np.array([1.5, -2], np.float64), np.float32),
    (np.array([1.5, -2], np.float16), np.float32),
    (np.array([1.5, -2], np.float32), ml_dtypes.bfloat16),
    (np.array([0, 2**31 - 1], np.int64), np.int32),
    (np.array([0, 255], np.int64), np.uint8),
    (np.array([0, 255], np.uint8), np.float32),
    (np.array([-(2**24), 2**24]), np.float32),
    (np.array([0, 256]), ml_dtypes.bfloat16),
    (np.array([True, False]), np.int64),
    (np.array([True, False]), np.float16),
]


@pytest.mark.parametrize(("values", "dtype"), EXACT)
def test_types_that_hold_the_values_are_converted_with_a_note(values, dtype):
    got, notes = loaded(values, dtype)
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got.astype(np.float64), values.astype(np.float64))
    assert notes == [f"'v': {values.dtype.name} converted to {np.dtype(dtype).name}"]


@pytest.mark.parametrize(
    ("values", "dtype", "detail"),
    [
        (np.array([0, 2**31]), np.int32, "do not fit into int32: they reach from 0 to 2147483648"),
        (np.array([-1, 3]), np.uint8, "from -1 to 3"),
        (np.array([0, 2**24 + 1]), np.float32, "do not fit into float32"),
        (np.array([0, 257]), ml_dtypes.bfloat16, "do not fit into bfloat16"),
        (np.array([0, 2**63 - 1]), np.float64, "do not fit into float64"),
        (np.array([0.0, 1e300]), np.float32, "do not fit into float32"),
        (np.array([0.0, 1.0]), np.int64, "has type float64; expected v: int64"),
        (np.array([0, 1]), np.bool_, "has type int64; expected v: bool"),
        (np.array(["a", "b"]), np.float32, "expected v: float32"),
        (np.array([0.0, 1.0]), object, "expected v: string.*Save the array as text"),
        (np.array([1j]), np.float32, "has type complex128"),
        (np.array([(1, 2.0)], "i4,f4"), np.float32, "expected v: float32"),
        (np.array(["2020-01-01"], "M8[D]"), np.int64, "expected v: int64"),
    ],
)
def test_types_that_do_not_are_refused(values, dtype, detail):
    with pytest.raises(InputError, match=detail):
        loaded(values, dtype)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([3, 1], np.uint8), np.uint8),
        (np.array([True, False]), np.bool_),
        (np.array(["a", "bc"]), object),
        (np.array(["a", "bc"], object), object),
        (np.array([1 + 2j]), np.complex128),
    ],
)
def test_equal_types_stay_as_they_are(values, dtype):
    got, notes = loaded(values, dtype)
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)
    assert not notes


def test_bfloat16_that_numpy_saved_without_its_name(tmp_path):
    values = np.array([1.5, -2, 3], ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", v=values)
    samples = load([tmp_path / "a.npz"], [spec(ml_dtypes.bfloat16)])
    np.testing.assert_array_equal(next(samples.batches(3)).feeds["v"], values)

    values[1] = np.nan
    np.savez(tmp_path / "a.npz", v=values)
    with pytest.raises(InputError, match="'v' holds 1 values that are NaN or infinite, first in sample 1"):
        load([tmp_path / "a.npz"], [spec(ml_dtypes.bfloat16)])


def test_an_input_of_unknown_type_takes_any_tensor_but_no_records():
    unknown = InputSpec("v", None, None)
    for values in (np.ones((2, 3)), np.array(["a"])):
        assert len(load([{"v": values}], [unknown])) == len(values)
    with pytest.raises(InputError, match="which no model takes"):
        load([{"v": np.array([(1, 2.0)], "i4,f4")}], [unknown])


def test_python_objects_are_refused():
    with pytest.raises(InputError, match=r"'v' holds Python objects.*separate feeds"):
        loaded(np.array([[1], [1, 2]], dtype=object), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: {"X": d["x"], "ids": d["ids"]},
            r"array 'x' missing\. Expected x: float32\[batch, 3\], ids: int64\[batch, time\]; found 'X', 'ids'",
        ),
        (lambda d: {"x": d["x"], "idx": d["ids"]}, r"found 'x', 'idx'\. Close matches: 'idx'\."),
        (lambda d: {}, "arrays 'x', 'ids' missing.*found nothing"),
        (lambda d: d | {"x": d["x"][:, :2]}, r"'x' has shape \[6, 2\].*size 3 along axis 1, found 2"),
        (lambda d: d | {"x": d["x"][:, 0]}, r"'x' has rank 1, shape \[6\]; expected x: float32\[batch, 3\], rank 2"),
        (lambda d: d | {"x": d["x"][:, 0]}, r"add the leading axis: array\[None\]"),
        (lambda d: d | {"x": d["x"][..., None]}, "has rank 3"),
        (lambda d: d | {"ids": d["ids"][:5]}, "different numbers of samples along axis 0: x 6, ids 5"),
        (lambda d: {k: v[:0] for k, v in d.items()}, "no samples"),
    ],
)
def test_names_and_shapes(change, message):
    with pytest.raises(InputError, match=message):
        load([change(arrays())], INPUTS)


def test_a_leading_dimension_without_a_symbol_does_not_excuse_different_lengths():
    anonymous = [InputSpec("x", X.dtype, (None, 3)), InputSpec("ids", IDS.dtype, (None, None))]
    data = arrays()
    assert len(load([data], anonymous)) == 6
    with pytest.raises(InputError, match="x 6, ids 5"):
        load([data | {"ids": data["ids"][:5]}], anonymous)
    with pytest.raises(InputError, match="x 6, ids 5"):
        load([data | {"ids": data["ids"][:5]}], [X, anonymous[1]])


def test_a_feed_must_have_the_fixed_leading_dimension():
    fixed = [spec(np.float32, (4, 2))]
    assert len(load([[{"v": np.ones((4, 2), np.float32)}]], fixed)) == 1
    with pytest.raises(InputError, match="size 4 along axis 0, found 3"):
        load([[{"v": np.ones((3, 2), np.float32)}]], fixed)
    assert len(load([{"v": np.ones((3, 2), np.float32)}], fixed)) == 3  # stacked samples are cut into fours


def test_a_scalar_input_makes_a_dict_one_feed_and_says_so():
    specs = [X, spec(np.int64, (), "rate")]
    samples = load([{"x": np.ones((5, 3), np.float32), "rate": np.array(16000)}], specs)
    assert len(samples) == 1
    assert samples.notes == ["each set of arrays is one feed and counts as one sample: input 'rate' is a scalar"]
    with pytest.raises(InputError, match=r"'rate' has rank 1.*read as one feed: input 'rate' is a scalar"):
        load([{"x": np.ones((5, 3), np.float32), "rate": np.full(5, 16000)}], specs)


def test_an_array_the_model_does_not_take_is_noted_once():
    samples = load([arrays() | {"extra": np.ones(1)}, arrays() | {"extra": np.ones(1)}], INPUTS)
    assert samples.notes == ["array 'extra' ignored: the model has no such input"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    data = arrays()
    data["x"][[3, 5], [1, 2]] = bad
    with pytest.raises(InputError, match="'x' holds 2 values that are NaN or infinite, first in sample 3"):
        load([data], INPUTS)
    with pytest.raises(InputError, match=r"feed 3: 'x' holds 1 values.*first at \[0, 1\]"):
        load([feeds(data)], INPUTS)
    assert len(load([{k: v[:3] for k, v in data.items()}], INPUTS)) == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(5), r"have shape \[5\]; expected 6 along axis 0, one for each sample"),
        (np.array(1), r"have shape \[\]; expected 6"),
        (np.zeros((6, 1), int), r"have shape \[6, 1\]; expected one integer.*argmax"),
        (np.array(list("abcdef")), "integer class labels"),
        (np.arange(6) * 1j, "integer class labels"),
        (np.array([0, 1, np.nan, 1, 0, 1]), "'labels' holds 1 values that are NaN or infinite, first in sample 2"),
        (np.array([None] * 6), "Python objects"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(InputError, match=message):
        load([arrays() | {"labels": labels}], INPUTS)


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (np.arange(6, dtype=np.uint8), np.int64),
        (np.array([True] * 6), np.int64),
        (np.arange(6, dtype=np.float32), np.float64),
        (np.ones((6, 2), np.float16), np.float64),
    ],
)
def test_labels_that_fit(labels, dtype):
    found = load([arrays() | {"y": labels}], INPUTS, labels_name="y").labels
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels)


def test_labels_of_a_feed_are_one_or_one_per_row():
    feed = {"x": np.ones((4, 3), np.float32), "ids": np.zeros((4, 2), np.int64)}
    for fitting in (2, [2], [0, 1, 2, 3]):
        (batch,) = load([[feed | {"labels": fitting}]], INPUTS).batches(1)
        np.testing.assert_array_equal(batch.labels, np.atleast_1d(fitting))
    with pytest.raises(
        InputError, match=r"expected 1 or 4 along axis 0, one for each feed, or one for each of its rows"
    ):
        load([[feed | {"labels": [1, 2, 3]}]], INPUTS)


def test_an_input_called_labels_is_an_input():
    named = [InputSpec("labels", np.dtype(np.int64), ("n", 2))]
    samples = load([{"labels": np.ones((3, 2), np.int64)}], named)
    assert samples.labels is None
    assert len(samples) == 3
