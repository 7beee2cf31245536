"""A pass for Olive, and the package configuration by which Olive finds it.

Olive (0.13) takes passes of other packages from a package configuration alone, and what it is given replaces its own:

    python -m onnx_optshift.integrations.olive > package_config.json
    olive run --config run.json --package-config package_config.json

or, in Python, `olive.workflows.run(run_config, package_config=package_config())`.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.onnx.common import get_external_data_file_names
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.resource_path import LocalFile, LocalFolder
from olive.search.search_parameter import SearchParameter

import onnx_optshift
from onnx_optshift.errors import OptShiftError, closest
from onnx_optshift.settings import Choices, Settings

logger = logging.getLogger(f"olive.{__name__}")  # below Olive's own, which is what Olive shows
# A model is always written, no report is shown, and nothing is compared with another model.
_SETTINGS = [f for f in fields(Settings) if f.name not in {"dry_run", "flatness", "max_drift"}]


class OptimumShift(Pass):
    """Replaces weights by better solutions of the same equations: smaller ones, or ones on a quantizer's grid.

    Outputs on the calibration data stay within `tolerance`, which is proved on the result. To be run before a pass
    that quantizes weights: `objective` "range" with that pass's `quantization_bits` and blocks (`range_block`).
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        types, said = get_type_hints(Choices), inspect.getdoc(Settings) or ""
        data, paths = DataConfig | dict[str, Any], str | list[str]
        rows = [(s.name, types[s.name], s.default, _meaning(s.name, said)) for s in _SETTINGS]
        rows += [
            ("data_config", data, None, "Data to calibrate on: outputs on all of it stay within the tolerance."),
            ("calibration", paths, None, "Files of it, in place of data_config."),
            ("heldout_data_config", data, None, "Data that judges; when not given, a part of the calibration data."),
            ("heldout", paths, None, "Files of it, in place of heldout_data_config, or 'none' for no judging."),
            # Olive keeps results by options: this one tells those of other versions apart.
            ("tool_version", str, onnx_optshift.__version__, "Version of onnx_optshift; not to be given."),
        ]
        return {name: PassConfigParam(type_=t, default_value=d, description=text) for name, t, d, text in rows}

    @classmethod
    def generate_config(
        cls,
        accelerator_spec: AcceleratorSpec,
        config: dict[str, Any] | None = None,
        point: dict[str, Any] | None = None,
        disable_search: bool | None = False,
    ) -> BasePassConfig:
        """As Olive has it, except that options which do not exist, or contradict each other, are errors.

        Raises:
            ValueError: An option cannot be used. Olive itself drops unknown ones with a warning.
        """
        known = list(cls.default_config(accelerator_spec))
        for name in config or {}:
            if name not in known:
                close = closest(name, known) or f" Known are {', '.join(known)}."
                raise ValueError(f"OptimumShift: there is no option {name!r}.{close}")
        made = super().generate_config(accelerator_spec, config, point, disable_search)
        if not any(isinstance(value, SearchParameter) for value in made.model_dump().values()):
            with _errors():
                Settings(**_settings(made))
        return made

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        calibration = _data(model, "data_config", config.data_config, "calibration", config.calibration)
        heldout = _data(model, "heldout_data_config", config.heldout_data_config, "heldout", config.heldout)
        if calibration is None:
            raise ValueError("OptimumShift: no data to calibrate on. Give data_config, or files in calibration.")
        with _errors():
            result = onnx_optshift.shift(model.model_path, calibration, heldout=heldout, **_settings(config))
        logger.info("%s", result.report.summary)
        if not any(layer.status == "shifted" for layer in result.report.layers):
            return model
        out = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        with _errors():
            result.save(out)  # the very file that was proved, its weights beside it where they were
        if not get_external_data_file_names(out):
            return ONNXModelHandler(LocalFile({"path": out}))
        return ONNXModelHandler(LocalFolder({"path": Path(out).parent}), onnx_file_name=Path(out).name)


def package_config() -> dict[str, Any]:
    """Olive's own package configuration with this pass in it."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    every = {f"supported_{what}": ["*"] for what in ("providers", "accelerators", "precisions")}
    none: dict[str, Any] = {"supported_algorithms": [], "supported_quantization_encodings": []}
    path = "onnx_optshift.integrations.olive.OptimumShift"
    config["passes"]["OptimumShift"] = {"module_path": path, "dataset": "dataset_required", **every, **none}
    return config


def _settings(config: BasePassConfig) -> Any:
    """The options that are settings of a shift."""
    return {setting.name: getattr(config, setting.name) for setting in _SETTINGS}


def _meaning(name: str, said: str) -> str:
    """What a docstring says of an attribute."""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^\S|\Z)", said, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _data(model: ONNXModelHandler, name: str, given: Any, in_place: str, paths: Any) -> Any:
    # Olive's reader for a data configuration, or the paths given in its place.
    if given and paths:
        raise ValueError(f"OptimumShift: {name} and {in_place} are the same data given twice. Leave one of them out.")
    if not given:
        return paths
    container = validate_config(given, DataConfig).to_data_container()
    return container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)


@contextmanager
def _errors() -> Iterator[None]:
    # ValueError ends Olive's run. After other types it says that there is no model, with exit status 0.
    try:
        yield
    except OptShiftError as error:
        raise ValueError(f"OptimumShift: {error}") from error


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=4))
