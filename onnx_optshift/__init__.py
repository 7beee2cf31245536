"""Replaces the weights of an ONNX model by better solutions of the same equations, and proves that outputs stayed.

Importing this package is cheap: torch and ONNX Runtime are loaded by the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_optshift.api import diagnose, inspect, shift, verify
    from onnx_optshift.errors import DeviceError, InputError, OptShiftError, OptShiftWarning, ToleranceError
    from onnx_optshift.report.model import Report
    from onnx_optshift.settings import Settings

    __version__: str

__all__ = ["DeviceError", "InputError", "OptShiftError", "OptShiftWarning", "Report", "Settings", "ToleranceError"]
__all__ += ["__version__", "diagnose", "inspect", "shift", "verify"]

_HOMES = {
    "api": ("diagnose", "inspect", "shift", "verify"),
    "errors": ("DeviceError", "InputError", "OptShiftError", "OptShiftWarning", "ToleranceError"),
    "report.model": ("Report",),
    "settings": ("Settings",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("onnx-optshift")
        except metadata.PackageNotFoundError:
            return "unknown (not installed)"
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"onnx_optshift.{home}"), name)
    raise AttributeError(f"module 'onnx_optshift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
