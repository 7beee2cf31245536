"""Which layers a user wants, and that a run without any can say why there are none."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny_models as tiny
from discovery import find

from onnx_optshift.errors import InputError

CHOICES = {
    "all": ({}, ["W1", "W2"]),
    "node": ({"include": ("h",)}, ["W1"]),
    "initializer": ({"include": ("W2",)}, ["W2"]),
    "glob": ({"include": ("W*",)}, ["W1", "W2"]),
    "regular expression": ({"include": ("re:[12]$",)}, ["W1", "W2"]),
    "anchored": ({"include": ("re:^h$",)}, ["W1"]),
    "excluded": ({"exclude": ("W1",)}, ["W2"]),
    "exclusion wins": ({"include": ("W*",), "exclude": ("y",)}, ["W1"]),
    "operator": ({"op_types": ("Gemm",)}, ["W1"]),
    "both": ({"include": ("W*",), "op_types": ("MatMul",)}, ["W2"]),
}


@pytest.mark.parametrize("case", list(CHOICES))
def test_selection(case: str) -> None:
    selection, expected = CHOICES[case]
    weights, skips = find(tiny.two_layers(), **selection)
    assert [weight.name for weight in weights] == expected
    assert {skip.weight for skip in skips} == {"W1", "W2"} - set(expected)
    assert all(skip.unselected for skip in skips)
    # The reason is an option that was given.
    given = {f"--nodes-to-exclude {pattern!r}" for pattern in selection.get("exclude", ())}
    given |= {"--nodes-to-include"} if "include" in selection else set()
    given |= {"--op-types"} if "op_types" in selection else set()
    assert {skip.reason.removeprefix("left out by ") for skip in skips} <= given


def test_an_exact_name_may_hold_glob_characters() -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, A)  y = MatMul(h, B) }"
    proto = tiny.model(text, {"A": tiny.weight(4, 4), "B": tiny.weight(4, 4)})
    proto.graph.node[0].name = "layer[0]"
    assert [weight.name for weight in find(proto, include=("layer[0]",))[0]] == ["A"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"include": ("w1",)}, "Close matches: 'W1'"),
        ({"exclude": ("nothing*",)}, "--nodes-to-exclude"),
        ({"include": ("re:(",)}, "no regular expression"),
        ({"op_types": ("gemm",)}, "Close matches: 'Gemm'"),
        ({"op_types": ("Conv",)}, "fits no layer"),
    ],
)
def test_patterns_that_fit_nothing(selection: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        find(tiny.two_layers(), **selection)


def test_names_of_skipped_layers_may_be_excluded() -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, W)  y = Add(h, W) }"
    select = partial(find, tiny.model(text, {"W": tiny.weight(4, 4)}))
    assert select(exclude=("W",)) == select()


def test_a_model_without_weights_can_say_why() -> None:
    """No linear layer, all of them left out by the user, or all of them for reasons of their own: never the same."""
    text = "g (float[N,4] x) => (float y) { y = MatMul(x, W) }"
    no_layer = find(tiny.model("g (float[N,4] x) => (float y) { y = Relu(x) }"))
    left_out = find(tiny.model(text, {"W": tiny.weight(4, 3)}), exclude=("*",))
    other_type = find(tiny.model(text.replace("float", "int8"), {"W": np.ones((4, 3), np.int8)}))
    both = find(tiny.model(text.replace("MatMul(x, W)", "MatMul(x, W)  z = Add(W, W)"), {"W": tiny.weight(4, 3)}))
    assert [weights for weights, _ in (no_layer, left_out, other_type, both)] == [[]] * 4
    assert [[skip.unselected for skip in skips] for _, skips in (no_layer, left_out, other_type, both)] == [
        [], [True], [False], [False],
    ]  # fmt: skip
