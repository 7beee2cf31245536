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
        body_of: For nodes of a body or a function, where that is, by node id.
        owners: For nodes of the main graph and of its bodies, the nodes whose bodies they are in, outermost first, by
            node id. Nodes of functions are not in it.
        constants: Ids of values that depend on constants alone.
        function_inputs: Inputs of a model-local function, by its domain and name.
        leaked: Names of what bodies hand out, with the place. A body may hand out an outer value or a constant.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    body_of: dict[int, str] = field(default_factory=dict)
    owners: dict[int, tuple[gs.Node, ...]] = field(default_factory=dict)
    constants: set[int] = field(default_factory=set)
    function_inputs: dict[tuple[str, str], list[gs.Tensor]] = field(default_factory=dict)
    leaked: dict[str, str] = field(default_factory=dict)
    _input_owners: dict[int, tuple[gs.Node, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: gs.Graph) -> Scopes:
        """Flattens a graph."""
        scopes = cls()
        scopes._enter(graph.nodes, None, ())
        for function in graph.functions:
            scopes.function_inputs[domain_of(function), function.name] = list(function.inputs)
            scopes._enter(function.nodes, f"the function {function.name!r}", None)
        return scopes

    def is_constant(self, value: gs.Tensor) -> bool:
        """Whether a value depends on constants alone."""
        return isinstance(value, gs.Constant) or id(value) in self.constants

    def values(self) -> dict[str, gs.Tensor]:
        """Values of the main graph and of its bodies by name, in a model where names are unique."""
        values: dict[str, gs.Tensor] = {}
        for node in self.nodes:
            if id(node) in self.owners:
                for value in (*node.inputs, *node.outputs):
                    if value.name:
                        values.setdefault(value.name, value)
        return values

    def owners_of(self, value: gs.Tensor) -> tuple[gs.Node, ...]:
        """The nodes in whose bodies a value comes to be, outermost first; none for the main graph."""
        if value.inputs:
            return self.owners[id(value.inputs[0])]
        return self._input_owners.get(id(value), ())

    def _enter(self, nodes: Iterable[gs.Node], body: str | None, owners: tuple[gs.Node, ...] | None) -> None:
        inner: list[tuple[gs.Graph, str, gs.Node]] = []
        for node in nodes:
            self.nodes.append(node)
            if owners is not None:
                self.owners[id(node)] = owners
            if body is not None:
                self.body_of[id(node)] = body
            bodies = list(_bodies(node))
            inner.extend((graph, f"the body of {node.op} node {display_name(node)!r}", node) for graph in bodies)
            inputs = [value for value in node.inputs if value.name]
            computed = not bodies and node.op not in _RANDOM and (inputs or node.op == "Constant")
            if computed and all(map(self.is_constant, inputs)):
                self.constants.update(id(value) for value in node.outputs)
        for graph, where, owner in inner:
            within = (*owners, owner) if owners is not None else None
            self._enter(graph.nodes, where, within)
            self._input_owners.update((id(value), within or ()) for value in graph.inputs)
            self.leaked.update((value.name, where) for value in graph.outputs)


def domain_of(node: gs.Node | gs.Function) -> str:
    """A node's operator domain; the two spellings of the standard one are the same."""
    return "" if node.domain in (None, "ai.onnx") else str(node.domain)


def _bodies(node: gs.Node) -> Iterator[gs.Graph]:
    values: list[Any] = list(node.attrs.values())
    for value in values:
        if isinstance(value, gs.Graph):
            yield value
