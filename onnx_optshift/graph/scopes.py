"""Which nodes run inside a body, and which values depend on constants alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from onnx_optshift.graph.weights import display_name

_RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"
})  # fmt: skip


@dataclass
class Scopes:
    """A graph with its bodies and functions, flattened. Nodes and values are known by identity.

    Two values may have one name (a body may shadow an outer name), and graphsurgeon compares them by name alone:
    hence `id` everywhere.

    Attributes:
        nodes: All nodes of the model, outer ones first.
        body_of: For nodes of a body, where that is, by node id.
        constants: Ids of values that depend on constants alone.
        function_inputs: Inputs of a model-local function, by its domain and name.
        leaked: Outer names that a body hands out as its own output, with the place.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    body_of: dict[int, str] = field(default_factory=dict)
    constants: set[int] = field(default_factory=set)
    function_inputs: dict[tuple[str, str], list[gs.Tensor]] = field(default_factory=dict)
    leaked: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: gs.Graph) -> Scopes:
        """Flattens a graph."""
        scopes = cls()
        scopes._enter(graph.nodes, None)
        for function in graph.functions:
            scopes.function_inputs[domain_of(function), function.name] = list(function.inputs)
            scopes._enter(function.nodes, f"the function {function.name!r}")
        return scopes

    def is_constant(self, value: gs.Tensor) -> bool:
        """Whether a value depends on constants alone."""
        return isinstance(value, gs.Constant) or id(value) in self.constants

    def main_values(self) -> dict[str, gs.Tensor]:
        """Values of the main graph by name, initializers that only bodies read included."""
        values: dict[str, gs.Tensor] = {}
        for node in self.nodes:  # outer nodes come first, so that a body cannot take a name away from them
            outer = id(node) not in self.body_of
            for value in (*node.inputs, *node.outputs):
                if value.name and (outer or isinstance(value, gs.Constant)):
                    values.setdefault(value.name, value)
        return values

    def _enter(self, nodes: Iterable[gs.Node], body: str | None) -> None:
        inner: list[tuple[gs.Graph, str]] = []
        for node in nodes:
            self.nodes.append(node)
            if body is not None:
                self.body_of[id(node)] = body
            bodies = list(_bodies(node))
            inner.extend((graph, f"the body of {node.op} node {display_name(node)!r}") for graph in bodies)
            inputs = [value for value in node.inputs if value.name]
            computed = not bodies and node.op not in _RANDOM and (inputs or node.op == "Constant")
            if computed and all(map(self.is_constant, inputs)):
                self.constants.update(id(value) for value in node.outputs)
        for graph, where in inner:
            self._enter(graph.nodes, where)
            inputs_of_body = {id(value) for value in graph.inputs}
            for value in graph.outputs:
                if not value.inputs and not isinstance(value, gs.Constant) and id(value) not in inputs_of_body:
                    self.leaked[value.name] = where


def domain_of(node: gs.Node | gs.Function) -> str:
    """A node's operator domain; the two spellings of the standard one are the same."""
    return "" if node.domain in (None, "ai.onnx") else str(node.domain)


def _bodies(node: gs.Node) -> Iterator[gs.Graph]:
    values: list[Any] = list(node.attrs.values())
    for value in values:
        if isinstance(value, gs.Graph):
            yield value
