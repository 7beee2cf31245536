"""Replaces the weights of an ONNX model by better solutions of the same equations, and proves that outputs stayed.

Importing this package is cheap: torch and ONNX Runtime are loaded by the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_optshift.api import inspect, shift, verify
    from onnx_optshift.errors import DeviceError, InputError, OptShiftError, ToleranceError
    from onnx_optshift.report.model import Report
    from onnx_optshift.settings import Settings

    __version__: str

__all__ = [
    "DeviceError",
    "InputError",
    "OptShiftError",
    "Report",
    "Settings",
    "ToleranceError",
    "__version__",
    "inspect",
    "shift",
    "verify",
]

_HOMES = {
    "DeviceError": "errors",
    "InputError": "errors",
    "OptShiftError": "errors",
    "Report": "report.model",
    "Settings": "settings",
    "ToleranceError": "errors",
    "inspect": "api",
    "shift": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(import_module(f"onnx_optshift.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'onnx_optshift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("onnx-optshift")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"
