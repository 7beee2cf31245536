"""Rows and moments of activations, against im2col by loops and numpy's own broadcasting."""

import math

import numpy as np
import pytest
import reference
import torch

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.stats import rows as rows_module
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.patches import lag_axis
from onnx_optshift.stats.rows import observe, to_rows

PATCHES = {
    "1-D": ((17,), PatchRows((3,), (1,), (1,), (1, 1))),
    "1-D stride": ((17,), PatchRows((3,), (2,), (1,), (0, 2))),
    "1-D dilated": ((29,), PatchRows((5,), (1,), (2,), (4, 4))),
    "2-D": ((14, 13), PatchRows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))),
    "2-D pointwise": ((5, 4), PatchRows((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))),
    "2-D column": ((25, 1), PatchRows((5, 1), (1, 1), (1, 1), (2, 0, 2, 0))),
    "2-D row": ((2, 25), PatchRows((1, 5), (1, 1), (1, 1), (0, 2, 0, 2))),
    "2-D asymmetric": ((13, 12), PatchRows((2, 3), (1, 1), (2, 1), (0, 1, 3, 2), scale=0.5)),
    "2-D mixed stride": ((20, 9), PatchRows((3, 2), (1, 2), (1, 3), (0, 0, 0, 0))),
    "2-D groups": ((13, 5), PatchRows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), group=2)),
    "2-D depthwise": ((5, 13), PatchRows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), group=4)),
    "2-D same upper": ((7, 6), PatchRows((3, 2), (2, 1), (1, 1), (9, 9, 9, 9), auto_pad="SAME_UPPER")),
    "2-D same lower": ((7, 6), PatchRows((2, 4), (1, 1), (1, 1), (9, 9, 9, 9), auto_pad="SAME_LOWER")),
    "2-D valid": ((6, 7), PatchRows((3, 3), (2, 2), (1, 1), (9, 9, 9, 9), auto_pad="VALID")),
    "3-D": ((4, 13, 3), PatchRows((2, 3, 2), (1, 1, 1), (1, 1, 1), (0, 1, 1, 0, 1, 0), group=2)),
}
CHANNELS = 4


def patch_case(name, dtype=np.float64):
    spatial, form = PATCHES[name]
    rng = np.random.default_rng(len(name))
    images = rng.standard_normal((3, CHANNELS, *spatial)).astype(dtype)
    return images, Tap("x", form, form.group, CHANNELS // form.group * math.prod(form.kernel))


@pytest.mark.parametrize("name", PATCHES)
def test_patches_are_those_of_the_loops(name):
    images, tap = patch_case(name)
    np.testing.assert_array_equal(to_rows(torch.from_numpy(images), tap), reference.patches(images, tap.form))


def test_patches_times_kernel_is_the_convolution():
    # The order of features must be the one of weight.reshape(M, -1), or every solve would scramble the kernel.
    images, tap = patch_case("2-D groups")
    kernel = torch.randn(6, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direct = torch.nn.functional.conv2d(torch.from_numpy(images), kernel, padding=1, groups=2)
    matrix = kernel.reshape(2, 3, -1).mT
    product = (to_rows(torch.from_numpy(images), tap) @ matrix).reshape(2, 3, 13, 5, 3).permute(1, 0, 4, 2, 3)
    np.testing.assert_allclose(product.reshape(direct.shape), direct, rtol=1e-12, atol=1e-12)
    swapped = kernel.mT.reshape(2, 3, -1).mT
    assert not np.allclose(
        to_rows(torch.from_numpy(images), tap) @ swapped, to_rows(torch.from_numpy(images), tap) @ matrix
    )


@pytest.mark.parametrize("chunk", [2**26, 3000])
@pytest.mark.parametrize("name", PATCHES)
def test_observed_patches_have_the_gram_matrix_of_the_loops(name, chunk, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", chunk)
    images, tap = patch_case(name)
    expected = reference.patches(images, tap.form)
    moments = InputMoments(tap.groups, tap.width)
    observe(moments, tap, torch.from_numpy(images))
    gram = np.swapaxes(expected, 1, 2) @ expected
    assert moments.rows == expected.shape[1]
    # Normwise rounding of a sum of a few hundred products, the lags' border terms included.
    assert np.linalg.norm(moments.gram().numpy() - gram) <= 1e-13 * np.linalg.norm(gram)
    assert np.linalg.norm(moments.total.numpy() - expected.sum(1)) <= 1e-12 * np.abs(expected).sum()


@pytest.mark.parametrize("name", ["1-D", "2-D", "2-D groups", "3-D"])
def test_thinned_rows_are_some_of_each_sample_and_stand_for_all(name, monkeypatch):
    monkeypatch.setattr(rows_module, "LEAST_OF_IMAGE", 1)
    spatial, form = PATCHES[name]
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((40, CHANNELS, *spatial)))
    width = CHANNELS // form.group * math.prod(form.kernel)
    tap = Tap("x", form, form.group, width)
    whole, thin = InputMoments(form.group, width), InputMoments(form.group, width)
    observe(whole, tap, images)
    observe(thin, tap, images, every=5)
    assert 0.1 * whole.rows < thin.rows < 0.3 * whole.rows
    off = (thin.gram() / thin.rows - whole.gram() / whole.rows).norm() / (whole.gram() / whole.rows).norm()
    # The entries of a mean of n products of standard normals deviate by n^-1/2.
    assert float(off) < 3 * (width / thin.rows) ** 0.5
    alone = InputMoments(form.group, width)
    observe(alone, tap, images[:1], every=5)
    assert alone.rows == thin.rows // 40  # of every sample as many
    # By turns all of them, each as often as the others.
    turns = InputMoments(form.group, width)
    for phase in range(5 if spatial[-1] >= 5 else 6):
        observe(turns, tap, images, every=5, phase=phase)
    assert turns.rows == whole.rows
    torch.testing.assert_close(turns.gram(), whole.gram())


def test_small_images_among_large_ones_are_not_thinned():
    form = PatchRows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    tap = Tap("x", form, 1, CHANNELS * 9)

    def thinned(size):
        moments = InputMoments(1, tap.width)
        observe(moments, tap, torch.ones(1, CHANNELS, size, size), every=100)
        return moments.rows

    assert thinned(8) == 64
    assert 50 < thinned(20) < 200
    assert 50 < thinned(96) < 200  # negative control: of 9,216 patches


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1, 1e15, 1e25])
def test_float32_products_of_rows_of_any_size(scale):
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((600, 5))).to(torch.float32) * scale
    tap = Tap("x", MatrixRows(), 1, 5)
    moments = InputMoments(1, 5, products=torch.float32)
    observe(moments, tap, rows)
    exact = (rows.double().mT @ rows.double())[None]
    assert float((moments.gram() - exact).norm() / exact.norm()) < 1e-6
    plain = (rows.mT @ rows).double()
    # Negative control: sizes at which float32 itself holds no such products.
    assert bool((plain - exact[0]).norm() / exact.norm() < 1e-6) == (1e-20 < scale < 1e20)


def test_both_ways_through_patches_are_exercised():
    ways = {name: lag_axis(torch.from_numpy(patch_case(name)[0]), form) for name, (_, form) in PATCHES.items()}
    assert ways["2-D"] == ways["1-D"] == 0
    assert ways["2-D depthwise"] == ways["2-D row"] == ways["3-D"] == 1
    assert ways["2-D pointwise"] is ways["1-D stride"] is ways["2-D valid"] is None


MATRIX = {
    # activation shape, form, groups, indices of the row axes by numpy
    "2-D": ((7, 5), MatrixRows(), 1),
    "1-D": ((5,), MatrixRows(), 1),
    "1-D left": ((5,), MatrixRows(feature_axis=-2), 1),
    "4-D": ((2, 3, 4, 5), MatrixRows(), 1),
    "transposed": ((5, 7), MatrixRows(feature_axis=-2, scale=-0.25), 1),
    "4-D transposed": ((2, 3, 5, 4), MatrixRows(feature_axis=-2), 1),
    "batch": ((3, 4, 5), MatrixRows(batch=(3,)), 3),
    "batch 2": ((6, 2, 3, 4, 5), MatrixRows(batch=(2, 3)), 6),
    "broadcast rows": ((1, 4, 5), MatrixRows(batch=(3,)), 3),
    "missing axes": ((4, 5), MatrixRows(batch=(2, 3)), 6),
    "vector": ((5,), MatrixRows(batch=(3,)), 3),
    "weight has ones": ((2, 3, 4, 5), MatrixRows(batch=(1, 3)), 3),
    "ones in the middle": ((2, 3, 4, 5), MatrixRows(batch=(2, 1)), 2),
    "batch transposed": ((3, 5, 4), MatrixRows(feature_axis=-2, batch=(3,)), 3),
}


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_rows_give_the_moments_that_numpy_matmul_implies(name):
    shape, form, groups = MATRIX[name]
    x = np.random.default_rng(len(name)).standard_normal(shape)
    tap = Tap("x", form, groups, 5)
    rows = to_rows(torch.from_numpy(x), tap)
    assert rows.shape[0] == groups
    assert rows.shape[2] == 5
    # ||X @ W||^2 over all outputs is what the rows of each group must reproduce, for any W of the weight's shape.
    weights = np.random.default_rng(1).standard_normal((*(form.batch or (1,) * 0), 5, 2))
    operand = x if form.feature_axis == -1 or x.ndim == 1 else np.swapaxes(x, -1, -2)
    outputs = form.scale * (operand @ weights)
    products = rows.numpy() @ weights.reshape(groups, 5, 2)
    assert products.size == outputs.size
    np.testing.assert_allclose(np.sort(products.ravel()), np.sort(outputs.ravel()), rtol=1e-12)
    moments = InputMoments(groups, 5)
    observe(moments, tap, torch.from_numpy(x))
    np.testing.assert_allclose(moments.gram(), rows.mT @ rows, rtol=1e-12, atol=1e-13)


def test_rows_of_a_batched_weight_stay_with_their_matrix():
    x = torch.arange(3.0)[:, None, None] + torch.zeros(3, 4, 5)
    rows = to_rows(x, Tap("x", MatrixRows(batch=(3,)), 3, 5))
    assert [float(group.unique()) for group in rows] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_scale_applied_in_float64(dtype):
    x = torch.linspace(0.1, 1, 15).reshape(3, 5).to(dtype)
    tap = Tap("x", MatrixRows(scale=1 / 3), 1, 5)
    assert to_rows(x, tap).dtype == dtype
    moments = InputMoments(1, 5)
    observe(moments, tap, x)
    exact = x.double() / 3
    np.testing.assert_allclose(moments.total[0], exact.sum(0), rtol=1e-15)
    if dtype != torch.float64:
        assert not np.allclose(to_rows(x, tap).double().sum(1)[0], exact.sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["matrix", "patches"])
def test_activations_that_are_not_finite_are_counted_and_left_out(bad, kind):
    if kind == "matrix":
        x, tap = torch.ones(6, 5), Tap("x", MatrixRows(), 1, 5)
    else:
        images, tap = patch_case("2-D")
        x = torch.from_numpy(images)
    moments = InputMoments(1, tap.width)
    observe(moments, tap, x)
    rows, gram = moments.rows, moments.gram()
    spoiled = x.clone()
    spoiled.view(-1)[[0, 7]] = bad
    observe(moments, tap, spoiled)
    assert moments.nonfinite == 2
    assert moments.rows == rows
    assert torch.equal(moments.gram(), gram)
    observe(moments, tap, x)
    assert moments.rows == 2 * rows


def test_float64_copies_stay_within_the_chunk(monkeypatch):
    seen = []
    update = InputMoments.update
    monkeypatch.setattr(InputMoments, "update", lambda self, rows: (seen.append(rows.nbytes), update(self, rows))[1])
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 8 * 5 * 100)
    for shape in ((1000, 5), (3, 700, 5), (2, 90, 3, 5)):
        observe(InputMoments(1, 5), Tap("x", MatrixRows(), 1, 5), torch.ones(shape))
    assert max(seen) <= rows_module.CHUNK_BYTES
    assert sum(seen) == 8 * 5 * (1000 + 2100 + 540)


@pytest.mark.parametrize(
    ("shape", "tap"),
    [
        ((7, 4), Tap("here", MatrixRows(), 1, 5)),
        ((4,), Tap("here", MatrixRows(), 1, 5)),
        ((), Tap("here", MatrixRows(), 1, 5)),
        ((5, 4), Tap("here", MatrixRows(), 1, 5)),
        ((2, 4, 5), Tap("here", MatrixRows(batch=(3,)), 3, 5)),
        ((2, 3, 9, 9), Tap("here", PATCHES["2-D"][1], 1, 36)),
        ((2, 4, 9), Tap("here", PATCHES["2-D"][1], 1, 36)),
        ((2, 4, 1, 1), Tap("here", PatchRows((3, 3), (1, 1), (1, 1), (0, 0, 0, 0)), 1, 36)),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_the_value(shape, tap):
    with pytest.raises(InputError, match=r"'here'.*\[.*\].*Check|'here'.*\[.*\].*Give"):
        to_rows(torch.ones(shape), tap)
    with pytest.raises(InputError, match="'here'"):
        observe(InputMoments(tap.groups, tap.width), tap, torch.ones(shape))


def test_no_rows_bring_nothing():
    moments = InputMoments(1, 5)
    observe(moments, Tap("x", MatrixRows(), 1, 5), torch.ones(0, 5))
    assert moments.rows == 0
    with pytest.raises(InputError):
        observe(moments, Tap("x", MatrixRows(), 1, 5), torch.ones(0, 4))
