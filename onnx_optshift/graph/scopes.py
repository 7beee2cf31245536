"""Which nodes run inside a body, and which values depend on constants alone."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnx_optshift.graph.weights import display_name, domain_of

_RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"
})  # fmt: skip


class Scopes:
    """A graph with its bodies and functions, flattened. Nodes and values are known by identity.

    A function that could not be inlined may use any name again, and graphsurgeon compares values by name alone: hence
    `id` everywhere.

    Attributes:
        graph: The main graph.
        nodes: All nodes of the model, outer ones first.
        body_of: For nodes of a body or a function, where that is, by node id.
        owners: For nodes of the main graph and of its bodies, the nodes whose bodies they are in, outermost first, by
            node id. Nodes of functions are not in it.
        function_inputs: Inputs of a model-local function, by its domain and name.
        leaked: Names of what bodies hand out, with the place. A body may hand out an outer value or a constant.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.nodes: list[gs.Node] = []
        self.body_of: dict[int, str] = {}
        self.owners: dict[int, tuple[gs.Node, ...]] = {}
        self.function_inputs: dict[tuple[str, str], list[gs.Tensor]] = {}
        self.leaked: dict[str, str] = {}
        self._constants: set[int] = set()
        self._input_owners: dict[int, tuple[gs.Node, ...]] = {}
        self._enter(graph.nodes, None, ())
        for function in graph.functions:
            self.function_inputs[domain_of(function), function.name] = list(function.inputs)
            self._enter(function.nodes, f"the function {function.name!r}", None)

    def is_constant(self, value: gs.Tensor) -> bool:
        """Whether a value depends on constants alone."""
        return isinstance(value, gs.Constant) or id(value) in self._constants

    def values(self) -> dict[str, gs.Tensor]:
        """Values of the main graph and of its bodies by name, in a model where names are unique."""
        inside = [node for node in self.nodes if id(node) in self.owners]
        return {value.name: value for node in inside for value in (*node.inputs, *node.outputs) if value.name}

    def owners_of(self, value: gs.Tensor) -> tuple[gs.Node, ...]:
        """The nodes in whose bodies a value comes to be, outermost first; none for the main graph."""
        if value.inputs:
            return self.owners[id(value.inputs[0])]
        return self._input_owners.get(id(value), ())

    def _enter(self, nodes: Iterable[gs.Node], body: str | None, owners: tuple[gs.Node, ...] | None) -> None:
        inner: list[tuple[gs.Graph, gs.Node]] = []
        for node in nodes:
            self.nodes.append(node)
            if owners is not None:
                self.owners[id(node)] = owners
            if body is not None:
                self.body_of[id(node)] = body
            bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
            inner.extend((graph, node) for graph in bodies)
            inputs = [value for value in node.inputs if value.name]
            computed = not bodies and node.op not in _RANDOM and (inputs or node.op == "Constant")
            if computed and all(map(self.is_constant, inputs)):
                self._constants.update(id(value) for value in node.outputs)
        for graph, owner in inner:
            where = f"the body of {owner.op} node {display_name(owner)!r}"
            within = (*owners, owner) if owners is not None else None
            self._enter(graph.nodes, where, within)
            self._input_owners.update((id(value), within or ()) for value in graph.inputs)
            self.leaked.update((value.name, where) for value in graph.outputs)
