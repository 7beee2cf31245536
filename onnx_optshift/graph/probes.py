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

    `values`, of the main graph or taps anywhere, become outputs after the model's own; those that are outputs already
    are not added again, and graph inputs are left out: their values are in the feeds. `overridable` are names in
    `model.tensors`; they become inputs with a default value. External tensors stay references: the runtime must be
    told the model's folder.

    Raises:
        InputError: A name is unknown, or the copy exceeds what protobuf can serialize.
    """
    graph = model.flat.graph
    inputs = {value.name for value in graph.input}
    known = inputs | {value.name for value in graph.output}
    inside = {tap.value: tap.inside for tap in values if isinstance(tap, Tap) and tap.inside is not None}
    computed = {output for node in graph.node for output in node.output} | inside.keys()
    wanted = [tap.value if isinstance(tap, Tap) else tap for tap in values]
    constants = [name for name in wanted if name in model.tensors and name not in computed]
    extra = onnx.ModelProto()
    for name in dict.fromkeys(wanted):
        if name in known:
            continue
        if name not in computed and name not in constants:
            raise InputError(f"{model.where}: no value {name!r} in the main graph.{closest(name, sorted(computed))}")
        extra.graph.output.add(name=name)  # without a type: the runtime infers it
    for name in dict.fromkeys(overridable):
        tensor = model.tensor(name)
        if name not in inputs:
            extra.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    try:
        # Protobuf reads a message followed by another as their merge: lists are appended. So the additions are
        # appended as bytes, and a model of gigabytes is not copied first.
        return bytes(_base(model, inside, [*overridable, *constants]).SerializeToString() + extra.SerializeToString())
    except (ValueError, MemoryError) as error:
        raise InputError(
            f"{model.where}: cannot be serialized in memory ({error}). Save the model with external data."
        ) from error


def _base(model: ModelFile, inside: Mapping[str, Inside], overridable: Sequence[str]) -> onnx.ModelProto:
    """The model itself, or a copy where its structure stands in the way."""
    original = model.flat
    initializers = {tensor.name for tensor in original.graph.initializer}
    constants = set(overridable) - initializers
    too_old = model.ir_version < _OVERRIDABLE_SINCE and bool(overridable)
    if not constants and not too_old and not inside:
        return original
    base = onnx.ModelProto()
    base.CopyFrom(original)
    main = base.graph
    expose(main, inside)
    # Constants become initializers of the main graph: a body reads what lies around it, and only those can be fed.
    for graph in graphs(main):
        for node in [node for node in graph.node if constant_value(node) is not None and node.output[0] in constants]:
            main.initializer.append(constant_value(node))
            main.initializer[-1].name = node.output[0]
            graph.node.remove(node)
        for tensor in [tensor for tensor in graph.initializer if graph is not main and tensor.name in constants]:
            main.initializer.append(tensor)
            graph.initializer.remove(tensor)
    if too_old:
        # Old models list every initializer as an input. Only those asked for stay there: the others would become
        # overridable too, and the runtime could no longer fold them.
        base.ir_version = _OVERRIDABLE_SINCE
        for value in [value for value in main.input if value.name in initializers and value.name not in overridable]:
            main.input.remove(value)
    return base
