"""Writes the table of docs/quantization.md: what held-out data sees of the models in models/ at few bits.

python tools/rounding_table.py            runs everything, and rewrites the table
python tools/rounding_table.py MODEL ...  prints the rows of some models only
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from compare_rounding import WAYS, Row, measure

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quantization.md"
START, END = "<!-- table: quantization -->", "<!-- end of the table -->"
# Name in models/, and the block of inputs that shares a scale.
CASES = (
    ("digits_mlp", None),
    ("noisy_mlp", None),
    ("digits_cnn", None),
    ("digits_transformer", None),
    ("digits_transformer", 32),
)
BITS = (4, 3, 2)
SEEDS = (0, 1, 2)


def lines(name: str, block: int | None, bits: Sequence[int] = BITS) -> list[str]:
    """The rows of one model."""
    folder = ROOT / "models" / name
    calib, heldout = ([str(folder / f"{part}.npz")] for part in ("calibration", "heldout"))
    rows = list(measure(folder / "model.onnx", calib, heldout, bits, block=block, seeds=SEEDS))
    where = f"blocks of {block}" if block else "channel"
    return [_line(name, where, width, [row for row in rows if row.bits == width], rows[0]) for width in bits]


def _line(name: str, where: str, bits: int, rows: Sequence[Row], exact: Row) -> str:
    least = min(row.error for row in rows)
    cells = [f"**{row.error:.3f}**" if row.error == least else f"{row.error:.3f}" for row in rows]
    accuracies = [f"{100 * row.top1:.1f}" for row in (exact, rows[0], rows[1], rows[-1]) if row.top1 is not None]
    return f"| {name}, {where} | {bits} | {' | '.join(cells)} | {' / '.join(accuracies)} |"


def table() -> str:
    """The whole table."""
    head = f"| model, scale per | bits | {' | '.join(WAYS)} | top-1 %: float / RTN / GPTQ / on the grid |"
    rule = "|---" * (len(WAYS) + 3) + "|"
    body = [line for name, block in CASES for line in lines(name, block)]
    return "\n".join([head, rule, *body])


def main() -> None:
    """Reads the command line."""
    if names := sys.argv[1:]:
        for name, block in CASES:
            if name in names:
                print(*lines(name, block), sep="\n", flush=True)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2] if END in rest else rest
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
