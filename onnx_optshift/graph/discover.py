"""From a graph to its weights: every constant that a linear layer multiplies with, followed to ALL its readers.

A weight may move only if everything that reads it is understood: each reader a linear layer whose activation can be
captured, all of them seeing the same matrix. One reader more (an embedding lookup, a body of an If, an output of the
graph) and the weight is left as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import onnx
import onnx_graphsurgeon as gs

from onnx_optshift.geometry import Inside, WeightForm
from onnx_optshift.graph.bodies import HANDING_OUT, LOOPS
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.operators import QUANTIZED, operator_of
from onnx_optshift.graph.passthrough import QUANTIZATION, constant_integers, passed_through
from onnx_optshift.graph.scopes import place
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.tensors import FLOAT_TYPES, type_name
from onnx_optshift.graph.weights import Match, Skip, Weight, attribute

# They read a tensor's dims, which a shift keeps.
_SHAPE_ONLY: Final = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class _State:
    """A constant on its way to its readers."""

    form: WeightForm
    quantized: bool
    element_type: int  # as it arrives, behind casts


@dataclass(frozen=True)
class _Reading:
    """One place where a constant arrives: a node's operand, or (without a node) something else that reads it."""

    reader: str
    node: gs.Node | None
    operand: int
    state: _State


def discover(model: ModelFile, selection: Selection) -> tuple[list[Weight], list[Skip]]:
    """Finds all weights of a model.

    Returns:
        The weights to solve for, and the linear layers left alone with the reasons, both in the order of the graph;
        those that could be solved for but are not selected (`Skip.unselected`) come last. A node that multiplies two
        computed values has no weight, and is in neither list: both are empty for a model without linear layers.

    Raises:
        InputError: A pattern fits nothing, or the graph is malformed.
    """
    finder = _Finder(model)
    found = sorted([*finder.named(), *finder.unnamed()], key=lambda entry: entry[0])
    weights = [entry for _, entry in found if isinstance(entry, Weight)]
    skips = [entry for _, entry in found if isinstance(entry, Skip)]
    return selection.apply(weights, skips)


class _Finder:
    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._scopes = model.scopes
        self._values = self._scopes.values()
        # Those of sparse tensors cannot be handed out, nor what may be fed but is not.
        self._capturable = model.tensors.keys() - {value.name for value in model.flat.graph.input}
        self._integers = partial(constant_integers, model.tensors)
        self._position = {id(node): index for index, node in enumerate(self._scopes.nodes)}
        self._reached: set[tuple[int, int]] = set()  # (id of a linear node, operand)

    def named(self) -> Iterator[tuple[int, Weight | Skip]]:
        """Every constant that a linear layer multiplies with, and where the first such layer is."""
        for name, tensor in self._model.tensors.items():
            value, shape = self._values.get(name), tuple(tensor.dims)
            if value is None or any(dim < 0 for dim in shape):
                continue
            readings = list(self._readings(value, _State(WeightForm(shape), False, tensor.data_type)))
            layers = [(r.node, r.operand) for r in readings if r.node and self._multiplies(r.node, r.operand)]
            if not layers:
                continue
            self._reached |= {(id(node), operand) for node, operand in layers}
            position = min(self._position[id(node)] for node, _ in layers)
            first, _ = layers[0]
            match = self._judge(tensor, readings, first)
            if isinstance(match, str):
                yield position, Skip(name, str(first.name), first.op, match)
            else:
                yield position, Weight(name, type_name(tensor), shape, match.form, match.uses)

    def unnamed(self) -> Iterator[tuple[int, Skip]]:
        """Linear layers whose weight is constant, but no tensor that can be patched. Comes after `named`."""
        for node in self._scopes.nodes:
            operator = operator_of(node)
            for operand in operator.operands if operator else ():
                if (id(node), operand) in self._reached or not self._multiplies(node, operand):
                    continue
                value = node.inputs[operand] if operand < len(node.inputs) else None
                if value is not None and value.name and self._scopes.is_constant(value):
                    name = None if value.inputs else str(value.name)
                    skip = Skip(name, str(node.name), node.op, self._why_unnamed(node, value))
                    yield self._position[id(node)], skip

    def _why_unnamed(self, node: gs.Node, value: gs.Tensor) -> str:
        producer = value.inputs[0] if value.inputs else None
        if self._scopes.in_function(node):
            return f"inside {place(self._scopes.owners(node))}, which cannot be inlined"
        if producer is None or (producer.op == "Constant" and not producer.attrs):
            return "its weight is stored sparse"
        if producer.op != "Constant":
            by = f"{producer.op} node {producer.name!r}"
            return f"its weight is computed from constants by {by}; fold constants first"
        if "value" in producer.attrs:
            return "its weight is a constant inside a function, which has it for all its calls"
        return f"its weight is a list of numbers in Constant node {producer.name!r}, no tensor"

    def _judge(self, tensor: onnx.TensorProto, readings: Sequence[_Reading], first: gs.Node) -> Match | str:
        """The one form and all uses of a constant, or why it must stay."""
        operator = operator_of(first)
        floating = tensor.data_type in FLOAT_TYPES
        by_operator = operator is not None and operator.reason == QUANTIZED and not floating
        if by_operator or any(reading.state.quantized for reading in readings):
            return f"{QUANTIZED} ({type_name(tensor)})"
        if not floating:
            return f"its type is {type_name(tensor)}, not a floating type"
        if 0 in tensor.dims:
            return f"its shape {list(tensor.dims)} is empty"
        matches: list[Match] = []
        for reading in readings:
            match = self._match(reading)
            if isinstance(match, str):
                return match
            matches.append(match)
        form, one = matches[0].form, matches[0].uses[0]
        other = next((match.uses[0] for match in matches if match.form != form), None)
        if other is not None:
            return (
                f"{one.op_type} node {one.node!r} and {other.op_type} node {other.node!r} read it as different matrices"
            )
        return Match(tuple(use for match in matches for use in match.uses), form)

    def _match(self, reading: _Reading) -> Match | str:
        """The match of one reading, its inputs with their places, or why there is none."""
        node = reading.node
        operator = operator_of(node) if node and self._multiplies(node, reading.operand) else None
        if operator is None:
            return f"also read by {reading.reader}"
        match = operator.matcher(node, reading.operand, reading.state.form) if operator.matcher else operator.reason
        if isinstance(match, str):
            return match
        around = self._scopes.owners(node)
        if self._scopes.in_function(node):
            return f"inside {place(around)}, which cannot be inlined"
        uses = []
        for use in match.uses:
            tap, value = use.tap, self._values[use.tap.value]
            owners = self._scopes.owners(value)
            if isinstance(value, gs.Constant) and value.name not in self._capturable:
                return f"the constant {value.name!r} that it meets cannot be captured"
            for owner in owners:
                if owner.domain or owner.op not in HANDING_OUT or self._model.opset < HANDING_OUT[owner.op]:
                    return f"inside {place(around)}: {owner.op} does not hand out what flows there"
            if owners:
                loops = sum(owner.op in LOOPS for owner in owners)
                inside = Inside(tap.value, reading.state.element_type, loops)
                tap = replace(tap, value=f"{tap.value}@inside", inside=inside)
            uses.append(replace(use, tap=tap))
        return replace(match, uses=tuple(uses))

    def _readings(self, value: gs.Tensor, state: _State) -> Iterator[_Reading]:
        """All ends of the ways that a constant takes through nodes that only rearrange it."""
        todo = [(value, state)]
        visited: set[tuple[int, _State]] = set()  # functions may call each other in any way
        while todo:
            value, state = todo.pop()
            if (id(value), state) in visited:
                continue
            visited.add((id(value), state))
            if value.name in self._scopes.leaked:
                yield _Reading(self._scopes.leaked[value.name], None, 0, state)
            for node, operand in self._scopes.readers[id(value)]:
                if node.op in _SHAPE_ONLY and not node.domain:
                    continue
                function = self._scopes.functions.get((node.domain, node.op))
                behind = passed_through(node, operand, state.form, self._integers)
                if function is not None and operand < len(function.inputs):
                    todo.append((function.inputs[operand], state))
                elif behind is not None:
                    kind = attribute(node, "to", state.element_type) if node.op == "Cast" else state.element_type
                    todo.append((node.outputs[0], _State(behind, state.quantized or node.op in QUANTIZATION, kind)))
                else:
                    owners = self._scopes.owners(node)
                    reader = f"{node.op} node {node.name!r}" + (f" inside {place(owners)}" if owners else "")
                    yield _Reading(reader, node, operand, state)

    def _multiplies(self, node: gs.Node, operand: int) -> bool:
        """Whether a linear operator multiplies the operand with something computed. A computed bias does not count."""
        operator = operator_of(node)
        if operator is None or operand not in operator.operands:
            return False
        others = [node.inputs[index] for index in operator.activations(operand) if index < len(node.inputs)]
        return any(value.name and not self._scopes.is_constant(value) for value in others)
