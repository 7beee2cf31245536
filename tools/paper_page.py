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
    ("shifting, %", "shifting", 100, 1),
)
NETWORKS = {"resnet": "ResNet", "densenet": "DenseNet", "mlp": "MLP of 128 classes"}

WIDTH, PANEL, TOP, STEP, LEFT = 920, 330, 60, 15, 200
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


def figure(row: Row, name: str) -> float:
    """A row's figure: of the CSV, or the time for shifts as a share of that for everything else."""
    if name == "shifting":
        cpu, shifting = float(row["epoch_cpu"]), float(row["epoch_shifting"])
        return shifting / (cpu - shifting)
    return float(row[name])


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
                Spread.of([factor * figure(row, key) for row in some]).written(digits)
                for _, key, factor, digits in COLUMNS
            ]
            chosen = ", ".join(f"{float(row['tolerance']):g}" for row in some if row["tolerance"])
            lines.append(f"| {name} | {len(some)} | " + " | ".join(cells) + f" | {chosen} |")
    return "\n".join(lines[1:])


def compared(methods: dict[str, list[Row]]) -> dict[str, list[tuple[Row, Row]]]:
    """By method, its rows beside those of SGD alone with the same seed: the same images, wrong labels and weights."""
    base = {row["seed"]: row for row in methods.get("SGD", [])}
    pairs = {name: [(base[r["seed"]], r) for r in some if r["seed"] in base] for name, some in methods.items()}
    return {name: some for name, some in pairs.items() if name != "SGD" and some}


def gains(pairs: Sequence[tuple[Row, Row]]) -> list[float]:
    """Test accuracy beyond that of SGD alone, in points."""
    return [100 * (float(b["test_accuracy"]) - float(a["test_accuracy"])) for a, b in pairs]


def ratios(pairs: Sequence[tuple[Row, Row]], name: str) -> list[float]:
    """A figure as a multiple of that of SGD alone."""
    return [float(b[name]) / float(a[name]) for a, b in pairs]


def differences(rows: Iterable[Row]) -> str:
    """Each method against SGD alone."""
    lines = [
        "| | seeds | test accuracy, points | better | test NLL | trace, ratio | rel. flatness, ratio |",
        "|---" * 7 + "|",
    ]
    for cell, methods in groups(rows).items():
        found = compared(methods)
        lines += [f"| **{title(cell)}** |" + " |" * 6] if found else []
        for name, pairs in found.items():
            losses = [float(b["test_loss"]) - float(a["test_loss"]) for a, b in pairs]
            cells = [
                name,
                str(len(pairs)),
                _signed(gains(pairs)),
                f"{sum(gain > 0 for gain in gains(pairs))} of {len(pairs)}",
                _signed(losses),
                *(Spread.of(ratios(pairs, key)).written(2) for key in ("trace", "relative_flatness")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.mean:+.2f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2f}")


def picture(rows: Iterable[Row]) -> str:
    """Accuracy and trace against SGD alone of every method with more than one seed, as SVG; bars are deviations."""
    found = [
        (cell, name, pairs)
        for cell, methods in groups(rows).items()
        for name, pairs in compared(methods).items()
        if len(pairs) > 1
    ]
    panels = [
        ("Test accuracy against SGD, points", [Spread.of(gains(pairs)) for *_, pairs in found]),
        ("Trace against SGD, log2", [Spread.of([math.log2(r) for r in ratios(pairs, "trace")]) for *_, pairs in found]),
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
        x0 = LEFT + 20 + number * (PANEL + 24)
        ends = [s.mean + side * (s.deviation or 0) for s in spreads for side in (-1, 1)]
        low, high = math.floor(min(*ends, -0.5)), math.ceil(max(*ends, 0.5))
        step = max(1, (high - low) // 6)
        at = lambda value, x0=x0, low=low, high=high: x0 + (PANEL - 10) * (value - low) / (high - low)  # noqa: E731
        lines.append(f'<text class="title" x="{x0}" y="30">{heading}</text>')
        for value in range(-(-low // step) * step, high + 1, step):
            lines.append(f'<path class="axis" opacity="{0.3 if value else 1}" d="M{at(value):.1f} {TOP}V{y}"/>')
            lines.append(f'<text class="tick quiet" x="{at(value):.1f}" y="{TOP - 8}">{value}</text>')
        for place, spread, (_, name, _) in zip(places, spreads, found, strict=True):
            kind = "plain" if "scale" in name else "sam" if "SAM" in name else "shifted"
            left, right = (at(spread.mean + side * (spread.deviation or 0)) for side in (-1, 1))
            lines.append(f'<path class="bar {kind}" d="M{left:.1f} {place}H{right:.1f}"/>')
            lines.append(f'<circle class="{kind}" cx="{at(spread.mean):.1f}" cy="{place}" r="4"/>')
    height = y + 20
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Test accuracy and Hessian trace against SGD alone, mean and deviation over seeds</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])
