"""Small pictures as SVG text: stacked bars, and lines on logarithmic axes. They follow light and dark schemes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Told apart by the colour-blind too.
COLOURS = ("#2f7de1", "#d9730d", "#2e9e6b", "#a05bc4", "#8c959f", "#c23b5c")
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 13px system-ui, sans-serif }
  .title { font-size: 15px; font-weight: 600 } .quiet { fill: #59636e; font-size: 12px } .tick { font-size: 12px }
  .axis { stroke: #8c959f; fill: none } .grid { stroke: #8c959f; stroke-opacity: .25 }
  .line { fill: none; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .quiet { fill: #9198a1 }
  }
"""


def svg(width: int, height: int, title: str, said: str, lines: Sequence[str]) -> str:
    """A picture with its title and what it shows in words."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(said)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="24" y="30">{escape(title)}</text>',
        *lines,
        "</svg>",
        "",
    ])


def legend(names: Sequence[str], x: float, y: float, step: float) -> list[str]:
    """Squares in the order of `COLOURS`, side by side."""
    return [
        f'<rect x="{x + step * k:.0f}" y="{y - 11}" width="12" height="12" fill="{COLOURS[k]}"/>'
        f'<text x="{x + step * k + 18:.0f}" y="{y}">{escape(name)}</text>'
        for k, name in enumerate(names)
    ]


def stacked_bars(title: str, note: str, parts: Sequence[str], bars: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Horizontal bars, each a label and one value for every part; a line at 1."""
    left, row, top, room = 190, 26, 74, 500
    most = max(1.0, *(sum(values) for _, values in bars))
    height = top + row * len(bars) + 58
    lines = legend(parts, 24, 54, 110)
    for k, (label, values) in enumerate(bars):
        y, x = top + row * k, float(left)
        lines.append(f'<text x="{left - 10}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for colour, value in zip(COLOURS, values, strict=False):
            wide = room * value / most
            if value > 0:
                lines.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row - 8}" fill="{colour}"/>')
            x += wide
        lines.append(f'<text class="tick" x="{x + 6:.1f}" y="{y + 14}">{sum(values):.2f}</text>')
    one = left + room / most
    lines.append(f'<path class="axis" d="M{one:.1f} {top - 6}V{top + row * len(bars)}"/>')
    lines.append(f'<text class="quiet" x="24" y="{height - 20}">{escape(note)}</text>')
    said = "; ".join(f"{label}: {sum(values):.2f}" for label, values in bars)
    return svg(left + room + 80, height, title, said, lines)


def loglog(
    title: str, axes: tuple[str, str], curves: Mapping[str, Sequence[tuple[float, float]]], slopes: Mapping[str, float]
) -> str:
    """Curves of (x, y) on logarithmic axes, named with their fitted slopes."""
    width, height, left, right, top, bottom = 560, 360, 74, 24, 50 + 20 * -(-len(curves) // 2), 52
    points = [point for curve in curves.values() for point in curve]
    ranges = [(min(p[k] for p in points), max(p[k] for p in points)) for k in (0, 1)]

    def place(value: float, axis: int) -> float:
        low, high = (math.log10(edge) for edge in ranges[axis])
        share = (math.log10(value) - low) / (high - low or 1.0)
        return left + share * (width - left - right) if axis == 0 else height - bottom - share * (height - bottom - top)

    lines = [f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>']
    for axis in (0, 1):
        for value in _ticks(*ranges[axis]):
            at = place(value, axis)
            if axis == 0:
                lines.append(f'<path class="grid" d="M{at:.1f} {top}V{height - bottom}"/>')
                lines.append(
                    f'<text class="tick" x="{at:.1f}" y="{height - bottom + 16}" text-anchor="middle">{value:g}</text>'
                )
            else:
                lines.append(f'<path class="grid" d="M{left} {at:.1f}H{width - right}"/>')
                lines.append(f'<text class="tick" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for k, (name, curve) in enumerate(curves.items()):
        path = "L".join(f"{place(x, 0):.1f} {place(y, 1):.1f}" for x, y in sorted(curve))
        lines.append(f'<path class="line" stroke="{COLOURS[k]}" d="M{path}"/>')
        lines += [
            f'<circle cx="{place(x, 0):.1f}" cy="{place(y, 1):.1f}" r="3.5" fill="{COLOURS[k]}"/>' for x, y in curve
        ]
        text = f"{name} (slope {slopes[name]:.2f})" if name in slopes else name
        lines.append(
            f'<rect x="{24 + 270 * (k % 2)}" y="{41 + 20 * (k // 2)}" width="12" height="12" fill="{COLOURS[k]}"/>'
        )
        lines.append(f'<text x="{42 + 270 * (k % 2)}" y="{52 + 20 * (k // 2)}">{escape(text)}</text>')
    across, down = (left + width - right) / 2, (top + height - bottom) / 2
    places = f'x="{across}" y="{height - 12}"', f'transform="translate(18 {down}) rotate(-90)"'
    for where, text in zip(places, axes, strict=True):
        lines.append(f'<text class="quiet" {where} text-anchor="middle">{escape(text)}</text>')
    said = "; ".join(f"{name}: " + ", ".join(f"{x:g} {y:.3g}" for x, y in curve) for name, curve in curves.items())
    return svg(width, height, title, said, lines)


def slope(curve: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    xs, ys = ([math.log(point[k]) for point in curve] for k in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range; powers alone where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
