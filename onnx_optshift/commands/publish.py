"""From a decision to a proved file: written beside its place, proved there, decided anew until it keeps its promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx_optshift import journal
from onnx_optshift.decide.back_off import REVERTED, reverted, shrunk
from onnx_optshift.decide.decision import Decision, Grounds
from onnx_optshift.errors import ToleranceError
from onnx_optshift.prove.floor import missed
from onnx_optshift.prove.written import Prover
from onnx_optshift.report.model import Verification
from onnx_optshift.run.prepare import Prepared
from onnx_optshift.write.atomic import Written
from onnx_optshift.write.patch import write_beside

# Written candidates after which a run gives up; the first ones shrink all layers, the rest revert some.
MOST_ATTEMPTS, SHRINKS = 6, 3


def published(
    prepared: Prepared, grounds: Grounds | None, decision: Decision | None, out: Path
) -> tuple[Written | None, str, Verification, Decision | None]:
    """Writes a decision's shifts beside OUT and proves them on the written file, backing off where need be.

    Without a decision it is a copy. Returns the file, to be committed, where this process wrote it, as the first of
    several does; its SHA-256; the proof; and the decision that it holds.

    Raises:
        InputError: The file cannot be written.
        ToleranceError: The outputs left the tolerance and backing off did not help; nothing was written.
    """
    settings, prover = prepared.settings, Prover(prepared.bench, prepared.settings.seed)
    world = prepared.bench.world
    for attempt in range(1, MOST_ATTEMPTS + 1):
        arrays = decision.candidate.arrays if decision else {}
        written: Written | None = None
        if world.first:
            written = write_beside(prepared.model, arrays, out, save_as_external=settings.save_as_external_data)
        try:
            path = world.broadcast(written.temp_path if written else out)
            sha256, proof = prover.prove(path, arrays, decision.promise if decision else None)
        except BaseException:
            if written:
                written.discard()
            raise
        if proof.passed:
            if not written:
                journal.renaming(path, out)  # by the first process, at any time from now on
            put_back = [name for name, why in decision.rejected.items() if why == REVERTED] if decision else []
            return written, sha256, replace(proof, attempts=attempt, reverted=tuple(put_back)), decision
        if written:
            written.discard()
        if decision is None or grounds is None or not arrays:
            break
        if decision.promise.tolerance > 0 and decision.candidate.tolerance > 0 and attempt <= SHRINKS:
            decision = shrunk(grounds, decision, proof)
        else:
            decision = reverted(grounds, decision, prover.floor(decision.promise, arrays))
    raise ToleranceError(missed(proof))
