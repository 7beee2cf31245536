"""The report as one web page: no script, no network, for a phone, a desk and paper.

Needs jinja2 and matplotlib, which the `report` extra installs; nothing else in the package loads them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from onnx_optshift.errors import InputError
from onnx_optshift.report.figures import MINUS, NOTHING, change, estimate, number_text, percent
from onnx_optshift.report.findings import findings, verdict
from onnx_optshift.report.model import DataInfo, LayerReport, Report
from onnx_optshift.report.terminal import printable

if TYPE_CHECKING:
    from markupsafe import Markup

EXTRA = "report"
_TEMPLATE = "page.html.j2"
# Characters at the end of a long name that are always shown; its start is what a narrow column cuts.
_TAIL = 14
_LONG = 28
# Words of a verdict or a checklist, and how they look; each also has a sign, as colour alone tells not everybody.
_BADGES = {
    "pass": ("good", "\N{CHECK MARK}"),
    "go": ("good", "\N{CHECK MARK}"),
    "accepted": ("good", "\N{CHECK MARK}"),
    "shifted": ("good", "\N{CHECK MARK}"),
    "unchanged": ("plain", "="),
    "warn": ("warn", "!"),
    "try small": ("warn", "!"),
    "rejected": ("warn", "!"),
    "fail": ("bad", "\N{MULTIPLICATION X}"),
    "no-go": ("bad", "\N{MULTIPLICATION X}"),
    "refused": ("warn", "\N{MULTIPLICATION X}"),
}


def check_installed() -> None:
    """Refuses a page that could not be made, before the run starts.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise InputError(
                f"a report as .html needs the package {name}, which cannot be imported ({error}). "
                f"Install it with: pip install 'onnx-optshift[{EXTRA}]'"
            ) from error


def render(report: Report) -> str:
    """The report as the text of one self-contained HTML file; the same text for the same report.

    Args:
        report: Of any command.

    Raises:
        InputError: The `report` extra is not installed.
    """
    check_installed()
    import jinja2
    from markupsafe import Markup

    from onnx_optshift.report import charts

    source = resources.files("onnx_optshift.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": _cell,
        "change": lambda pair: change(*pair),
        "look": lambda word: _BADGES.get(word, ("plain", ""))[0],
        "name": _name,
        "number": _number,
        "percent": percent,
        "text": _text,
    }
    layers = charts.candidates(report)
    page = environment.from_string(source).render(
        report=report,
        # The folder too, as many models are called model.onnx.
        file=_text("/".join(re.split(r"[\\/]", report.model.input)[-2:])),
        bound=_bound(report.settings.get("tolerance")),
        status=_status(report),
        tiles=_tiles(report, layers),
        layers=layers,
        reasons=list(dict.fromkeys(layer.reason for layer in layers if layer.reason not in {"", layer.status})),
        skipped=_skipped(report.layers),
        verdict=verdict(report.collapse, report.flatness),
        flatness=findings(report.flatness),
        collapse=findings(report.collapse),
        charts={key: (chart, Markup(chart.svg)) for key, chart in charts.charts(report).items()},
        data=[(title, info) for title, info in _data(report) if info is not None],
        settings=[(key.replace("_", " "), _setting(value)) for key, value in report.settings.items()],
        chose=_chose(report),
        quantization=_quantization(report.quantization),
    )
    # Names may hold halves of surrogate pairs, which no file can.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _status(report: Report) -> tuple[str, str]:
    """How the run ended, as the look and the words of the line under the title."""
    proof = report.verification
    if proof is None:
        return "plain", "Inspection: no model was written, and no output was compared."
    samples = max((output.samples for output in proof.outputs), default=0)
    if not proof.passed:
        return "bad", f"Outputs left their bounds on {samples} samples."
    what = "the written file" if report.model.output else "the shifted model (dry run, not written)"
    return "good", f"Verified: {what} was run on {samples} samples, and every output stayed within its bound."


def _bound(tolerance: object) -> str:
    """Where the bounds of the outputs come from."""
    if tolerance == "auto":
        return "the deviation measured when held-out data had chosen the tolerance"
    return "the tolerance that was asked for" if tolerance else "a small multiple of the runtime's own noise"


def _tiles(report: Report, layers: Sequence[LayerReport]) -> list[tuple[str, Markup | str, str]]:
    """The figures that tell how the run went: label, figure, remark."""
    tiles: list[tuple[str, Markup | str, str]] = []
    shifted = sum(layer.status == "shifted" for layer in layers)
    skipped = len(report.layers) - len(layers)
    remark = f"{skipped} more skipped" if skipped else ""
    if report.verification is not None:
        tiles.append(("layers shifted", f"{shifted} of {len(layers)}", remark))
    else:
        free = sum(layer.rank is not None and layer.d is not None and layer.rank < layer.d for layer in layers)
        tiles.append(("layers with freedom", f"{free} of {len(layers)}", remark))
    norms = [(layer.norm_before, layer.norm_after) for layer in layers]
    known = [(a, b) for a, b in norms if a is not None and b is not None and math.isfinite(a + b)]
    before, after = (math.sqrt(math.fsum(pair[k] ** 2 for pair in known)) for k in (0, 1))
    if before:
        tiles.append(("norm of all weights", change(before, after), f"{number_text(before)} → {number_text(after)}"))
    if report.verification is not None and report.verification.outputs:
        worst = max(report.verification.outputs, key=lambda output: (math.isnan(output.rel), output.rel))
        remark = f"allowed: {number_text(worst.bound, 2)}"
        agreed = [o.top1_agreement for o in report.verification.outputs if o.top1_agreement is not None]
        # Nobody must read "within its bound" as "the same" where answers changed.
        remark += f"; same answer on {percent(min(agreed), 1)}" if agreed else ""
        tiles.append(("deviation of the outputs", _number(worst.rel, 2), remark))
    if result := report.heldout_result:
        loss = f"{number_text(result.before.loss)} → {number_text(result.after.loss)}"
        tiles.append(("held-out loss", loss, f"{result.after.n} samples"))
        if result.before.top1 is not None and result.after.top1 is not None:
            points = 100 * (result.after.top1 - result.before.top1)
            accuracy = f"{100 * result.before.top1:.1f} → {percent(result.after.top1, 1)}"
            remark = f"{points:+.2f} points".replace("-", MINUS) if points else "same"
            tiles.append(("held-out accuracy", accuracy, remark))
    return tiles


def _chose(report: Report) -> bool:
    """Whether held-out data picked among several candidates, so that its figures flatter the winner."""
    return report.heldout_result is not None and len(report.heldout_result.tried) > 1


def _data(report: Report) -> list[tuple[str, DataInfo | None]]:
    return [("Calibration data", report.calibration), ("Held-out data", report.heldout)]


def _skipped(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    by_reason: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.status == "skipped":
            by_reason.setdefault(layer.reason, []).append(layer)
    return by_reason


def _quantization(rows: Sequence[Mapping[str, Any]] | None) -> list[tuple[Any, Any, Any, Any, str]]:
    found = []
    for row in rows or ():
        before, after = row.get("error_before"), row.get("error_after")
        difference = change(estimate(before)[0], estimate(after)[0])
        found.append((row.get("layer"), row.get("bits"), before, after, difference))
    return found


def _text(value: object) -> str:
    return printable(str(value))


def _setting(value: object) -> str:
    if value is None or value == () or value == []:
        return NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return "yes" if value is True else "no" if value is False else _text(value)


def _number(value: float | None, digits: int = 3) -> Markup:
    """A number for people, with its full value kept for machines."""
    from markupsafe import Markup

    if value is None:
        return Markup('<span class="nothing" title="not measured">{}</span>').format(NOTHING)
    if not math.isfinite(value):
        return Markup('<strong class="odd">{}</strong>').format(number_text(value))
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), number_text(value, digits))


def _cell(value: Any) -> Markup | str:
    """One value of a table whose columns are not known beforehand."""
    from markupsafe import Markup

    if isinstance(value, Mapping):
        figure, error = value.get("value"), value.get("error")
        shown = _number(figure)
        return shown if error is None else Markup("{} ± {}").format(shown, _number(error, 2))
    if isinstance(value, str):
        if value in _BADGES:
            look, sign = _BADGES[value]
            return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
                look, sign, value
            )
        return _name(value) if " " not in value else _text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if value is None or isinstance(value, float):
        return _number(value)
    return _text(value)


def _name(value: object) -> Markup:
    """A name that a narrow column may cut in its middle: both ends tell layers apart. Whole on paper and on hover."""
    from markupsafe import Markup

    text = _text(value)
    if len(text) <= _LONG:
        return Markup('<span class="name">{}</span>').format(text)
    cut = len(text) - _TAIL
    while cut < len(text) and unicodedata.combining(text[cut]):
        cut += 1
    parts = Markup('<span class="head">{}</span><span class="tail">{}</span>').format(text[:cut], text[cut:])
    return Markup('<span class="name" title="{}">{}</span>').format(text, parts)
