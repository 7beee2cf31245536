"""In-memory copies of a model that stay on one smooth piece: kinks decide as they did at the centre. Never a result.

A network with ReLUs is smooth only piece by piece. Automatic differentiation knows the piece that the weights lie on;
a finite difference steps over its edges, and trained weights lie on edges (measured: on a 3-layer MLP the second
differences give 4 times the trace that automatic differentiation gives, on one that fits wrong labels 500 times).
Here every node behind a weight is there twice: once for the weights of the centre, and once for weights that move,
whose kinks take their decisions from the first. The derivatives at the centre are those of the original, and second
differences are smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import onnx
from onnx import NodeProto, helper

from onnx_optshift.graph.bodies import bodies
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model

CENTER: Final = "@center"


def smooth_piece_model(model: ModelFile, weights: Sequence[str]) -> bytes:
    """A serialized copy of the model in which weights move while kinks stay as they are at the centre.

    The centre's weights must be fed too, under their names followed by `CENTER`. Frozen are Relu, LeakyRelu, PRelu,
    Abs, Clip, MaxPool and GlobalMaxPool, and Max and Min of two; other kinks, and those inside subgraphs and functions,
    are left as they are. `weights` are names in `model.tensors`.

    Raises:
        InputError: A name is unknown, or the copy exceeds what protobuf can serialize.
    """
    copy = onnx.ModelProto.FromString(probe_model(model, (), weights))
    graph = copy.graph
    for name in weights:
        tensor = model.tensors[name]
        graph.input.append(helper.make_tensor_value_info(name + CENTER, tensor.data_type, list(tensor.dims)))
    twice = {name: name + CENTER for name in weights}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not any(name in twice for name in _read_by(node)):
            nodes.append(node)  # no weight in question lies before it
            continue
        twice |= {name: name + CENTER for name in node.output if name}
        center = _renamed(node, twice)
        nodes.append(center)
        replace = _KINKS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        nodes += (replace(node, center) if replace else None) or [node]
    nodes = [_copied(node) for node in nodes]  # clearing the field would take its messages along
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(copy.SerializeToString())


def _read_by(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, also those that its subgraphs take from outside."""
    yield from node.input
    for graph in bodies(node):
        for inner in graph.node:
            yield from _read_by(inner)
        yield from (value.name for value in graph.output)


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy that reads and computes the values of other names, inside its subgraphs too."""
    copy = _copied(node)
    copy.name = node.name and node.name + CENTER
    _rename(copy, names)
    copy.output[:] = [names.get(name, name) for name in copy.output]
    return copy


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    for graph in bodies(node):
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = names.get(value.name, value.name)


# A replacement gets the node and its copy at the centre (to which it may add outputs), and gives nodes that compute
# the node's output without its kink; nothing where it cannot.
_Replacement = Callable[[NodeProto, NodeProto], "list[NodeProto]"]


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: int) -> NodeProto:
    node: NodeProto = helper.make_node(op_type, list(inputs), [output])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def _homogeneous(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """f(x) = s x, with s = sign(x₀) f(sign(x₀)): Relu, LeakyRelu, PRelu, Abs."""
    y, x, x0 = node.output[0], node.input[0], center.input[0]
    slope_at_sign = _copied(node)
    slope_at_sign.name = ""
    slope_at_sign.input[0] = f"{y}@sign"
    slope_at_sign.output[0] = f"{y}@at_sign"
    return [
        _node("Sign", [x0], f"{y}@sign"),
        slope_at_sign,
        _node("Mul", [f"{y}@sign", f"{y}@at_sign"], f"{y}@slope"),
        _node("Mul", [x, f"{y}@slope"], y),
    ]


def _clip(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """f(x) = f(x₀) where that differs from x₀, and x elsewhere. In old opsets Equal takes no floats, but Less does."""
    y, x, x0, y0 = node.output[0], node.input[0], center.input[0], center.output[0]
    return [
        _node("Less", [y0, x0], f"{y}@above"),
        _node("Less", [x0, y0], f"{y}@below"),
        _node("Or", [f"{y}@above", f"{y}@below"], f"{y}@outside"),
        _node("Where", [f"{y}@outside", y0, x], y),
    ]


def _max_pool(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """The elements that were the largest at the centre, by their numbers in the flattened input."""
    y, x = node.output[0], node.input[0]
    if len(node.output) > 1:
        return []
    center.output.append(f"{y}@indices")
    shape = helper.make_tensor(f"{y}@flat_shape", onnx.TensorProto.INT64, [1], [-1])
    return [
        helper.make_node("Constant", [], [f"{y}@flat_shape"], value=shape),
        _node("Reshape", [x, f"{y}@flat_shape"], f"{y}@flat"),
        _node("Gather", [f"{y}@flat", f"{y}@indices"], y, axis=0),
    ]


def _global_max_pool(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """Per channel the element that was the largest at the centre."""
    y, x, x0, y0 = node.output[0], node.input[0], center.input[0], center.output[0]
    shape = helper.make_tensor(f"{y}@flat_shape", onnx.TensorProto.INT64, [3], [0, 0, -1])
    return [
        helper.make_node("Constant", [], [f"{y}@flat_shape"], value=shape),
        _node("Reshape", [x0, f"{y}@flat_shape"], f"{y}@flat_center"),
        _node("ArgMax", [f"{y}@flat_center"], f"{y}@indices", axis=2, keepdims=1),
        _node("Reshape", [x, f"{y}@flat_shape"], f"{y}@flat"),
        _node("GatherElements", [f"{y}@flat", f"{y}@indices"], f"{y}@picked", axis=2),
        _node("Shape", [y0], f"{y}@shape"),
        _node("Reshape", [f"{y}@picked", f"{y}@shape"], y),
    ]


def _larger(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """Of two, the one that was taken at the centre: Max and Min."""
    if len(node.input) != 2:
        return []
    y = node.output[0]
    comparison = "Greater" if node.op_type == "Max" else "Less"
    return [
        _node(comparison, center.input, f"{y}@first"),
        _node("Where", [f"{y}@first", *node.input], y),
    ]


_KINKS: Final[Mapping[str, _Replacement]] = {
    "Relu": _homogeneous,
    "LeakyRelu": _homogeneous,
    "PRelu": _homogeneous,
    "Abs": _homogeneous,
    "Clip": _clip,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _global_max_pool,
    "Max": _larger,
    "Min": _larger,
}
