"""Which nodes run inside a body, which values depend on constants alone, and who reads a value.

onnx-graphsurgeon reads the graph and not onnx-ir (1.1.0): that refuses values of a map type and sparse constants, knows
no owner of a subgraph either, and imports sympy, which costs every run half a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx_graphsurgeon as gs

_RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"
})  # fmt: skip
# What a node is in: nodes whose bodies it is in, outermost first; the function before them where there is one.
Owners = tuple[gs.Node | gs.Function, ...]


class Scopes:
    """A graph with its bodies and functions, flattened. Nodes and values are known by identity.

    A function that could not be inlined may use any name again, and graphsurgeon compares values by name alone: hence
    `id` everywhere. Nodes without a name are called after their first output, which is unique in any case, and the
    standard domain is always spelled `""`.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.nodes: list[gs.Node] = []  # all of the model, outer ones first
        self.readers: defaultdict[int, list[tuple[gs.Node, int]]] = defaultdict(list)  # with the operand, by value
        self.functions = {(_domain(function), function.name): function for function in graph.functions}
        # Names of what the model and bodies hand out, with the place. A body may hand out an outer value or a constant.
        self.leaked: dict[str, str] = {}
        self._owners: dict[int, Owners] = {}
        self._constants: set[int] = set()
        self._enter(graph.nodes, ())
        for function in graph.functions:
            self._enter(function.nodes, (function,))
        self.leaked |= {value.name: f"the graph output {value.name!r}" for value in graph.outputs}

    def is_constant(self, value: gs.Tensor) -> bool:
        """Whether a value depends on constants alone."""
        return isinstance(value, gs.Constant) or id(value) in self._constants

    def values(self) -> dict[str, gs.Tensor]:
        """Values of the main graph and of its bodies by name, in a model where names are unique."""
        inside = [node for node in self.nodes if not self.in_function(node)]
        return {value.name: value for node in inside for value in (*node.inputs, *node.outputs) if value.name}

    def owners(self, part: gs.Node | gs.Tensor) -> Owners:
        """What a node is in, or the place where a value comes to be; empty for the main graph."""
        producer = part.inputs[0] if isinstance(part, gs.Tensor) and part.inputs else part
        return self._owners.get(id(producer), ())

    def in_function(self, node: gs.Node) -> bool:
        """Whether a node is in a function that could not be inlined."""
        return any(isinstance(owner, gs.Function) for owner in self.owners(node))

    def _enter(self, nodes: Iterable[gs.Node], owners: Owners) -> None:
        inner: list[tuple[gs.Graph, gs.Node]] = []
        for node in nodes:
            node.name = node.name or next((o.name for o in node.outputs if o.name), f"unnamed {node.op}")
            node.domain = _domain(node)
            self.nodes.append(node)
            self._owners[id(node)] = owners
            bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
            inner.extend((graph, node) for graph in bodies)
            for operand, value in enumerate(node.inputs):
                self.readers[id(value)].append((node, operand))
            inputs = [value for value in node.inputs if value.name]
            computed = not bodies and node.op not in _RANDOM and (inputs or node.op == "Constant")
            if computed and all(map(self.is_constant, inputs)):
                self._constants.update(id(value) for value in node.outputs)
        for graph, owner in inner:
            within = (*owners, owner)
            self._owners.update((id(value), within) for value in graph.inputs)
            self._enter(graph.nodes, within)
            self.leaked.update((value.name, place(within)) for value in graph.outputs)


def place(owners: Owners) -> str:
    """What to call the innermost of these."""
    inner = owners[-1]
    if isinstance(inner, gs.Function):
        return f"the function {inner.name!r}"
    return f"the body of {inner.op} node {inner.name!r}"


def _domain(part: gs.Node | gs.Function) -> str:
    return "" if part.domain in (None, "ai.onnx") else part.domain
