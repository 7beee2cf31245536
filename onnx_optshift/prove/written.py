"""The proof on the written file: what is in it is compared byte by byte, what it computes sample by sample."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from onnx_optshift.errors import InputError
from onnx_optshift.prove.floor import FEW_SAMPLES, NOISE_SAMPLES, Floor, Promise, noise_floor, verification
from onnx_optshift.prove.static import holds
from onnx_optshift.report.model import Verification
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.write.atomic import digest


class Prover:
    """Proves files against one model on the samples that a promise covers; `seed` is of the rounding directions."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench = bench
        self._seed = seed
        self._floors: dict[tuple[str, frozenset[str]], Floor] = {}

    def floor(self, promise: Promise, names: Collection[str], most: int = NOISE_SAMPLES) -> Floor:
        """The noise of the original on some of what a promise covers, and what rounding these weights does there.

        Measured once. Where a tolerance was granted, few samples do: the floor is a figure beside it, not the bound.
        """
        count = min(len(promise.covered), FEW_SAMPLES if promise.tolerance > 0 else most)
        samples = promise.covered.select(np.arange(count))
        key = (samples.fingerprint, frozenset(names))
        if key not in self._floors:
            self._floors[key] = noise_floor(self._bench, samples, names, self._seed)
        return self._floors[key]

    def prove(self, path: Path, arrays: Arrays, promise: Promise | None) -> tuple[str, Verification]:
        """SHA-256 of a file in its temporary place, and its proof; without a promise nothing may have changed.

        Raises:
            PatchError: The file holds other bytes than it should.
            InputError: A process does not find the file.
            ToleranceError: The original's noise is so large that nothing can be proved.
        """
        world = self._bench.world
        self._bench.sessions.rest()  # what was written was read for it
        sha256 = world.once(lambda: self._checked(path, arrays))
        if unseen := [rank for rank, seen in enumerate(world.gather(path.exists())) if not seen]:
            raise InputError(
                f"{path}: was written, and process {unseen[0]} does not find it. Choose an output path in a folder "
                "that all hosts share."
            )
        return sha256, self.compare(path, sha256, set(arrays), promise)

    def _checked(self, path: Path, arrays: Arrays) -> str:
        """SHA-256 of a file that holds what it should."""
        holds(self._bench.model, path, arrays)
        return digest(path)

    def compare(self, path: Path, sha256: str, names: Collection[str], promise: Promise | None) -> Verification:
        """The outputs of a file in which these weights differ, beside the original's.

        A copy is proved by its bytes alone, even where the model's own outputs are random.
        """
        identical = sha256 == self._bench.model.sha256
        if identical or promise is None:
            return Verification(passed=True, outputs=(), noise_floor=None, identical_bytes=identical)
        found = self._bench.outputs.deviation(promise.covered, {}, lambda: self._bench.sessions.open(path)).results()
        proof = verification(found, self.floor(promise, names, FEW_SAMPLES), promise)
        return proof if proof.passed else verification(found, self.floor(promise, names), promise)
