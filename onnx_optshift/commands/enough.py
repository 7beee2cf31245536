"""Whether calibration data shows enough for a shift: its different samples, and ranks that grow with them."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_optshift.calibration.source import Samples
from onnx_optshift.errors import InputError
from onnx_optshift.report.model import LayerReport

# Different samples below which a shift is refused: what they leave free is mostly what they do not show.
FEWEST_DISTINCT = 16


def check_distinct(samples: Samples, heldout: Samples | None, *, force: bool) -> str:
    """What the summary says of samples that are too few to shift on; empty where they are not.

    Where the shift was judged by enough others, few may do.

    Raises:
        InputError: They are too few, and it was not asked to go on.
    """
    found = samples.distinct
    if samples.synthetic or found >= FEWEST_DISTINCT or (heldout and heldout.distinct >= FEWEST_DISTINCT):
        return ""
    count = f"{found} distinct sample{'' if found == 1 else 's'}"
    if force:
        return f", on {count} only: other inputs may need what these leave free"
    raise InputError(
        f"{samples.source}: {count} found, expected at least {FEWEST_DISTINCT}: what so few leave "
        "free, other inputs may need. Nothing was written. Give more data with --calib, as many others with --heldout, "
        "or shift all the same with --force."
    )


def growth(layers: Sequence[LayerReport]) -> str:
    """Layers whose rank is low because samples are few, in a sentence; empty where there are none."""
    found = [layer for layer in layers if layer.growing]
    if not found:
        return ""
    worst = max(found, key=lambda layer: layer.free or 0)
    whole = (worst.d or 0) * (worst.groups or 1)
    others = f", and of {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"rank {whole - (worst.free or 0)} of {whole} ({worst.name}{others}), still growing: more calibration data "
        "would leave less freedom"
    )
