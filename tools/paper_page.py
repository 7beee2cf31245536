"""The tables and the picture of `docs/paper.md`, from the rows of `paper.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Row = dict[str, str]
CELL = ("size", "kind", "decay", "noise")
METHOD = ("optimizer", "during", "layers", "until", "after")

COLUMNS = (  # heading, figure, factor, digits after the point; None for three significant ones
    ("test, %", "test_accuracy", 100, 1),
    ("test NLL", "test_loss", 1, None),
    ("train, %", "train_accuracy", 100, 1),
    ("train loss", "train_loss", 1, None),
    ("trace", "trace", 1, None),
    ("trace, last", "last_trace", 1, None),
    ("rel. flatness", "relative_flatness", 1, None),
    ("norm", "norm", 1, None),
    ("NC1", "nc1", 1, None),
    ("NC2", "nc2", 1, None),
    ("NC3", "nc3", 1, None),
    ("NC4", "nc4", 1, None),
    ("s/epoch", "epoch_cpu", 1, None),
)
NETWORKS = {"resnet": "ResNet", "densenet": "DenseNet", "mlp": "MLP of 128 classes"}

WIDTH, PANEL, TOP, STEP, LEFT = 900, 330, 70, 15, 190
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 12px system-ui, sans-serif }
  .title { font-size: 14px; font-weight: 600 } .name { text-anchor: end } .tick { text-anchor: middle }
  .quiet { fill: #59636e } .axis { stroke: #8c959f; fill: none } .bar { stroke-width: 2 }
  .plain { fill: #8c959f; stroke: #8c959f } .shifted { fill: #2f7de1; stroke: #2f7de1 }
  .sam { fill: #d9730d; stroke: #d9730d }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .quiet { fill: #9198a1 }
  }
"""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; no deviation where there is one alone."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one figure per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def written(self, digits: int | None) -> str:
        """As a table shows it."""
        shown = [self.mean] if self.deviation is None else [self.mean, self.deviation]
        return " ± ".join(f"{value:.{digits}f}" if digits is not None else _significant(value) for value in shown)


def _significant(value: float) -> str:
    """Three significant digits, never with an exponent above 1."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def method(row: Row) -> str:
    """A row's method in words."""
    names = [row["optimizer"].upper()]
    if row["during"] != "0":
        names.append(
            f"SOS {row['during']}K"
            + (", all layers" if row["layers"] == "all" else "")
            + (", early" if float(row["until"]) < 1 else "")
        )
    text = " + ".join(names)
    after = row["after"]
    if after:
        text += ", then " + (f"SOS {after[3:]}K" if after.startswith("sos") else {"os": "OS"}.get(after, after))
    return text


def groups(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """Rows by network, decay and noise, and by method; seeds in order."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    order = lambda r: (*(r[key] for key in CELL), r["optimizer"] == "sam", *(r[k] for k in METHOD), r["seed"])  # noqa: E731
    for row in sorted(rows, key=order):
        found.setdefault(tuple(row[key] for key in CELL), {}).setdefault(method(row), []).append(row)
    return found


def title(cell: tuple[str, ...]) -> str:
    """A cell in words."""
    size, kind, decay, noise = cell
    longer = " trained for longer" if size == "long" else ""
    return f"{NETWORKS[kind]}{longer}, weight decay {float(decay):g}, {100 * float(noise):.0f} % wrong labels"


def tables(rows: Iterable[Row]) -> str:
    """One table for each network, decay and noise."""
    lines: list[str] = []
    for cell, methods in groups(rows).items():
        lines += ["", f"**{title(cell)}**", "", "| | seeds | " + " | ".join(c[0] for c in COLUMNS) + " | ε |"]
        lines.append("|---" * (len(COLUMNS) + 3) + "|")
        for name, some in methods.items():
            cells = [
                Spread.of([factor * float(row[key]) for row in some]).written(digits)
                for _, key, factor, digits in COLUMNS
            ]
            chosen = ", ".join(f"{float(row['tolerance']):g}" for row in some if row["tolerance"])
            lines.append(f"| {name} | {len(some)} | " + " | ".join(cells) + f" | {chosen} |")
    return "\n".join(lines[1:])


def differences(rows: Iterable[Row]) -> str:
    """Each method against what it starts from, SGD or SAM alone, seed by seed: the same images, labels and weights."""
    lines = [
        "| | against | seeds | test accuracy, points | better | test NLL | trace, ratio | rel. flatness, ratio |",
        "|---" * 8 + "|",
    ]
    for cell, methods in groups(rows).items():
        lines.append(f"| **{title(cell)}** |" + " |" * 7)
        for name, some in methods.items():
            base = {row["seed"]: row for row in methods.get("SGD", [])}
            pairs = [(base[row["seed"]], row) for row in some if row["seed"] in base]
            if name == "SGD" or not pairs:
                continue
            gains = [100 * (float(b["test_accuracy"]) - float(a["test_accuracy"])) for a, b in pairs]
            losses = [float(b["test_loss"]) - float(a["test_loss"]) for a, b in pairs]
            ratios = [[float(b[k]) / float(a[k]) for a, b in pairs] for k in ("trace", "relative_flatness")]
            shown = [f"{Spread.of(some_ratio).written(None)}" for some_ratio in ratios]
            wins = sum(gain > 0 for gain in gains)
            lines.append(
                f"| {name} | SGD | {len(pairs)} | {_signed(gains)} | {wins} of {len(pairs)} | {_signed(losses)} | "
                + " | ".join(shown)
                + " |"
            )
    return "\n".join(lines)


def _signed(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.mean:+.2f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2f}")


def picture(rows: Iterable[Row]) -> str:
    """Test accuracy and trace of every method as SVG; bars are one standard deviation to each side."""
    found = [(cell, name, some) for cell, methods in groups(rows).items() for name, some in methods.items()]
    panels = [
        ("Test accuracy, %", [Spread.of([100 * float(r["test_accuracy"]) for r in some]) for _, _, some in found]),
        (
            "Trace of the Hessian, log10",
            [Spread.of([math.log10(float(r["trace"])) for r in some]) for _, _, some in found],
        ),
    ]
    lines, y, places, last = [], TOP, [], None
    for cell, name, _ in found:
        if cell != last:
            y += 2 * STEP
            lines.append(f'<text class="title" x="16" y="{y}">{escape(title(cell))}</text>')
            y, last = y + STEP + 4, cell
        lines.append(f'<text class="name" x="{LEFT}" y="{y + 4}">{escape(name)}</text>')
        places.append(y)
        y += STEP
    for number, (heading, spreads) in enumerate(panels):
        x0 = LEFT + 16 + number * (PANEL + 24)
        ends = [s.mean + side * (s.deviation or 0) for s in spreads for side in (-1, 1)]
        low, high = math.floor(min(ends)), math.ceil(max(ends))
        at = lambda value, x0=x0, low=low, high=high: x0 + (PANEL - 10) * (value - low) / (high - low)  # noqa: E731
        lines.append(f'<text class="title" x="{x0}" y="40">{heading}</text>')
        for part in range(5):
            value = low + part * (high - low) / 4
            lines.append(f'<path class="axis" opacity=".3" d="M{at(value):.1f} {TOP}V{y}"/>')
            lines.append(f'<text class="tick quiet" x="{at(value):.1f}" y="{TOP - 8}">{value:.3g}</text>')
        for place, spread, (_, name, _) in zip(places, spreads, found, strict=True):
            kind = "shifted" if "SOS" in name or "then" in name else "sam" if "SAM" in name else "plain"
            width = spread.deviation or 0.0
            lines.append(
                f'<path class="bar {kind}" d="M{at(spread.mean - width):.1f} {place}H{at(spread.mean + width):.1f}"/>'
            )
            lines.append(f'<circle class="{kind}" cx="{at(spread.mean):.1f}" cy="{place}" r="4"/>')
    height = y + 20
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Test accuracy and Hessian trace of every method, mean and deviation over seeds</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])
