"""From a decision to a verified file: write beside, prove on the written file, back off if need be.

What comes out still has its temporary name: the caller renames it when everything else that may fail is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from onnx_optshift.decide.choose import Decision
from onnx_optshift.errors import ToleranceError
from onnx_optshift.graph.atomic import Written
from onnx_optshift.graph.leftovers import digest
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.patch import write_beside
from onnx_optshift.graph.static_check import unchanged_outside
from onnx_optshift.layers import Candidate, Layers
from onnx_optshift.proof import Floor, noise_floor, verification
from onnx_optshift.report.model import Verification
from onnx_optshift.workbench import Workbench

# Written candidates after which a run gives up.
MOST_ATTEMPTS = 5


@dataclass(frozen=True)
class Proved:
    """A verified file beside its final place.

    Attributes:
        written: To be committed; discarded when the block that this opens ends without that.
        sha256: Of the model file.
        candidate: The shifts that are in it.
        reverted: Initializers put back because the outputs left the tolerance.
        verification: The proof; None when there was no data to run and the file's storage changed.
    """

    written: Written
    sha256: str
    candidate: Candidate
    reverted: tuple[str, ...]
    verification: Verification | None

    def __enter__(self) -> Proved:
        return self

    def __exit__(self, *_: object) -> None:
        self.written.discard()  # does nothing once committed


def write_and_prove(
    bench: Workbench, decision: Decision | None, layers: Layers | None, out: Path, *, external: bool, seed: int
) -> Proved:
    """Writes a decision's shifts beside OUT and proves the outputs on the written file.

    Args:
        bench: The original model.
        decision: What to write and what is promised; None copies the model.
        layers: For solving again when a tolerance was missed.
        out: The file's final name.
        external: Whether weights go to an external data file.
        seed: Of the rounding floor's directions.

    Raises:
        InputError: The file cannot be written.
        ToleranceError: The outputs left the tolerance and backing off did not help; nothing was written.
    """
    if decision is None or layers is None:
        return _copy(bench.model, out, external=external)
    candidate = decision.candidate
    floor = noise_floor(bench, decision.covered, candidate.arrays, seed)
    reverted: tuple[str, ...] = ()
    for attempt in range(1, MOST_ATTEMPTS + 1):
        arrays = candidate.arrays
        written = write_beside(bench.model, arrays, out, save_as_external=external)
        try:
            bench.rest()  # what was written was read for it
            unchanged_outside(bench.model, written.temp_path, arrays)
            difference = bench.deviation(decision.covered, {}, partial(bench.session, written.temp_path))
            proof = verification(difference.results(), floor, decision.tolerance, attempts=attempt, reverted=reverted)
            sha256 = digest(written.temp_path)
            identical = sha256 == bench.model.sha256
            if proof.passed or identical:  # a copy is proved by its bytes, even where the model's outputs are random
                proof = replace(proof, passed=True, identical_bytes=identical)
                return Proved(written, sha256, candidate, reverted, proof)
        except BaseException:
            written.discard()
            raise
        written.discard()
        if not arrays:
            break
        if decision.tolerance > 0 and candidate.tolerance > 0 and attempt < MOST_ATTEMPTS - 1:
            shrink = 0.9 * decision.tolerance / difference.largest_rel()
            candidate = layers.candidate(candidate.tolerance * min(shrink, 0.9), list(candidate.solved))
        else:
            candidate, reverted = _revert(bench, candidate, decision, floor)
    raise ToleranceError(_missed(proof))


def _revert(
    bench: Workbench, candidate: Candidate, decision: Decision, floor: Floor
) -> tuple[Candidate, tuple[str, ...]]:
    """Puts back as few shifts as it takes, those that gain least first, found by bisection on trial runs."""

    def gain(name: str) -> float:
        shift = candidate.solved[name].shift
        return shift.norm_before**2 - shift.norm_after**2

    order = sorted(candidate.arrays, key=gain)

    def passes(count: int) -> bool:
        kept = candidate.only(order[count:])
        results = bench.deviation(decision.covered, kept.arrays).results()
        return verification(results, floor, decision.tolerance, attempts=0, reverted=()).passed

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    put_back = set(order[:high])
    return candidate.only(name for name in candidate.solved if name not in put_back), tuple(order[:high])


def _missed(proof: Verification) -> str:
    worst = max((o for o in proof.outputs if not o.passed), key=lambda o: o.rel)
    return (
        f"verification: output {worst.name!r} deviates by {worst.rel:.3g} (relative; largest of a sample "
        f"{worst.max_rel:.3g}), allowed is {worst.bound:.3g}, and backing off did not help. Nothing was written. Give "
        "a larger --tolerance, or exclude layers with --nodes-to-exclude."
    )


def _copy(model: ModelFile, out: Path, *, external: bool) -> Proved:
    written = write_beside(model, {}, out, save_as_external=external)
    sha256 = digest(written.temp_path)
    proof = None
    if sha256 == model.sha256:  # a copy needs no run to be proved
        proof = Verification(passed=True, outputs=(), noise_floor=None, attempts=0, identical_bytes=True)
    return Proved(written, sha256, Candidate({}, 0.0), (), proof)


def copy_model(source: Path, out: Path) -> Path:
    """Copies a model file with its external data, by an atomic rename.

    Raises:
        InputError: The file cannot be read or written.
    """
    with write_beside(ModelFile.load(source), {}, out) as written:
        written.commit()
    return out
