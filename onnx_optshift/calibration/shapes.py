"""Sizes of axes that a model leaves free: as the user gives them, or the usual ones to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnx_optshift.calibration.inputs import Dim, InputSpec, describe
from onnx_optshift.errors import InputError, closest

# Heights and widths of images: the usual ones of classifiers, of detectors, and small ones for models that flatten.
IMAGE_SIZES = (224, 256, 320, 640, 32, 28)
# Other axes, most often time: more than one step but short; then what models of a fixed length are exported for.
OTHER_SIZES = (8, 16, 32, 64, 128, 512)
_CHANNELS = 3


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """An input's name and the sizes of its axes, from `NAME:D1,D2,...`; the name may hold colons.

    Raises:
        InputError: The text is not of that form, or a size is not a positive number.
    """
    name, _, sizes = text.rpartition(":")
    numbers = sizes.split(",")
    if not name or not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise InputError(
            f"input shape {text!r}: expected the name of an input and the sizes of all of its axes, positive numbers, "
            "such as images:1,3,320,320."
        )
    return name, tuple(map(int, numbers))


def with_shapes(inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> list[InputSpec]:
    """The inputs with the sizes given for some of them; a symbol that gets a size has it in the other inputs too.

    Raises:
        InputError: There is no such input, or the model fixes another rank or size.
    """
    known = {spec.name: spec for spec in inputs}
    symbols: dict[Dim, Dim] = {}
    for name, shape in shapes.items():
        where = f"input shape {name}:{','.join(map(str, shape))}"
        if name not in known:
            raise InputError(
                f"{where}: the model has no input {name!r}.{closest(name, list(known))} Expected one of "
                f"{describe(inputs)}."
            )
        dims = known[name].dims or (None,) * len(shape)
        if len(dims) != len(shape):
            raise InputError(
                f"{where}: expected {len(dims)} sizes, one for each axis of {known[name]}; found {len(shape)}."
            )
        for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if isinstance(dim, int) and dim != size:
                raise InputError(
                    f"{where}: expected size {dim} along axis {axis}, which the model fixes ({known[name]}); found "
                    f"{size}. Only free sizes can be chosen."
                )
            if isinstance(dim, str):
                symbols.setdefault(dim, size)
    return [
        replace(spec, shape=shapes.get(spec.name) or (spec.dims and tuple(symbols.get(dim, dim) for dim in spec.dims)))
        for spec in inputs
    ]


def usual_sizes(inputs: Sequence[InputSpec]) -> Iterator[list[InputSpec]]:
    """The inputs with usual sizes where the model leaves them free, in the order to try; once if it leaves none.

    Height and width of what looks like images (rank 4, 1 or 3 channels or a free number) are `IMAGE_SIZES`, all other
    axes `OTHER_SIZES`. Equal symbols get equal sizes. The leading axis stays free, as it numbers the samples.
    """
    known = [spec.dims or () for spec in inputs]
    leads = {dims[0] for dims in known if dims} - {None}
    image = {dims[axis] for dims in known for axis in _spatial(dims)} - {None}

    def filled(spec: InputSpec, size: int, other: int) -> InputSpec:
        dims, spatial = list(spec.dims or ()), _spatial(spec.dims or ())
        for axis, dim in enumerate(dims[1:], start=1):
            if not isinstance(dim, int) and dim not in leads:
                dims[axis] = size if axis in spatial or dim in image else _CHANNELS if spatial else other
        return replace(spec, shape=spec.dims and tuple(dims))

    tried: list[list[InputSpec]] = []
    for size, other in zip(IMAGE_SIZES, OTHER_SIZES, strict=True):
        specs = [filled(spec, size, other) for spec in inputs]
        if specs in tried:
            return
        tried.append(specs)
        yield specs


def shape_option(inputs: Sequence[InputSpec]) -> str:
    """The option that sets the free sizes of the first input that has some, to usual ones; empty if none has."""
    for spec, filled in zip(inputs, next(usual_sizes(inputs)), strict=True):
        if not all(isinstance(dim, int) for dim in (spec.dims or ())[1:]):
            sizes = ",".join(str(dim if isinstance(dim, int) else 1) for dim in filled.shape or ())
            return f"--input-shape {spec.name}:{sizes}"
    return ""


def _spatial(dims: Sequence[Dim]) -> tuple[int, ...]:
    """Axes of height and width of what looks like images, channels first or last; none for anything else."""
    if len(dims) != 4:
        return ()
    if dims[1] in (1, _CHANNELS) or not any(isinstance(dim, int) for dim in dims[1:]):
        return 2, 3
    return (1, 2) if dims[3] in (1, _CHANNELS) else ()
