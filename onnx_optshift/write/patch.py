"""New payloads for named tensors, and not a byte else: the only file that writes models.

The model is not exported from a graph library: those write it anew and change more than weights. The parsed message is
copied, payloads are replaced in the field that holds them, and the copy is serialized.

External data goes to a new file named after its own content, never into an existing one. A fixed name would be shared
by the model that is at OUT now (or by IN, when they are the same file): replacing the data first and the model second
would leave, in between or after a crash, an old model with new data. A new name is referred to by nobody until the
model's rename, and two runs with the same result give the same name. Once the model is in place, the data of the one
that it has replaced is removed if nobody else can need it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.errors import InputError, closest
from onnx_optshift.graph.bodies import graphs, unique_names
from onnx_optshift.graph.external import Span, locate, payload
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.tensors import (
    PAYLOAD_FIELDS,
    all_tensors,
    check_fits,
    is_external,
    little_endian,
    named_tensors,
    owned_tensors,
    raw_size,
    replace_inline,
)
from onnx_optshift.write.atomic import Written, check_target, data_name, digest, system_errors

Arrays = Mapping[str, NDArray[np.generic]]

# Smaller tensors (shapes, scales, most biases) stay inline: runtimes want some of them at hand while loading.
EXTERNAL_FROM_BYTES: Final = 1024
# The ONNX specification asks for offsets at multiples of the page size, so that tensors can be mapped.
ALIGNMENT: Final = 4096
# Data is copied in pieces of this size: no model is ever whole in memory.
_CHUNK: Final = 1 << 22
_KERNEL_CHUNK: Final = 1 << 30
# A tensor of an external file: name (or empty), message, place.
_Reader = tuple[str, onnx.TensorProto, Span]


def patched(model: ModelFile, arrays: Arrays) -> onnx.ModelProto:
    """A copy of a model with inline data in which only the payloads of the named tensors differ.

    Args:
        model: The original.
        arrays: New contents by initializer name (or output of a Constant node), in the tensor's dtype and shape.

    Returns:
        The copy.

    Raises:
        InputError: A name is unknown, an array has another dtype or shape, or a tensor is external (`write_beside`
            writes those).
    """
    _check_arrays(model, arrays)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tensors = owned_tensors(proto)
    for name, array in arrays.items():
        if is_external(tensors[name]):
            raise InputError(f"tensor {name!r}: its data is external and cannot be patched in memory. Write to a file.")
        replace_inline(tensors[name], array)
    return proto


def write_beside(model: ModelFile, arrays: Arrays, out: Path, *, save_as_external: bool = False) -> Written:
    """Writes the patched model beside its final place; `commit` of the result renames it.

    With no arrays and no change of storage the model file is copied byte for byte.

    Args:
        model: The original; its file may be `out` itself.
        arrays: New contents by initializer name, in the tensor's dtype and shape.
        out: Final path.
        save_as_external: Puts all initializers of 1 KiB and more, also those of bodies, into one external data file.

    Returns:
        The written files. Nothing stays behind if it is not committed.

    Raises:
        InputError: An array does not fit, or the files cannot be written.
    """
    out = Path(out)
    check_target(out)
    _check_arrays(model, arrays)
    written = Written(out)
    try:
        with system_errors(out):
            if save_as_external:
                _write_proto(_externalized(model, arrays, written), written)
            elif arrays or model.path is None:
                _write_proto(_with_data_files(model, arrays, written), written)
            else:
                _copy(model.path, model, written)
    except BaseException:  # an interrupt too must leave nothing behind
        written.discard()
        raise
    return written


def _check_arrays(model: ModelFile, arrays: Arrays) -> None:
    for name, array in arrays.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            raise InputError(f"{model.where}: no initializer {name!r}.{closest(name, list(model.tensors))}")
        check_fits(tensor, array)


def _write_proto(proto: onnx.ModelProto, written: Written) -> None:
    try:
        data = proto.SerializeToString()
    except (ValueError, MemoryError) as error:
        raise InputError(
            f"{written.final_path}: the model cannot be serialized ({error}). Use --save-as-external-data."
        ) from error
    with written.temp_path.open("xb") as file:
        file.write(data)


def _copy(path: Path, model: ModelFile, written: Written) -> None:
    """Byte for byte; data files keep their names, since the model's bytes must not change."""
    with written.temp_path.open("xb") as target, path.open("rb") as source:
        shutil.copyfileobj(source, target, _CHUNK)
    if _leaves_folder(model, written):
        spans = (locate(tensor, model.folder) for tensor in all_tensors(model.proto) if is_external(tensor))
        for location, data in {span.location: span.path for span in spans}.items():
            shutil.copyfile(data, written.temp_data)
            written.place_data(location)


def _with_data_files(model: ModelFile, arrays: Arrays, written: Written) -> onnx.ModelProto:
    """The patched message; external files that change, or that are not beside OUT, are copied under new names."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    new = {name: arrays[name] for name, tensor in owned_tensors(proto).items() if name in arrays}
    by_file: dict[Path, list[_Reader]] = {}
    for name, tensor in named_tensors(proto):
        if is_external(tensor):
            span = locate(tensor, model.folder)
            by_file.setdefault(span.path, []).append((name, tensor, span))
        elif name in new:
            replace_inline(tensor, new[name])
    for path, readers in by_file.items():
        if not (_leaves_folder(model, written) or any(name in new for name, _, _ in readers)):
            continue
        offsets: list[int] = []
        location = _new_data_file(written, partial(_fill_patched, path, readers, new, offsets))
        for (_, tensor, span), offset in zip(readers, offsets, strict=True):
            _refer(tensor, location, offset, span.length)
    return proto


def _fill_patched(path: Path, readers: Sequence[_Reader], new: Arrays, offsets: list[int], file: BinaryIO) -> None:
    """Copies an external file with new payloads, and notes where each of its tensors is then."""
    with path.open("rb") as source:
        with suppress(OSError, AttributeError):  # the kernel where it can: some file systems then copy nothing at all
            while os.copy_file_range(source.fileno(), file.fileno(), _KERNEL_CHUNK):
                pass
        shutil.copyfileobj(source, file, _CHUNK)  # the rest
    for index, (name, _, span) in enumerate(readers):
        if name not in new:
            offsets.append(span.offset)
            continue
        # Exporters let equal tensors share their bytes; only this one may change, so it moves to the end.
        shared = any(span.overlaps(other) for k, (_, _, other) in enumerate(readers) if k != index)
        offsets.append(_aligned_end(file) if shared else file.seek(span.offset))
        _write_array(new[name], file)


def _externalized(model: ModelFile, arrays: Arrays, written: Written) -> onnx.ModelProto:
    """The patched message with its larger initializers in one new file, streamed there one by one."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    large = {
        names[tensor.name]
        for graph, names in zip(graphs(proto.graph), unique_names(proto.graph), strict=True)
        for tensor in graph.initializer
        if tensor.data_type != onnx.TensorProto.STRING and raw_size(tensor) >= EXTERNAL_FROM_BYTES
    }
    moving: list[tuple[str, onnx.TensorProto]] = []
    for name, tensor in named_tensors(proto):
        if is_external(tensor) or name in large:
            moving.append((name, tensor))
        elif name in arrays:
            replace_inline(tensor, arrays[name])
    offsets: list[int] = []

    def fill(file: BinaryIO) -> None:
        for name, tensor in moving:
            offsets.append(_aligned_end(file))
            _write_array(arrays[name] if name and name in arrays else payload(tensor, model.folder), file)

    if moving:
        location = _new_data_file(written, fill)
        for (_, tensor), offset in zip(moving, offsets, strict=True):
            _refer(tensor, location, offset, raw_size(tensor))
    return proto


def _write_array(array: NDArray[np.generic], file: BinaryIO) -> None:
    flat = array.reshape(-1)  # may be mapped from another file
    for start in range(0, flat.size, _CHUNK):
        file.write(little_endian(flat[start : start + _CHUNK]))


def _aligned_end(file: BinaryIO) -> int:
    """Pads the file to the next page and returns that offset."""
    end = file.seek(0, os.SEEK_END)
    file.write(bytes(-end % ALIGNMENT))
    return file.tell()


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes a tensor external; what it held is dropped, as are hints (a checksum) about another file."""
    for field in PAYLOAD_FIELDS:
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _new_data_file(written: Written, fill: Callable[[BinaryIO], None]) -> str:
    """Writes a data file beside OUT, names it after its content, and returns that name."""
    with written.temp_data.open("xb") as file:
        fill(file)
    location = data_name(written.final_path, digest(written.temp_data))
    written.place_data(location)
    return location


def _leaves_folder(model: ModelFile, written: Written) -> bool:
    """Whether OUT is in another folder than the model, where its external data would not be found."""
    return model.folder is not None and model.folder.resolve() != written.final_path.parent.resolve()
