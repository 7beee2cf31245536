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
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
# A tensor of a data file: name (or empty), message, place in the file that it is in now.
_Reader = tuple[str, onnx.TensorProto, Span | None]


def write_beside(model: ModelFile, arrays: Arrays, out: Path, *, save_as_external: bool = False) -> Written:
    """Writes the patched model beside its final place; `commit` of the result renames it.

    With no arrays and no change of storage the model file is copied byte for byte.

    Args:
        model: The original; its file may be `out` itself.
        arrays: New contents by initializer name (or output of a Constant node), in the tensor's dtype and shape.
        out: Final path.
        save_as_external: Puts all initializers of 1 KiB and more, also those of bodies, into one external data file.

    Raises:
        InputError: An array does not fit, or the files cannot be written; nothing stays behind.
    """
    check_target(out)
    for name, array in arrays.items():
        if name not in model.tensors:
            raise InputError(f"{model.where}: no initializer {name!r}.{closest(name, list(model.tensors))}")
        check_fits(model.tensors[name], array)
    with system_errors(out):
        written = Written(out)
        try:
            if save_as_external or arrays or model.path is None:
                _write_proto(_with_data_files(model, arrays, written, one_file=save_as_external), written)
            else:
                _copy(model.path, model, written)
        except BaseException:  # an interrupt too must leave nothing behind
            written.discard()
            raise
    return written


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


def _with_data_files(model: ModelFile, arrays: Arrays, written: Written, *, one_file: bool) -> onnx.ModelProto:
    """The patched message, with its data files in place.

    External files that change, or that are not beside OUT, are copied under new names; with `one_file` all of them and
    the larger initializers are streamed to a single new one.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    large = _large(proto) if one_file else set()
    by_file: dict[Path | None, list[_Reader]] = {}
    for name, tensor in named_tensors(proto):
        if is_external(tensor):
            span = locate(tensor, model.folder)
            by_file.setdefault(None if one_file else span.path, []).append((name, tensor, span))
        elif name in large:
            by_file.setdefault(None, []).append((name, tensor, None))
        elif name in arrays:
            replace_inline(tensor, arrays[name])
    for path, readers in by_file.items():
        if path and not (_leaves_folder(model, written) or any(name in arrays for name, _, _ in readers)):
            continue
        with written.temp_data.open("xb") as file:
            if path:
                offsets = _fill_patched(path, readers, arrays, file)
            else:
                contents = (arrays[name] if name in arrays else payload(t, model.folder) for name, t, _ in readers)
                offsets = [_append(content, file) for content in contents]
        location = data_name(written.final_path, digest(written.temp_data))
        written.place_data(location)
        for (_, tensor, _), offset in zip(readers, offsets, strict=True):
            _refer(tensor, location, offset, raw_size(tensor))
    return proto


def _large(proto: onnx.ModelProto) -> set[str]:
    """Model-wide names of initializers, also of bodies, that are worth a place in a data file."""
    return {
        names[tensor.name]
        for graph, names in zip(graphs(proto.graph), unique_names(proto.graph), strict=True)
        for tensor in graph.initializer
        if tensor.data_type != onnx.TensorProto.STRING and raw_size(tensor) >= EXTERNAL_FROM_BYTES
    }


def _fill_patched(path: Path, readers: Sequence[_Reader], new: Arrays, file: BinaryIO) -> list[int]:
    """Copies an external file with new payloads; returns where each of its tensors is then."""
    with path.open("rb") as source:
        with suppress(OSError, AttributeError):  # the kernel where it can: some file systems then copy nothing at all
            while os.copy_file_range(source.fileno(), file.fileno(), _KERNEL_CHUNK):
                pass
        shutil.copyfileobj(source, file, _CHUNK)  # the rest
    offsets = []
    for name, _, span in readers:
        assert span is not None
        offset = span.offset
        if name in new:
            # Exporters let equal tensors share their bytes; only this one may change, so it moves to the end.
            if any(other and other is not span and span.overlaps(other) for _, _, other in readers):
                offset = _append(new[name], file)
            else:
                file.seek(offset)
                _write_array(new[name], file)
        offsets.append(offset)
    return offsets


def _write_array(array: NDArray[np.generic], file: BinaryIO) -> None:
    flat = array.reshape(-1)  # may be mapped from another file
    for start in range(0, flat.size, _CHUNK):
        file.write(little_endian(flat[start : start + _CHUNK]))


def _append(array: NDArray[np.generic], file: BinaryIO) -> int:
    """Writes an array from the next page on, and returns that offset."""
    end = file.seek(0, os.SEEK_END)
    file.write(bytes(-end % ALIGNMENT))
    offset = file.tell()
    _write_array(array, file)
    return offset


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes a tensor external; what it held is dropped, as are hints (a checksum) about another file."""
    for field in PAYLOAD_FIELDS:
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _leaves_folder(model: ModelFile, written: Written) -> bool:
    """Whether OUT is in another folder than the model, where its external data would not be found."""
    return model.folder is not None and model.folder.resolve() != written.final_path.parent.resolve()
