"""Which layers a user wants: exact names, globs or regular expressions over node and initializer names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from onnx_optshift.errors import InputError, closest
from onnx_optshift.graph.weights import Skip, Weight


@dataclass(frozen=True)
class Selection:
    """Patterns that choose layers. A layer is named by its nodes and by its weight; one name that fits is enough.

    A pattern is an exact name, a glob (`*`, `?`, `[seq]`, case sensitive), or `re:` and a regular expression that is
    searched for anywhere in the name (anchor it with `^` and `$` for the whole name). Exclusion wins over inclusion.
    """

    include: tuple[str, ...] = ()  # only layers that one of these fits; all when empty
    exclude: tuple[str, ...] = ()  # no layer that one of these fits
    op_types: tuple[str, ...] = ()  # only layers of these operators, exact names; all when empty

    def apply(self, weights: Sequence[Weight], skips: Sequence[Skip]) -> tuple[list[Weight], list[Skip]]:
        """The chosen weights, and the skips followed by those that the selection adds. Names of skips count as known.

        Raises:
            InputError: A regular expression is malformed, or a pattern fits no layer of the model.
        """
        names = dict.fromkeys(name for weight in weights for name in _names(weight))
        names |= dict.fromkeys(name for skip in skips for name in (skip.node, skip.weight) if name is not None)
        include = _fitting(self.include, names, "--nodes-to-include")
        exclude = _fitting(self.exclude, names, "--nodes-to-exclude")
        operators = list(
            dict.fromkeys([*(use.op_type for w in weights for use in w.uses), *(s.op_type for s in skips)])
        )
        for op_type in self.op_types:
            if op_type not in operators:
                raise InputError(
                    f"--op-types {op_type!r} fits no layer of this model, which has "
                    f"{', '.join(operators) or 'no linear layers'}.{closest(op_type, operators)}"
                )
        chosen: list[Weight] = []
        left = list(skips)
        for weight in weights:
            own, use = _names(weight), weight.uses[0]
            excluded_by = next((pattern for pattern, fits in exclude.items() if any(map(fits, own))), None)
            if excluded_by is not None:
                option = f"--nodes-to-exclude {excluded_by!r}"
            elif include and not any(fits(name) for fits in include.values() for name in own):
                option = "--nodes-to-include"
            elif self.op_types and not any(use.op_type in self.op_types for use in weight.uses):
                option = "--op-types"
            else:
                chosen.append(weight)
                continue
            left.append(Skip(weight.name, use.node, use.op_type, f"left out by {option}", unselected=True))
        return chosen, left


def _names(weight: Weight) -> list[str]:
    return [weight.name, *(use.node for use in weight.uses)]


def _fitting(patterns: Iterable[str], names: Iterable[str], option: str) -> dict[str, Callable[[str], bool]]:
    # Per pattern, whether a name fits it; every pattern fits one of the names.
    result: dict[str, Callable[[str], bool]] = {}
    for pattern in patterns:
        text = pattern[3:] if pattern.startswith("re:") else rf"\A{fnmatch.translate(pattern)}"
        try:
            expression = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{option} {pattern!r} is no regular expression: {error}. Correct it.") from error
        fits = partial(_fits, pattern, expression)
        if not any(map(fits, names)):
            raise InputError(
                f"{option} {pattern!r} fits no layer of this model, neither a node nor an initializer."
                f"{closest(pattern.removeprefix('re:'), list(names))} `inspect` lists all layers."
            )
        result[pattern] = fits
    return result


def _fits(pattern: str, expression: re.Pattern[str], name: str) -> bool:
    # The exact name first: names such as `layers[0]` hold glob characters.
    return name == pattern or expression.search(name) is not None
