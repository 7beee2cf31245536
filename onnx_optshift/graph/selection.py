"""Which layers a user wants: exact names, globs or regular expressions over node and initializer names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnx_optshift.errors import InputError, closest
from onnx_optshift.graph.weights import Skip, Weight


@dataclass(frozen=True)
class Selection:
    """Patterns that choose layers. A layer is named by its nodes and by its weight; one name that fits is enough.

    A pattern is an exact name, a glob (`*`, `?`, `[seq]`, case sensitive), or `re:` and a regular expression that is
    searched for anywhere in the name (anchor it with `^` and `$` for the whole name). Exclusion wins over inclusion.

    Attributes:
        include: Only layers that one of these fits; all when empty.
        exclude: No layer that one of these fits.
        op_types: Only layers of these operators, exact names; all when empty.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()

    def apply(self, weights: Sequence[Weight], skips: Sequence[Skip]) -> tuple[list[Weight], list[Skip]]:
        """The chosen weights, and the skips followed by those that the selection adds. Names of skips count as known.

        Raises:
            InputError: A regular expression is malformed, or a pattern fits no layer of the model.
        """
        known = dict.fromkeys(name for weight in weights for name in _names(weight))
        known |= dict.fromkeys(name for skip in skips for name in (skip.node, skip.weight) if name is not None)
        operators = dict.fromkeys(use.op_type for weight in weights for use in weight.uses)
        operators |= dict.fromkeys(skip.op_type for skip in skips)
        include = {pattern: _matcher(pattern, list(known), "--nodes-to-include") for pattern in self.include}
        exclude = {pattern: _matcher(pattern, list(known), "--nodes-to-exclude") for pattern in self.exclude}
        for op_type in self.op_types:
            if op_type not in operators:
                raise InputError(
                    f"--op-types {op_type!r} fits no layer of this model, which has {_listed(list(operators))}."
                    f"{closest(op_type, list(operators))}"
                )
        chosen: list[Weight] = []
        left = list(skips)
        for weight in weights:
            names = _names(weight)
            excluded_by = next((pattern for pattern, fits in exclude.items() if any(map(fits, names))), None)
            if excluded_by is not None:
                option = f"--nodes-to-exclude {excluded_by!r}"
            elif include and not any(fits(name) for fits in include.values() for name in names):
                option = "--nodes-to-include"
            elif self.op_types and not any(use.op_type in self.op_types for use in weight.uses):
                option = "--op-types"
            else:
                chosen.append(weight)
                continue
            use = weight.uses[0]
            left.append(Skip(weight.name, use.node, use.op_type, f"left out by {option}", unselected=True))
        return chosen, left


def _names(weight: Weight) -> list[str]:
    return [weight.name, *(use.node for use in weight.uses)]


def _matcher(pattern: str, known: list[str], option: str) -> Callable[[str], bool]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{option} {pattern!r} is no regular expression: {error}. Correct it.") from error

        def fits(name: str) -> bool:
            return expression.search(name) is not None

    else:

        def fits(name: str) -> bool:
            # The exact name first: names such as `layers[0]` hold glob characters.
            return name == pattern or fnmatchcase(name, pattern)

    if not any(map(fits, known)):
        raise InputError(
            f"{option} {pattern!r} fits no layer of this model, neither a node nor an initializer."
            f"{closest(pattern.removeprefix('re:'), known)} `inspect` lists all layers."
        )
    return fits


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "no linear layers"
