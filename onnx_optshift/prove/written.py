"""The proof on the written file: what is in it is compared byte by byte, what it computes sample by sample."""

from __future__ import annotations

from onnx_optshift.calibration.source import Samples
from onnx_optshift.prove.floor import Floor, Promise, noise_floor, verification
from onnx_optshift.prove.static import unchanged_outside
from onnx_optshift.report.model import Verification
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.outputs import Arrays
from onnx_optshift.write.atomic import Written, digest


class Prover:
    """Proves written files against one model on the samples that a promise covers.

    Args:
        bench: The original model.
        seed: Of the rounding floor's directions.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench = bench
        self._seed = seed
        self._floors: dict[tuple[str, frozenset[str]], Floor] = {}

    def floor(self, samples: Samples, names: frozenset[str]) -> Floor:
        """The noise of the original on these samples, and what rounding these weights does; measured once."""
        key = (samples.fingerprint, names)
        if key not in self._floors:
            self._floors[key] = noise_floor(self._bench, samples, names, self._seed)
        return self._floors[key]

    def prove(self, written: Written, arrays: Arrays, promise: Promise | None) -> tuple[str, Verification]:
        """Compares a written file with the original.

        A copy is proved by its bytes alone, even where the model's own outputs are random.

        Args:
            written: The file, in its temporary place.
            arrays: What was to change in it.
            promise: What it is held to; None where there is no data, and so nothing may have changed.

        Returns:
            SHA-256 of the file, and the proof.

        Raises:
            PatchError: Other bytes differ than should.
            ToleranceError: The original's noise is so large that nothing can be proved.
        """
        bench = self._bench
        bench.sessions.rest()  # what was written was read for it
        unchanged_outside(bench.model, written.temp_path, set(arrays))
        sha256 = digest(written.temp_path)
        identical = sha256 == bench.model.sha256
        if identical or promise is None:
            return sha256, Verification(passed=True, outputs=(), noise_floor=None, identical_bytes=identical)
        floor = self.floor(promise.covered, frozenset(arrays))
        difference = bench.outputs.deviation(promise.covered, {}, lambda: bench.sessions.open(written.temp_path))
        return sha256, verification(difference.results(), floor, promise)
