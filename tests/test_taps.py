"""Text keys of taps: statistics that are stored or sent elsewhere are found again by them."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest

from onnx_optshift.geometry import AxisRows, Inside, MatrixRows, PatchRows, RowForm, Tap

ONES = (1, 1)
FORMS: list[RowForm] = [
    MatrixRows(),
    MatrixRows(feature_axis=-2),
    MatrixRows(batch=(2,)),
    MatrixRows(batch=(2, 1)),
    MatrixRows(scale=0.1),
    MatrixRows(scale=0.1 + 2**-56),  # the next float
    MatrixRows(scale=float("1e-320")),
    PatchRows((3, 3), ONES, ONES, (0, 0, 0, 0)),
    PatchRows((3, 3), ONES, ONES, (0, 0, 0, 1)),
    PatchRows((3, 3), ONES, ONES, (0, 0, 0, 0), "SAME_UPPER"),
    PatchRows((3, 3), ONES, ONES, (0, 0, 0, 0), group=2),
    PatchRows((3,), (3,), (1,), (1, 0)),
    PatchRows((3,), (3,), (1,), (10,)),
    AxisRows((-1,)),
    AxisRows((), (-1,)),
    AxisRows((-1, -2)),
]


def taps() -> list[Tap]:
    values = ["x", "x,1", 'x"', "x\n", "ü", "\N{PILE OF POO}", ""]
    named = [Tap(value, MatrixRows(), 1, 4) for value in values]
    formed = [Tap("x", form, groups, 4) for form, groups in itertools.product(FORMS, (1, 2))]
    inside = [Tap("x@inside", MatrixRows(), 1, 4, Inside("x", kind, loops)) for kind in (1, 10) for loops in (0, 1)]
    return list(
        dict.fromkeys([*named, *formed, Tap("x", MatrixRows(), 1, 41), Tap("x@inside", MatrixRows(), 1, 4), *inside])
    )


def test_equal_taps_have_equal_keys_and_different_taps_different_ones() -> None:
    keys = [tap.key for tap in taps()]
    assert len(set(keys)) == len(keys) > 40
    assert [dataclasses.replace(tap).key for tap in taps()] == keys


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0.0, -0.0), (True, 1.0)])
def test_equal_numbers_of_another_kind_are_equal(one: float, other: float) -> None:
    taps = [Tap("x", MatrixRows(scale=scale), 1, 4) for scale in (one, other)]
    assert taps[0] == taps[1]
    assert taps[0].key == taps[1].key


@pytest.mark.parametrize("seed", ["0", "1"])
def test_keys_are_the_same_in_another_process(seed: str) -> None:
    code = "import test_taps; print(*(tap.key for tap in test_taps.taps()), sep='\\n', end='')"
    environment = {
        "PYTHONPATH": ":".join([p for p in sys.path if p]),
        "PYTHONHASHSEED": seed,
        "PYTHONIOENCODING": "utf-8",
    }
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.splitlines() == [tap.key for tap in taps()]
