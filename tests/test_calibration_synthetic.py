import ml_dtypes
import numpy as np
import pytest
from calibration_cases import IDS, X

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.shapes import OTHER_SIZES
from onnx_optshift.calibration.synthetic import synthetic
from onnx_optshift.errors import InputError


def spec(dtype, shape=("n", 2000), name="v"):
    return InputSpec(name, np.dtype(dtype), shape)


def values(samples, size=50, name="v"):
    return np.concatenate([batch.feeds[name][: len(batch.indices)] for batch in samples.batches(size)])


def test_marked_and_seeded_and_the_same_on_every_pass():
    samples = synthetic([X, IDS], 100, 5)
    assert samples.synthetic
    assert samples.source == "synthetic (seed 5)"
    assert len(samples) == 100
    assert samples.labels is samples.classes is None
    assert samples.select([3]).synthetic
    np.testing.assert_array_equal(values(samples, 7, "x"), values(samples, 64, "x"))
    assert samples.fingerprint == synthetic([X, IDS], 100, 5).fingerprint
    assert samples.fingerprint != synthetic([X, IDS], 100, 6).fingerprint


def test_more_samples_begin_with_the_same_ones():
    few, many = (synthetic([X], count, 0) for count in (64, 100))
    assert few.fingerprint == many.select(range(64)).fingerprint
    assert len(np.unique(values(many, name="x"), axis=0)) == 100  # no block repeats another


def test_floats_are_standard_normal():
    found = values(synthetic([spec(np.float32)], 50))
    # Standard errors of mean and variance over 1e5 draws: 0.0032 and 0.0045.
    assert abs(found.mean()) < 0.02
    assert abs(found.var() - 1) < 0.03


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_integers_and_bools_are_even_odds_of_0_and_1(dtype):
    found = values(synthetic([spec(dtype)], 50))
    assert found.dtype == dtype
    assert set(np.unique(found)) == {0, 1}
    assert abs(found.mean() - 0.5) < 0.01


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_keep_their_type(dtype):
    found = values(synthetic([spec(dtype, ("n", 3))], 4))
    assert found.dtype == np.dtype(dtype)
    assert np.isfinite(found.astype(np.float64)).all()


def test_equal_symbols_have_equal_sizes():
    specs = [spec(np.float32, ("b", "t", 3), "a"), spec(np.int64, ("b", "t"), "i"), spec(np.float32, (None, None), "u")]
    (batch,) = synthetic(specs, 5).batches(9)
    assert batch.feeds["a"].shape == (5, OTHER_SIZES[0], 3)
    assert batch.feeds["i"].shape == (5, OTHER_SIZES[0])
    assert batch.feeds["u"].shape == (5, OTHER_SIZES[0])


def test_given_shapes_reach_every_input_of_the_symbol_and_fix_the_batch():
    specs = [spec(np.float32, ("b", "t", 3), "a"), spec(np.int64, ("b", "t"), "i")]
    batches = list(synthetic(specs, 5, shapes={"a": (2, 11, 3)}).batches(64))
    assert [batch.feeds["a"].shape for batch in batches] == [(2, 11, 3)] * 3
    assert batches[0].feeds["i"].shape == (2, 11)
    assert [batch.rows for batch in batches] == [2, 2, 1]


def test_fixed_batch_dimension():
    sizes = [(batch.feeds["v"].shape, batch.padding) for batch in synthetic([spec(np.float32, (4, 3))], 6).batches(64)]
    assert sizes == [((4, 3), 0), ((4, 3), 2)]


def test_inputs_without_a_common_batch_axis_become_feeds():
    specs = [
        spec(np.float32, ("batch", "time"), "sound"),
        spec(np.float32, (2, "batch", 6), "state"),
        spec(np.int64, (), "rate"),
    ]
    batches = list(synthetic(specs, 3).batches(64))
    assert len(batches) == 3
    assert batches[0].feeds["sound"].shape == (1, OTHER_SIZES[0])
    assert batches[0].feeds["state"].shape == (2, 1, 6)
    assert batches[0].feeds["rate"].shape == ()
    assert not np.array_equal(batches[0].feeds["sound"], batches[1].feeds["sound"])


@pytest.mark.parametrize(
    "wrong",
    [spec(object), spec(np.complex64), InputSpec("v", None, ("n",)), InputSpec("v", np.dtype(np.float32), None)],
)
def test_what_cannot_be_made_up_is_named(wrong):
    with pytest.raises(InputError, match="no synthetic data can be made for input v: "):
        synthetic([X, wrong], 4)


def test_wrong_arguments():
    for arguments, message in (
        (([X], 0), "at least 1 sample, found 0"),
        (([], 3), "no inputs"),
    ):
        with pytest.raises(InputError, match=message):
            synthetic(*arguments)
