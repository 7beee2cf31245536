"""In-memory copies of a model that expose what is inside: values as outputs, weights as inputs. Never a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import onnx

from onnx_optshift.errors import InputError, closest
from onnx_optshift.geometry import Inside, Tap
from onnx_optshift.graph.bodies import expose, graphs
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.tensors import constant_value

# Since this IR version an initializer that is a graph input too is a default value; before, it is a constant.
_OVERRIDABLE_SINCE: Final = 4


def probe_model(model: ModelFile, values: Sequence[str | Tap], overridable: Sequence[str] = ()) -> bytes:
    """A serialized copy of the model with more outputs and with weights that can be fed.

    External tensors stay references: the runtime must be told the model's folder.

    Args:
        model: The model.
        values: Values of the main graph, or taps anywhere, to expose as outputs after the model's own. Those that are
            outputs already are not added again, and graph inputs are left out: their values are in the feeds.
        overridable: Names in `model.tensors` to turn into inputs with a default value.

    Raises:
        InputError: A name is unknown, or the copy exceeds what protobuf can serialize.
    """
    graph = model.flat.graph
    known = {value.name for value in graph.input} | {value.name for value in graph.output}
    inside = {tap.value: tap.inside for tap in values if isinstance(tap, Tap) and tap.inside is not None}
    computed = {output for node in graph.node for output in node.output} | inside.keys()
    extra = onnx.ModelProto()
    for name in dict.fromkeys(tap.value if isinstance(tap, Tap) else tap for tap in values):
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
        return bytes(_base(model, inside, overridable).SerializeToString() + extra.SerializeToString())
    except (ValueError, MemoryError) as error:
        raise InputError(
            f"{model.where}: cannot be serialized in memory ({error}). Save the model with external data."
        ) from error


def _base(model: ModelFile, inside: Mapping[str, Inside], overridable: Sequence[str]) -> onnx.ModelProto:
    """The model itself, or a copy where its structure stands in the way."""
    original = model.flat
    initializers = {tensor.name for tensor in original.graph.initializer}
    constants = [name for name in dict.fromkeys(overridable) if name not in initializers]
    too_old = model.ir_version < _OVERRIDABLE_SINCE and bool(overridable)
    if not constants and not too_old and not inside:
        return original
    base = onnx.ModelProto()
    base.CopyFrom(original)
    expose(base.graph, inside)
    for graph in graphs(base.graph):
        _hoist(graph, frozenset(constants), base.graph)
    if too_old:
        # Old models list every initializer as an input. Only those asked for stay there: the others would become
        # overridable too, and the runtime could no longer fold them.
        base.ir_version = _OVERRIDABLE_SINCE
        inputs = [v for v in base.graph.input if v.name not in initializers or v.name in overridable]
        del base.graph.input[:]
        base.graph.input.extend(inputs)
    return base


def _hoist(graph: onnx.GraphProto, names: frozenset[str], main: onnx.GraphProto) -> None:
    """Makes constants initializers of the main graph: a body reads what lies around it, and only those can be fed."""
    for node in [node for node in graph.node if constant_value(node) is not None and node.output[0] in names]:
        tensor = main.initializer.add()
        tensor.CopyFrom(constant_value(node))
        tensor.name = node.output[0]
        graph.node.remove(node)
    if graph is main:
        return
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        main.initializer.add().CopyFrom(tensor)
        graph.initializer.remove(tensor)
