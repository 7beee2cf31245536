"""Where the time of one run goes: seconds by purpose and by kind of work.

    python tools/bench_profile.py MODEL [OPTIONS of python -m onnx_optshift]

The run happens in this process, with clocks around the functions listed below; a clock stops while another one runs
inside it, so that the seconds add up. A purpose is the innermost of its kind around the work. Threads have clocks of
their own: work that overlaps counts twice, and the sum may exceed the time that passed. Beside the seconds that passed
stand the processor's, of all threads: with one thread they tell the costs on a busy machine too.
"""

from __future__ import annotations

import functools
import importlib
import io
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

# What the work is for: functions by the place where they are defined. The innermost counts.
PURPOSES = {
    "preparation": ["run.prepare:prepare"],
    "capture": ["run.bench:Bench.capture"],
    "solve": ["run.layers:Layers.solve", "run.layers:Layers.problem"],
    "gate": ["decide.gate:Gate.judge", "decide.gate:Gate.run"],
    "noise floor": ["prove.floor:noise_floor"],
    "written file": ["prove.written:Prover.prove"],
    "report": ["commands.shift:_report"],
}
# Kinds of work: what no other clock inside takes is theirs.
WORK = {
    "session opened": ["capture.session:Session.__init__"],
    "ONNX Runtime": ["capture.session:Session._run", "capture.session:Session._run_bound"],
    "finite check, slicing": ["stats.rows:observe"],
    "rows to float64": ["stats.rows:_add"],
    "products": ["stats.moments:InputMoments.update", "stats.patches:patch_gram", "stats.moments:_add_product"],
    "moments merged": ["stats.moments:InputMoments.merge", "stats.moments:InputMoments.gram"],
    "rank looked at": ["run.spanning:Spanning.wanted"],
    "eigh or SVD": ["solve.spectrum:factor"],
    "V in the eigenbasis": ["solve.spectrum:Spectrum.coordinates"],
    "W from the eigenbasis": ["solve.spectrum:Coordinates.combine"],
    "residual": ["solve.problem:Problem.residual"],
    "figures of the layer": ["run.candidate:facts_of", "run.layers:Layers.measured"],
    "V to float64": ["solve.finish:as_matrix"],
    "solution rounded": ["solve.finish:finished"],
    "objection": ["solve.objective:Norm.objection"],
    "outputs compared": ["prove.compare:OutputsDifference.update"],
    "weights moved by one unit": ["prove.floor:_one_ulp_away"],
    "bytes compared and hashed": ["prove.static:holds", "write.atomic:digest"],
    "probe made": ["graph.probes:probe_model"],
    "model read": ["graph.modelfile:ModelFile.load"],
    "layers found": ["graph.discover:discover"],
    "data loaded": ["calibration.load:load"],
    "file written": ["write.patch:write_beside"],
}


class Clocks:
    """Seconds and calls by (purpose, work)."""

    def __init__(self) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.processor: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.missing: list[str] = []
        self._local = threading.local()

    def install(self) -> None:
        """Puts clocks around all functions of the tables that exist, under every name that they were imported by."""
        importlib.import_module("onnx_optshift.commands.shift")
        for table, is_purpose in ((PURPOSES, True), (WORK, False)):
            for label, places in table.items():
                for place in places:
                    self._wrap(place, label, is_purpose=is_purpose)

    def _wrap(self, place: str, label: str, *, is_purpose: bool) -> None:
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(f"onnx_optshift.{module}")
        *parents, name = path.split(".")
        try:
            for parent in parents:
                owner = getattr(owner, parent)
            found = owner.__dict__[name]
        except (AttributeError, KeyError):
            self.missing.append(place)
            return
        inner = found.__func__ if isinstance(found, classmethod) else found
        timed = self._timed(inner, label, is_purpose=is_purpose)
        setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)
        for key, other in list(sys.modules.items()):
            if not parents and key.startswith("onnx_optshift.") and other.__dict__.get(name) is found:
                setattr(other, name, timed)

    def _timed(self, function: Callable[..., Any], label: str, *, is_purpose: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            local = self._local
            before = getattr(local, "now", ("other", "other"))
            local.now = (label, "other") if is_purpose else (before[0], label)
            self.calls[local.now] += 1
            self.lap(before)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap(local.now)
                local.now = before

        return timed

    def lap(self, key: tuple[str, str]) -> None:
        """Gives the time since the last lap to what ran in it."""
        now, used = time.perf_counter(), time.process_time()
        since, before = getattr(self._local, "since", (now, used))
        self.seconds[key] += now - since
        self.processor[key] += used - before
        self._local.since = now, used

    def table(self, total: float) -> str:
        """The biggest first."""
        lines = [f"{'purpose':<14}{'work':<28}{'seconds':>9}{'share':>8}{'processor':>11}{'calls':>8}"]
        for key, seconds in self.seconds.most_common():
            if seconds >= 0.002 * total:
                figures = f"{seconds:>9.2f}{seconds / total:>8.1%}{self.processor[key]:>11.2f}{self.calls[key]:>8}"
                lines.append(f"{key[0]:<14}{key[1]:<28}{figures}")
        for purpose in dict.fromkeys(purpose for purpose, _ in self.seconds):
            sums = [
                sum(value for (p, _), value in clock.items() if p == purpose)
                for clock in (self.seconds, self.processor)
            ]
            lines.append(f"{purpose:<14}{'all of it':<28}{sums[0]:>9.2f}{sums[0] / total:>8.1%}{sums[1]:>11.2f}")
        used = sum(self.processor.values())
        lines.append(f"{'':<14}{'from arguments to file':<28}{total:>9.2f}{1:>8.1%}{used:>11.2f}")
        return "\n".join([*lines, *(f"no such function any more: {place}" for place in self.missing)])


def main() -> None:
    """Runs the command line given, and prints the table."""
    from onnx_optshift.cli import main as command

    clocks = Clocks()
    clocks.install()
    with tempfile.TemporaryDirectory() as folder:
        model, *options = sys.argv[1:]
        start = time.perf_counter()
        clocks.lap(("other", "other"))
        with redirect_stdout(io.StringIO()):  # the report
            status = command([model, str(Path(folder) / "out.onnx"), *options])
        clocks.lap(("other", "other"))
        print(clocks.table(time.perf_counter() - start))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
