"""Bodies of If, Loop and Scan, and model-local functions, made as readable as the main graph.

Two branches may use one name for different values, and a function's body is written once for many calls. In the copy
that `flattened` makes every value has a name of its own, and functions are inlined into their calls: there a name says
which value is meant, wherever it lies. `expose` then hands values out of their bodies.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Final

import onnx
from onnx import inliner

from onnx_optshift.geometry import Inside

_logger = logging.getLogger(__name__)

# Operators that run a body again and again and stack what it hands out.
LOOPS: Final = frozenset({"Loop", "Scan"})
# Nodes that can hand out values of their bodies, since this opset: before, a Scan had a batch axis of its own.
HANDING_OUT: Final = {"If": 1, "Loop": 1, "Scan": 9}


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a node, in the order of its attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all bodies within, each before those inside it."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs(body)


def unique_names(main: onnx.GraphProto) -> list[dict[str, str]]:
    """For each graph of `graphs`, the model-wide names of the values that it defines, by their names there.

    A name stays where no other graph uses it, and in the main graph; else it gets a number: `NAME#1`.
    """
    defined = [_defined(graph) for graph in graphs(main)]
    counts = Counter(name for names in defined for name in names)
    taken = set(counts)
    result = [{name: name for name in defined[0]}]
    numbers: Counter[str] = Counter()
    for names in defined[1:]:
        unique: dict[str, str] = {}
        for name in names:
            unique[name] = name
            while counts[name] > 1 and unique[name] in taken:
                numbers[name] += 1
                unique[name] = f"{name}#{numbers[name]}"
            taken.add(unique[name])
        result.append(unique)
    return result


def flattened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with functions inlined and no two values of one name; the model itself where nothing stands in the way.

    Initializers and outputs of Constant nodes have the names of `tensors.owned_tensors`. A function that cannot be
    inlined stays. The given model is never changed.
    """
    names = unique_names(proto.graph)
    renamed = any(old != new for scope in names for old, new in scope.items())
    if not renamed and not proto.functions:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if renamed:
        rename(copy.graph, iter(names), {})
    if not copy.functions:
        return copy
    try:
        inlined = inliner.inline_local_functions(copy)
    except Exception as error:
        _logger.info("functions are not inlined: %s", error)
        return copy
    # What was inlined must not have taken a name that another value has: names say which tensor is meant.
    kept = all(old == new for scope in unique_names(inlined.graph) for old, new in scope.items())
    return inlined if kept else copy


def expose(main: onnx.GraphProto, wanted: Mapping[str, Inside]) -> None:
    """Hands values of bodies out as values of the main graph of a flattened model, in place, under these names.

    Iterations of a Loop or Scan are stacked along a new first axis. A branch of an If that is not taken brings an
    empty tensor `[0]`.
    """
    tops = {inside.value: name for name, inside in wanted.items()}
    element_types = {inside.value: inside.element_type for inside in wanted.values()}
    numbers = count(1)

    def fresh(value: str) -> str:
        return f"{tops[value]}@{next(numbers)}"

    def nothing(body: onnx.GraphProto, value: str) -> str:
        """What the other branch of an If hands out: no rows, of the same element type."""
        empty = onnx.TensorProto(data_type=element_types[value], dims=[0], raw_data=b"")
        body.node.append(onnx.helper.make_node("Constant", [], [fresh(value)], value=empty))
        return str(body.node[-1].output[0])

    def into(graph: onnx.GraphProto) -> dict[str, str]:
        """Adds outputs to bodies and to the nodes that own them; gives the names that wanted values now have here."""
        here: dict[str, str] = {}
        for node in graph.node:
            found = [into(body) for body in bodies(node)]
            every = list(dict.fromkeys(value for values in found for value in values))
            if not every:
                continue
            for body, values in zip(bodies(node), found, strict=True):
                body_outputs = [values.get(value) or nothing(body, value) for value in every]
                body.output.extend(onnx.ValueInfoProto(name=name) for name in body_outputs)
            # Trailing outputs may be left out of a node, but not of its body.
            missing = len(next(bodies(node)).output) - len(every) - len(node.output) - (node.op_type == "Loop")
            node.output.extend([""] * missing)
            here |= {value: tops[value] if graph is main else fresh(value) for value in every}
            node.output.extend(here[value] for value in every)
            for attribute in node.attribute:
                if attribute.name in ("scan_output_axes", "scan_output_directions"):
                    attribute.ints.extend([0] * len(every))
        for value in [value for value in _defined(graph) if value in tops and graph is not main]:
            # A copy: the value may be an input of the body, or among its outputs already.
            here[value] = fresh(value)
            graph.node.add(op_type="Identity", input=[value], output=[here[value]])
        return here

    into(main)


def _defined(graph: onnx.GraphProto) -> list[str]:
    """Values that a graph gets, computes or holds."""
    names = [value.name for value in graph.input] + [name for node in graph.node for name in node.output if name]
    names += [tensor.name for tensor in graph.initializer] + [part.values.name for part in graph.sparse_initializer]
    return list(dict.fromkeys(names))


def rename(graph: onnx.GraphProto, scopes: Iterator[Mapping[str, str]], outer: Mapping[str, str]) -> None:
    """Renames values in place: those that a graph and its bodies define, scope by scope, and those from outside."""
    names = {**outer, **next(scopes)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = names.get(tensor.name, tensor.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
    for node in graph.node:
        rename_node(node, scopes, names)


def rename_node(node: onnx.NodeProto, scopes: Iterator[Mapping[str, str]], names: Mapping[str, str]) -> None:
    """The same for one node."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for body in bodies(node):
        rename(body, scopes, names)
