"""`polygraphy run m.onnx --onnxrt --optshift ...`: the shifted model as a runner, compared with the original.

The entry point group `polygraphy.run.plugins` names `argument_groups`. Polygraphy imports this module for every `run`,
so that nothing heavy is loaded here: the pass is imported by the loader, when the script that `run` makes calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polygraphy import util
from polygraphy.backend.base import BaseLoader
from polygraphy.backend.onnx import infer_shapes
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import DataLoaderArgs, ModelArgs, OnnxLoadArgs, OnnxrtSessionArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from onnx_optshift.arguments import parser_for
from onnx_optshift.errors import OptShiftError
from onnx_optshift.options import SHIFT

# What matters in a comparison; each is there as --optshift-NAME.
OPTIONS = ("--calib", "--heldout", "--tolerance", "--objective", "--quantization-bits", "--range-block")


class ShiftedOnnx(BaseLoader):
    """A loader of the shifted model's file.

    Args:
        model: Path, ModelProto, or a callable that returns one.
        calibration: Paths of calibration data; None looks beside the model.
        save_path: Where the shifted model is to be kept; None keeps it as long as the loader lives.
        **settings: `heldout`, and fields of `onnx_optshift.Settings`.
    """

    def __init__(
        self, model: Any, calibration: list[str] | None = None, save_path: str | None = None, **settings: Any
    ) -> None:
        self._model, self._calibration, self._save_path, self._settings = model, calibration, save_path, settings
        self._result: Any = None  # its file vanishes with it

    @util.check_called_by("__call__")  # type: ignore[untyped-decorator]  # the package has no types
    def call_impl(self) -> str:
        """Path of the shifted model's verified file; the run's summary is logged."""
        import onnx_optshift

        model, loaded = util.invoke_if_callable(self._model)
        model = infer_shapes(model) if loaded else model  # outputs that --onnx-outputs adds come without a type
        with _one_message():
            self._result = onnx_optshift.shift(model, self._calibration, **self._settings)
            path = self._result.path if self._save_path is None else self._result.save(self._save_path)
        G_LOGGER.info(f"onnx-optshift: {self._result.report.summary}")
        for warning in self._result.report.warnings:
            G_LOGGER.warning(f"onnx-optshift: {warning}")
        return str(path)


def calibration_feeds(model: str, calibration: list[str]) -> Iterator[dict[str, Any]]:
    """Calibration data in any form that onnx-optshift reads, as a data loader of Polygraphy."""
    from onnx_optshift.calibration.load import load

    with _one_message():  # 32 samples together, as Polygraphy prints for each feed
        yield from (batch.feeds for batch in load(calibration, _inputs(model)).batches(32))


@contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
    except OptShiftError as error:
        G_LOGGER.critical(str(error))  # raises what `polygraphy` shows without a traceback


def _inputs(model: str) -> Any:
    from onnx_optshift.graph.modelfile import ModelFile
    from onnx_optshift.run.prepare import input_specs
    from onnx_optshift.settings import Settings

    return input_specs(ModelFile.load(Path(model)), Settings())


class _CalibrationDataArgs(DataLoaderArgs):
    """Data Loader: loading calibration data of onnx-optshift, where the user's own options would make random inputs."""

    def __init__(self, given: DataLoaderArgs, loader: Any) -> None:
        self.__dict__.update(vars(given))
        self._loader = loader

    def add_to_script_impl(self, script: Any, user_input_metadata_str: Any = None) -> Any:
        script.add_import(imports=["calibration_feeds"], frm=__name__)
        return script.set_data_loader(self._loader)

    def is_using_random_data(self) -> bool:
        return False


class OptShiftRunnerArgs(BaseRunnerArgs):
    """Optimum Shifting Inference: running inference with ONNX-Runtime on weights that onnx-optshift has shifted."""

    def get_name_opt_impl(self) -> tuple[str, str]:
        """Name of the runner, and of the option that selects it."""
        return "ONNX-Runtime, shifted by onnx-optshift", "optshift"

    def add_parser_args_impl(self) -> None:
        """Adds the options, with the meaning that they have on onnx-optshift's own command line."""
        known = parser_for(SHIFT)._option_string_actions
        for flag, ours in ((flag, known[flag]) for flag in OPTIONS):
            name, kind = f"--optshift-{flag[2:]}", {"type": ours.type, "nargs": ours.nargs, "metavar": ours.metavar}
            self.group.add_argument(name, dest=f"optshift_{ours.dest}", default=None, help=ours.help, **kind)
        self.group.add_argument("--optshift-save", dest="optshift_save_path", metavar="FILE", help="keep the model")

    def parse_impl(self, args: Any) -> None:
        """Reads them into `options`, keyword arguments of `ShiftedOnnx`; None for what was not given."""
        given = {name.partition("optshift_"): value for name, value in vars(args).items()}
        self.options = {name: value for (_, ours, name), value in given.items() if ours}

    def add_to_script_impl(self, script: Any) -> None:
        """Adds the loader, a session of what it gives, and the runner."""
        from onnx_optshift.calibration.load import beside

        path, data = self.arg_groups[ModelArgs].path, self.arg_groups[DataLoaderArgs]
        calibration = self.options["calibration"]
        if data.is_using_random_data():
            with _one_message():
                calibration = calibration or [str(found) for found in beside(Path(path), _inputs(path))]
            # A shift is made for the calibration data: on noise even an exact one may differ.
            if calibration and data.iterations is data.val_range is data.seed is None:
                loader = make_invocable("calibration_feeds", path, calibration)
                self.arg_groups[DataLoaderArgs] = _CalibrationDataArgs(data, loader)
        elif not calibration:
            calibration = data.load_inputs_paths or [f"{data.data_loader_script}:{data.data_loader_func_name}"]
        # A path where that is possible: external data stays where it is, and what lies beside the model is found.
        loads = self.arg_groups[OnnxLoadArgs]
        model = loads.add_to_script(script) if loads.must_use_onnx_loader() else path
        script.add_import(imports=["ShiftedOnnx"], frm=__name__)
        shifted = make_invocable("ShiftedOnnx", model, **{**self.options, "calibration": calibration or None})
        loader = script.add_loader(shifted, "shift_onnx")
        session = self.arg_groups[OnnxrtSessionArgs].add_to_script(script, onnx_name=loader)
        script.add_import(imports=["OnnxrtRunner"], frm="polygraphy.backend.onnxrt")
        script.add_runner(make_invocable("OnnxrtRunner", session, name="onnx-optshift"))


def argument_groups() -> list[BaseRunnerArgs]:
    """What the entry point `polygraphy.run.plugins` gives: the argument groups to add to `polygraphy run`."""
    return [OptShiftRunnerArgs()]
