"""The report as JSON: valid in any case, as figures that are not finite become words."""

from __future__ import annotations

import json

from onnx_optshift.report.model import Report


def to_json(report: Report) -> str:
    """The report as JSON text, indented, with a final newline."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
