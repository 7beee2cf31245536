"""In-memory copies of a model that stay on one smooth piece: kinks decide as they did at the centre. Never a result.

A network with ReLUs is smooth only piece by piece. Automatic differentiation knows the piece that the weights lie on;
a finite difference steps over its edges, and trained weights lie on edges (measured: on a 3-layer MLP the second
differences give 4 times the trace that automatic differentiation gives, on one that fits wrong labels 500 times).
Here every node behind a weight is there twice: once for the weights of the centre, and once for weights that move,
whose kinks take their decisions from the first. The derivatives at the centre are those of the original, and second
differences are smooth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Final

import onnx
from onnx import NodeProto, helper

from onnx_optshift.graph.bodies import bodies, graphs, rename_node
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model

CENTER: Final = "@center"

_SLOPE = "sign = Sign(x0)  at_sign = Same(sign)  slope = Mul(sign, at_sign)  y = Mul(x, slope)"
# Nodes that compute the output y of a node without its kink, from its inputs x and z, from those of its copy at the
# centre, x0 and z0, and from what that computes, y0 (and indices). `Same` is the node itself.
_KINKS: Final[Mapping[str, str]] = {
    # f(x) = s x, with s = sign(x₀) f(sign(x₀)).
    "Relu": _SLOPE,
    "LeakyRelu": _SLOPE,
    "PRelu": _SLOPE,
    "Abs": _SLOPE,
    # f(x) = f(x₀) where that differs from x₀, and x elsewhere. In old opsets Equal takes no floats, but Less does.
    "Clip": "above = Less(y0, x0)  below = Less(x0, y0)  outside = Or(above, below)  y = Where(outside, y0, x)",
    # The elements that were the largest at the centre, by their numbers in the flattened input.
    "MaxPool": """flat_shape = Constant<value = int64[1] {-1}>()
        flat = Reshape(x, flat_shape)  y = Gather<axis = 0>(flat, indices)""",
    # Per channel the element that was the largest at the centre.
    "GlobalMaxPool": """flat_shape = Constant<value = int64[3] {0, 0, -1}>()
        flat_center = Reshape(x0, flat_shape)  number = ArgMax<axis = 2, keepdims = 1>(flat_center)
        flat = Reshape(x, flat_shape)  picked = GatherElements<axis = 2>(flat, number)
        shape = Shape(y0)  y = Reshape(picked, shape)""",
    # Of two, the one that was taken at the centre.
    "Max": "first = Greater(x0, z0)  y = Where(first, x, z)",
    "Min": "first = Less(x0, z0)  y = Where(first, x, z)",
}


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
        center = _copied(node)
        center.name = node.name and node.name + CENTER
        rename_node(center, repeat({}), twice)
        nodes += [center, *_without_kink(node, center)]
    nodes = [_copied(node) for node in nodes]  # clearing the field would take its messages along
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(copy.SerializeToString())


def _read_by(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, also those that its subgraphs take from outside."""
    yield from node.input
    for graph in (graph for body in bodies(node) for graph in graphs(body)):
        yield from (name for inner in graph.node for name in inner.input)
        yield from (value.name for value in graph.output)


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _without_kink(node: NodeProto, center: NodeProto) -> list[NodeProto]:
    """Nodes that compute the node's output without its kink, or the node; its copy at the centre may get outputs."""
    text = _KINKS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    whole = len(node.output) == 1 and (node.op_type not in {"Max", "Min"} or len(node.input) == 2)
    if text is None or not whole:
        return [node]
    y = node.output[0]
    known = {"y": y, "y0": center.output[0], **dict(zip("xz", node.input, strict=False))}
    known |= dict(zip(("x0", "z0"), center.input, strict=False))
    if node.op_type == "MaxPool":
        center.output.append(f"{y}@indices")
    nodes: list[NodeProto] = []
    for part in onnx.parser.parse_graph(f"kink () => () {{ {text} }}").node:
        inputs, outputs = ([known.get(name, f"{y}@{name}") for name in names] for names in (part.input, part.output))
        if part.op_type == "Same":
            part.CopyFrom(node)
            part.name = ""
            inputs += node.input[1:]
        part.input[:], part.output[:] = inputs, outputs
        nodes.append(part)
    return nodes
