"""The pass: prepare, capture, solve and decide, write, prove, report. The only page that knows this order."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_optshift.commands.enough import check_distinct, growth
from onnx_optshift.commands.next_step import next_step
from onnx_optshift.commands.outcome import shift_summary
from onnx_optshift.commands.places import check_places
from onnx_optshift.commands.publish import published
from onnx_optshift.decide.choose import choose
from onnx_optshift.decide.decision import Grounds
from onnx_optshift.decide.grounds import drawn_layers, grounds_of
from onnx_optshift.diagnosis.flatness import flatness_of
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.report.build import Clock, Findings, build_report
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.budget import peak_memory
from onnx_optshift.run.capture import captured, objective_of
from onnx_optshift.run.prepare import Prepared, judges_nothing, prepare
from onnx_optshift.run.world import ALONE, World
from onnx_optshift.settings import Settings
from onnx_optshift.write.atomic import Written, check_target, system_errors
from onnx_optshift.write.patch import write_beside

if TYPE_CHECKING:
    import onnx

GATE_OFF = "the held-out gate is off: data unlike the calibration data may be served worse."


@dataclass(frozen=True)
class Result:
    """A finished, verified run."""

    report: Report  # everything that was found, decided and measured
    path: Path  # the verified model file: OUT, or a temporary file that lives as long as this object

    @property
    def model(self) -> onnx.ModelProto:
        """The verified model, read from its file with all its data."""
        import onnx

        return onnx.load(self.path)

    def save(self, path: str | Path) -> Path:
        """Copies the verified file to `path`, by an atomic rename.

        Raises:
            InputError: The file cannot be written.
        """
        with write_beside(ModelFile.load(self.path), {}, Path(path)) as written:
            written.commit()
        return Path(path)


def run(
    model: str | Path | onnx.ModelProto,
    out: Path | None,
    calibration: Sequence[object] | None,
    heldout: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
    *,
    reports: Sequence[Path] = (),
    world: World = ALONE,
) -> Result:
    """The whole pass; writes OUT unless it is None or the run is dry.

    Without calibration data it is looked for beside the model, and made up otherwise; without held-out data some is
    split off, unless that is `["none"]`. `reports` are files that the caller is going to write. Of several processes
    each calls it in the same way; the first one writes, and all return the same.
    """
    clock = Clock(progress)
    output = None if settings.dry_run else out
    if output is not None:
        check_target(output)  # before the work, not after it
    check_places(output, reports, (), force=True, checkpoint=settings.checkpoint)  # what can be known by now
    with progress.stage("preparation"):
        prepared = prepare(model, settings, calibration, heldout, make_up=True, progress=progress, world=world)
    reads = [*prepared.reads, *prepared.model.data_files, settings.custom_op_library]
    check_places(output, reports, reads, force=settings.force, checkpoint=settings.checkpoint)
    off = (GATE_OFF,) if judges_nothing(heldout) and prepared.data is not None else ()
    with ExitStack() as stack:
        target = output or _hidden(stack, prepared)
        found = Findings("shift", prepared)
        grounds: Grounds | None = None
        few = ""
        if prepared.data is not None and prepared.weights:
            with clock("capture"):
                full, fit = captured(prepared, prepared.data, objective_of(prepared), until_full_rank=True)
            with clock("solve"):
                grounds = grounds_of(prepared, prepared.data, full, fit)
                decision = choose(grounds, settings, partial(drawn_layers, prepared, grounds))
            clock.seconds["judge"] = grounds.gate.seconds if grounds.gate else 0.0
            if decision.candidate.arrays:
                few = check_distinct(prepared.data.calibration, prepared.data.heldout, force=settings.force)
            found = replace(found, layers=full, decision=decision, gate=grounds.gate)
        with clock("verify"):
            written, sha256, proof, decided = published(prepared, grounds, found.decision, target)
        with written or nullcontext():
            # Whatever may still fail or be interrupted comes before the rename: OUT appears last.
            found = replace(found, decision=decided, sha256=sha256, verification=proof, output=output)
            report = _report(found, clock, off, few)
            world.meet()
            if written:
                written.commit()
        prepared.bench.checkpoint.finish()
        result = Result(report, target)
        weakref.finalize(result, stack.pop_all().close)  # a temporary file lives as long as the result
        return result


def _hidden(stack: ExitStack, prepared: Prepared) -> Path:
    """A place that vanishes with the stack, for a model that is not to be kept."""
    target = Path(tempfile.gettempdir(), prepared.model.path.name if prepared.model.path else "model.onnx")
    with system_errors(target):
        folder = stack.enter_context(Written(target)).temp_folder
        folder.mkdir(0o700)
    return folder / target.name


def _report(found: Findings, clock: Clock, warnings: tuple[str, ...], few: str) -> Report:
    data, decision, settings = found.prepared.data, found.decision, found.prepared.settings
    report = build_report(found, clock, warnings=(*(data.warnings if data else ()), *warnings), summary="")
    if settings.flatness and data is not None and found.prepared.weights and decision is not None:
        arrays = decision.candidate.arrays or None
        report = replace(report, flatness=flatness_of(found.prepared.bench, data.calibration, settings, arrays))
    where = few
    if data is not None and decision is not None and len(decision.promise.covered) < len(data.calibration):
        where += f" on the {len(decision.promise.covered)} samples that the stochastic shift keeps"
    if data is not None and data.calibration.synthetic:
        where += ", on random inputs only: there was no calibration data"
    if more := growth([layer for layer in report.layers if layer.status == "shifted"]):
        where += f"; {more}"
    summary = shift_summary(report.layers, found.verification, where, written=found.output is not None)
    report = replace(report, summary=summary, next_step=next_step(report, found.layers))
    return replace(report, timing=clock.timing(), peak_memory_bytes=peak_memory())
