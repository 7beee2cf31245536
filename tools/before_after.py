"""Draws the README's picture, docs/before_after.svg: a model rounded to few bits, as it was and after the pass.

    python tools/before_after.py [MODEL] [--bits 4 3 2] [--check]

For every bit width the pass runs as its users run it (`--objective range --tolerance auto --quantization-bits B`), with
the calibration data beside the model. Both files are then rounded to nearest, per output channel, and judged on the
labelled data beside the model (`heldout.npz`), which decided nothing. With `--check` nothing is written; exit
status 1 if the figures of the picture are not what they are now, within `MOST_CHANGE`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from quantizers import rtn
from score import Judge, read_arrays

from onnx_optshift.api import shift
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "before_after.svg"
MODEL = ROOT / "models" / "digits_transformer" / "model.onnx"
# Of accuracies (a share) and of errors: another processor sums in another order, and rounding passes that on.
MOST_CHANGE = 0.02

WIDTH, HEIGHT, TOP, BASE = 760, 300, 84, 236
PANEL, MARGIN, BAR = 340, 30, 38
# Blue and orange are told apart by the colour-blind too, and stand out from white as from black.
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 13px system-ui, sans-serif }
  .title { font-size: 15px; font-weight: 600 } .quiet { fill: #59636e } .axis { stroke: #8c959f }
  .value { font-size: 12px; text-anchor: middle } .tick { text-anchor: middle }
  .float { fill: #8c959f } .before { fill: #d9730d } .after { fill: #2f7de1 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .quiet { fill: #9198a1 }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One bar of a panel."""

    kind: str  # float, before or after
    value: float
    label: str


@dataclass(frozen=True)
class Figures:
    """What one model answers: share of right answers, and distance of the outputs to the float original's."""

    top1: float
    error: float


def measured(model: Path, bits: Sequence[int]) -> dict[str, list[Figures]]:
    """Figures of the float model, and before and after the pass at every bit width."""
    judge = Judge(model, read_arrays(model.with_name("heldout.npz")))

    def score(path: Path) -> Figures:
        found = judge.score(path)
        return Figures(found.top1, found.error)

    figures: dict[str, list[Figures]] = {"float": [score(model)], "before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        for width in bits:
            result = shift(model, objective="range", tolerance="auto", quantization_bits=(width,))
            for kind, source in (("before", model), ("after", result.save(Path(folder) / "shifted.onnx"))):
                rounded = Path(folder) / f"{kind}.onnx"
                rtn(Grid(width), Selection()).run(source, rounded, {})
                figures[kind].append(score(rounded))
    return figures


def panel(left: float, title: str, groups: Sequence[tuple[str, Sequence[Bar]]], most: float) -> list[str]:
    """The lines of one panel of grouped bars, from 0 to `most`."""
    lines = [f'<text class="title" x="{left}" y="{TOP - 24}">{escape(title)}</text>']
    slot = PANEL / len(groups)
    for place, (tick, bars) in enumerate(groups):
        middle = left + slot * (place + 0.5)
        lines.append(f'<text class="tick" x="{middle:.0f}" y="{BASE + 18}">{escape(tick)}</text>')
        for number, bar in enumerate(bars):
            x = middle + BAR * (number - len(bars) / 2)
            height = (BASE - TOP) * bar.value / most
            lines += [
                f'<rect class="{bar.kind}" x="{x + 1:.1f}" y="{BASE - height:.1f}" width="{BAR - 2}" '
                f'height="{height:.1f}"/>',
                f'<text class="value" x="{x + BAR / 2:.1f}" y="{BASE - height - 5:.1f}">{escape(bar.label)}</text>',
            ]
    return [*lines, f'<path class="axis" d="M{left} {BASE}h{PANEL}"/>']


def draw(name: str, bits: Sequence[int], figures: dict[str, list[Figures]]) -> str:
    """The picture as SVG text; its colours follow the reader's light or dark scheme."""
    pairs = list(zip(bits, figures["before"], figures["after"], strict=True))
    original = figures["float"][0]
    percent = [("float", [Bar("float", original.top1, f"{100 * original.top1:.1f}")])]
    errors = []
    for width, before, after in pairs:
        both = (("before", before), ("after", after))
        percent.append((f"{width} bits", [Bar(kind, f.top1, f"{100 * f.top1:.1f}") for kind, f in both]))
        errors.append((f"{width} bits", [Bar(kind, f.error, f"{f.error:.3f}") for kind, f in both]))
    said = "; ".join(
        f"{width} bits: accuracy {100 * b.top1:.1f} to {100 * a.top1:.1f} %, error {b.error:.3f} to {a.error:.3f}"
        for width, b, a in pairs
    )
    left, right = MARGIN, WIDTH - MARGIN - PANEL
    legend = (
        ("before", "rounded to nearest", left),
        ("after", "this pass, then rounded to nearest", left + 170),
        ("float", "float model", left + 430),
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(name)}, rounded to few bits</title>',
        f'<desc id="description">{escape(said)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        *panel(left, "Correct answers, %", percent, 1.0),
        *panel(right, "Output error, relative to the float model", errors, max(b.error for _, b, _ in pairs)),
    ]
    for kind, text, x in legend:
        lines.append(
            f'<rect class="{kind}" x="{x}" y="16" width="12" height="12"/><text x="{x + 18}" y="27">{text}</text>'
        )
    note = f"{name}, held-out data that decided nothing; weights rounded per output channel"
    lines.append(f'<text class="quiet" x="{left}" y="{HEIGHT - 16}">{escape(note)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def figures_of(picture: str) -> list[float]:
    """All figures of a picture, as shares, in the order of its description."""
    said = re.search(r"<desc[^>]*>(.*?)</desc>", picture)
    found = re.findall(r"([\d.]+)(?: to ([\d.]+)( %)?)", said[1] if said else "")
    return [float(value) / (100 if unit else 1) for first, second, unit in found for value in (first, second)]


def main() -> int:
    """Reads the command line, runs, and writes or compares the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    drawn = draw(arguments.model.parent.name, arguments.bits, measured(arguments.model, arguments.bits))
    if not arguments.check:
        PICTURE.write_text(drawn, encoding="utf-8")
        return 0
    then, now = figures_of(PICTURE.read_text(encoding="utf-8")), figures_of(drawn)
    print("picture:", *then)
    print("now:    ", *now)
    return int(len(then) != len(now) or any(abs(a - b) > MOST_CHANGE for a, b in zip(then, now, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
