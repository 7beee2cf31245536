"""In-memory copies of a model that expose what is inside: values as outputs, weights as inputs. Never a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx

from onnx_optshift.errors import InputError, closest
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.tensors import constant_value

# Since this IR version an initializer that is a graph input too is a default value; before, it is a constant.
_OVERRIDABLE_SINCE: Final = 4


def probe_model(model: ModelFile, values: Sequence[str], overridable: Sequence[str] = ()) -> bytes:
    """A serialized copy of the model with more outputs and with weights that can be fed.

    External tensors stay references: the runtime must be told the model's folder.

    Args:
        model: The model.
        values: Values of the main graph to expose as outputs, after the model's own. Those that are outputs already
            are not added again, and graph inputs are left out: their values are in the feeds.
        overridable: Initializers, or outputs of Constant nodes, to turn into inputs with a default value.

    Returns:
        The bytes of the copy.

    Raises:
        InputError: A name is unknown, or the copy exceeds what protobuf can serialize.
    """
    graph = model.proto.graph
    known = {value.name for value in graph.input} | {value.name for value in graph.output}
    computed = {output for node in graph.node for output in node.output}
    extra = onnx.ModelProto()
    for name in dict.fromkeys(values):
        if name in known:
            continue
        if name not in computed:
            raise InputError(f"{model.where}: no value {name!r} in the main graph.{closest(name, sorted(computed))}")
        extra.graph.output.add(name=name)  # without a type: the runtime infers it
    inputs = {value.name for value in graph.input}
    for name in dict.fromkeys(overridable):
        tensor = model.tensors.get(name)
        if tensor is None:
            raise InputError(f"{model.where}: no initializer {name!r}.{closest(name, list(model.tensors))}")
        if name not in inputs:
            extra.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    try:
        # Protobuf reads a message followed by another as their merge: lists are appended. So the additions are
        # appended as bytes, and a model of gigabytes is not copied first.
        return bytes(_base(model, overridable).SerializeToString() + extra.SerializeToString())
    except (ValueError, MemoryError) as error:
        raise InputError(
            f"{model.where}: cannot be serialized in memory ({error}). Save the model with external data."
        ) from error


def _base(model: ModelFile, overridable: Sequence[str]) -> onnx.ModelProto:
    """The model itself, or a copy where its structure stands in the way of overriding."""
    initializers = {tensor.name for tensor in model.proto.graph.initializer}
    constants = [name for name in dict.fromkeys(overridable) if name not in initializers]
    too_old = model.ir_version < _OVERRIDABLE_SINCE and bool(overridable)
    if not constants and not too_old:
        return model.proto
    base = onnx.ModelProto()
    base.CopyFrom(model.proto)
    for node in [node for node in base.graph.node if constant_value(node) is not None]:
        if node.output[0] in constants:
            tensor = base.graph.initializer.add()
            tensor.CopyFrom(constant_value(node))
            tensor.name = node.output[0]
            base.graph.node.remove(node)
    if too_old:
        # Old models list every initializer as an input. Only those asked for stay there: the others would become
        # overridable too, and the runtime could no longer fold them.
        base.ir_version = _OVERRIDABLE_SINCE
        inputs = [v for v in base.graph.input if v.name not in initializers or v.name in overridable]
        del base.graph.input[:]
        base.graph.input.extend(inputs)
    return base
