import numpy as np
import pytest
from calibration_cases import IDS, INPUTS, X

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.shapes import (
    IMAGE_SIZES,
    OTHER_SIZES,
    parse_shape,
    shape_option,
    usual_sizes,
    with_shapes,
)
from onnx_optshift.calibration.synthetic import synthetic
from onnx_optshift.errors import InputError


def image(*shape, name="images"):
    return InputSpec(name, np.dtype(np.float32), shape)


DETECTOR = image("batch", 3, "height", "width")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("images:1,3,320,320", ("images", (1, 3, 320, 320))),
        ("serving:x:0:4, 2", ("serving:x:0", (4, 2))),
        ("n:7", ("n", (7,))),
    ],
)
def test_parse(text, parsed):
    assert parse_shape(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "images", "1,3", ":1,3", "images:", "x:1,,3", "x:1x3", "x:-1,3", "x:0", "x:1.5", "x:²"]
)
def test_what_is_no_shape_is_refused_with_an_example(text):
    with pytest.raises(InputError, match=r"input shape .*such as images:1,3,320,320"):
        parse_shape(text)


def test_a_given_size_holds_for_its_symbol_everywhere():
    mask = image("batch", "height", "?", name="mask")
    found = with_shapes([DETECTOR, mask], {"images": (1, 3, 320, 256)})
    assert [spec.shape for spec in found] == [(1, 3, 320, 256), (1, 320, None)]
    unknown = InputSpec("u", X.dtype, None)
    assert with_shapes([unknown, X], {"u": (2, 5)}) == [InputSpec("u", X.dtype, (2, 5)), X]
    assert with_shapes(INPUTS, {}) == INPUTS


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"image": (1, 3, 8, 8)},
            "image:1,3,8,8: the model has no input 'image'. Close matches: 'images'. Expected one of",
        ),
        (
            {"images": (3, 8, 8)},
            r"expected 4 sizes, one for each axis of images: float32\[batch, 3, height, width\]; found 3",
        ),
        ({"images": (1, 4, 8, 8)}, "images:1,4,8,8: expected size 3 along axis 1, which the model fixes.*found 4"),
    ],
)
def test_shapes_that_contradict_the_model(shapes, message):
    with pytest.raises(InputError, match=message):
        with_shapes([DETECTOR], shapes)
    with pytest.raises(InputError, match=message):
        synthetic([DETECTOR], 1, shapes=shapes)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (DETECTOR, [("batch", 3, size, size) for size in IMAGE_SIZES]),
        (image("n", "h", "w", 1), [("n", size, size, 1) for size in IMAGE_SIZES]),
        (image("n", None, None, None), [("n", 3, size, size) for size in IMAGE_SIZES]),
        (image("n", 3, 32, "w"), [("n", 3, 32, size) for size in IMAGE_SIZES]),
        (image("n", 8, "past", 64), [("n", 8, size, 64) for size in OTHER_SIZES]),
        (image("n", 80, "time"), [("n", 80, size) for size in OTHER_SIZES]),
        (IDS, [("batch", size) for size in OTHER_SIZES]),
        (X, [("batch", 3)]),
        (image(), [()]),
        (image(1, 3, 8, 8), [(1, 3, 8, 8)]),
        (InputSpec("u", None, None), [None]),
    ],
)
def test_usual_sizes_in_the_order_to_try(spec, shapes):
    assert [found.shape for (found,) in usual_sizes([spec])] == shapes


def test_equal_symbols_get_equal_usual_sizes():
    specs = [DETECTOR, image("batch", "width", name="columns"), image(2, "batch", 6, name="state")]
    first = next(usual_sizes(specs))
    assert [spec.shape for spec in first] == [("batch", 3, 224, 224), ("batch", 224), (2, "batch", 6)]
    (batch,) = synthetic(first, 1).batches(4)
    assert {name: array.shape for name, array in batch.feeds.items()} == {
        "images": (1, 3, 224, 224),
        "columns": (1, 224),
        "state": (2, 1, 6),
    }


def test_the_option_that_sets_free_sizes():
    assert shape_option([X, DETECTOR]) == "--input-shape images:1,3,224,224"
    assert shape_option([X]) == ""
    name, shape = parse_shape(shape_option([IDS]).removeprefix("--input-shape "))
    assert with_shapes([IDS], {name: shape})[0].shape == shape
