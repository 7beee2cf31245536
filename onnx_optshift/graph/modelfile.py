"""A model as it was given: checked once at this edge, then only read.

Parsing, the ONNX checker and graph import meet files from anywhere, so whatever goes wrong in them becomes one
`InputError` here; behind this edge a model is well-formed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_optshift.errors import InputError, closest
from onnx_optshift.graph.bodies import flattened, graphs
from onnx_optshift.graph.external import locate, payload
from onnx_optshift.graph.scopes import Scopes
from onnx_optshift.graph.tensors import all_tensors, inline_array, is_external, owned_tensors, stored_dtype

_logger = logging.getLogger(__name__)

# Runtimes accept more than the checker: their own operators, also in the default domain, domains that the model forgot
# to import, and inputs of unknown rank. Whether those run is for the runtime to say.
_LEFT_TO_THE_RUNTIME = (
    "No Op registered for",
    "No opset import for domain",
    "Field 'shape' of 'type' is required but missing",
    "Field 'name' of 'graph' is required to be non-empty",
)


@dataclass(frozen=True)
class TensorSpec:
    """An input of a model."""

    name: str
    dtype: np.dtype[np.generic] | None  # of its elements; None for inputs that are no tensors
    shape: tuple[int | str | None, ...] | None  # a number, a symbol or None (unknown) per axis; None: unknown rank


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A checked model. External tensors stay in their files."""

    path: Path | None  # the file it came from; None for a model given as an object
    proto: onnx.ModelProto  # never changed
    folder: Path | None  # where external data is looked for; None for a model given as an object
    sha256: str  # of the file, or of the serialized object
    size: int  # bytes of the file, or of the serialized object, and of external tensors

    @classmethod
    def load(cls, source: str | Path | onnx.ModelProto) -> ModelFile:
        """Reads and checks a model: a path, or an object with its data inside, which must not be changed afterwards.

        Raises:
            InputError: It cannot be read, is not ONNX, is damaged, too new, or its external data is not in place.
        """
        if isinstance(source, onnx.ModelProto):
            path, folder, proto = None, None, source
            advice = "Above 2 GiB, save it with external data and give its path"
            with _refusing("the model object: cannot be serialized", advice):
                data = bytes(proto.SerializeToString())
        else:
            path = Path(source)
            folder, data, proto = path.parent, _read(path), onnx.ModelProto()
            with _refusing(f"{path}: not an ONNX model, or cut short", "Give a complete .onnx file"):
                proto.ParseFromString(data)
        external = [locate(tensor, folder).length for tensor in all_tensors(proto) if is_external(tensor)]
        model = cls(path, proto, folder, hashlib.sha256(data).hexdigest(), len(data) + sum(external))
        model._check_header()
        # By path when there is external data: the checker then finds it, and no second copy of the file is made.
        model._check(str(path) if external else data)
        model._check_names()
        _ = model.scopes  # a graph that cannot be read is an error of the file
        return model

    @property
    def where(self) -> str:
        """What to call this model in a message: its path, or `the model object`."""
        return str(self.path) if self.path is not None else "the model object"

    @property
    def opset(self) -> int:
        """Version of the standard operators; 0 when the model imports none of them."""
        if self.ir_version < 3:
            return 1  # before opset imports existed
        return max((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    @property
    def ir_version(self) -> int:
        """Version of the file format."""
        return self.proto.ir_version

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs that must be fed: those without a default value (which would be an initializer of the same name)."""
        graph = self.proto.graph
        defaults = {tensor.name for tensor in graph.initializer}
        defaults |= {tensor.values.name for tensor in graph.sparse_initializer}
        return tuple(_spec(value) for value in graph.input if value.name not in defaults)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs."""
        return tuple(value.name for value in self.proto.graph.output)

    @cached_property
    def tensors(self) -> dict[str, onnx.TensorProto]:
        """Initializers, and values of Constant nodes by output name, of the main graph and of bodies."""
        return owned_tensors(self.proto)

    @cached_property
    def flat(self) -> onnx.ModelProto:
        """The model to look for weights in: no functions, and no two values of one name. Often `proto` itself."""
        return flattened(self.proto)

    @cached_property
    def scopes(self) -> Scopes:
        """Producers and readers of every value of `flat`, and what runs where. Read only: it is never exported.

        Raises:
            InputError: The graph cannot be built.
        """
        # graphsurgeon prints to the terminal by itself.
        severity, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.CRITICAL + 1
        try:
            with _refusing(f"{self.where}: the graph cannot be read", "Export the model again"):
                return Scopes(gs.import_onnx(self.flat))
        finally:
            G_LOGGER.severity = severity

    @property
    def data_files(self) -> set[Path]:
        """Files beside the model that hold its external tensors."""
        return {locate(tensor, self.folder).path for tensor in all_tensors(self.proto) if is_external(tensor)}

    def nodes(self, operator: str) -> Iterator[onnx.NodeProto]:
        """Nodes of an operator, `MatMul` or `domain:Name`, in all graphs and functions."""
        domain, _, kind = operator.rpartition(":")
        for part in (*graphs(self.proto.graph), *self.proto.functions):
            yield from (node for node in part.node if (node.domain, node.op_type) == (domain, kind))

    def tensor(self, name: str) -> onnx.TensorProto:
        """One of `tensors`.

        Raises:
            InputError: There is no such tensor.
        """
        if name not in self.tensors:
            raise InputError(f"{self.where}: no initializer {name!r}.{closest(name, list(self.tensors))}")
        return self.tensors[name]

    def initializer(self, name: str) -> NDArray[np.generic]:
        """One of `tensors` in its own dtype (bfloat16 as ml_dtypes' type) and shape; external ones mapped, not loaded.

        Raises InputError where there is no such tensor, or its data is damaged.
        """
        tensor = self.tensor(name)
        if not is_external(tensor):
            return inline_array(tensor)
        return payload(tensor, self.folder).view(stored_dtype(tensor)).reshape(tuple(tensor.dims))

    def _check_header(self) -> None:
        if not self.proto.HasField("graph"):
            raise InputError(f"{self.where}: not an ONNX model: it has no graph. Give a complete model.")
        newest = {"IR version": int(onnx.IR_VERSION), "opset": onnx.defs.onnx_opset_version()}
        for what, version in (("IR version", self.ir_version), ("opset", self.opset)):
            if version > newest[what]:
                raise InputError(
                    f"{self.where}: {what} {version} is newer than {newest[what]}, the newest that onnx "
                    f"{onnx.__version__} supports. Update onnx, or export the model with an older version."
                )

    def _check(self, content: bytes | str) -> None:
        if isinstance(content, bytes) and not self.proto.graph.name:
            # The checker asks for a name of the graph, which no runtime does. Protobuf reads this as one message.
            content += onnx.ModelProto(graph=onnx.GraphProto(name="unnamed")).SerializeToString()
        with _refusing(f"{self.where}: the ONNX checker refuses the model", "Export the model again"):
            try:
                onnx.checker.check_model(content)
            except Exception as error:
                if not any(known in str(error) for known in _LEFT_TO_THE_RUNTIME):
                    raise
                _logger.info("%s: left to the runtime: %s", self.where, _short(error))

    def _check_names(self) -> None:
        main = list(graphs(self.proto.graph))
        names = [value.name for graph in main for value in (*graph.input, *graph.output, *graph.initializer)]
        for node in (node for part in (*main, *self.proto.functions) for node in part.node):
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        # Protobuf hands out bytes for what is not UTF-8.
        wrong = next((name for name in names if not isinstance(name, str)), None)
        if wrong is not None:
            raise InputError(
                f"{self.where}: the name {wrong!r} is not UTF-8 text. The file is damaged; export it again."
            )


@contextmanager
def _refusing(what: str, advice: str) -> Iterator[None]:
    # Makes one InputError of whatever goes wrong inside.
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {_short(error)}. {advice}.") from error


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: a pipe or a device, and a model is read several times. Save it as a file.")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason.lower()}. Give the path of an ONNX model.") from error
    if not data:
        raise InputError(f"{path}: the file is empty. Give the path of an ONNX model.")
    return data


def _short(error: Exception) -> str:
    """The first lines of a message: protobuf and the checker append whole nodes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300].rstrip(".") or type(error).__name__


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type  # an empty one for what is no tensor
    known = tensor.elem_type in onnx.helper.get_all_tensor_dtypes()
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else None
    dims = (dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(dims) if tensor.HasField("shape") else None)
