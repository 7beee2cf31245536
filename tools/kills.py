"""Kills runs at random moments, and looks at what stands at OUT afterwards.

    python tools/kills.py [MODEL] --kills 200 --seed 0
    python tools/kills.py [MODEL] --kills 100 --checkpoint

One kill in three comes at any moment of the run, two in its last part, where files are written. One case in three has
an old file at OUT, one has nothing there, one has the old file and writes external data. SIGKILL hits the waiting
process, the working one, or both at once, in turn. Whoever dies, OUT must be the old file or the finished new one,
byte for byte, with all its data. Afterwards a run that nobody kills must give the new file and clear away what the
killed ones left. Prints a table of the outcomes. Exit status 1 if any is broken.

With --checkpoint runs keep what they have done, a pass over the data after every batch, and are killed at any moment of
the run. Each is started again until it comes to its end, and must then have written the bytes of a run that nobody
disturbed and that kept nothing. Exact, tolerant and rounding runs take turns.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLD = b"\x08the old file"  # begins as models do: others are not replaced
LAST_PART = 0.7  # of a run's time: from here on files are written
CASES = ("old", "absent", "old, external data")
VICTIMS = ("waiting", "working", "both")
# Ways of a run with a checkpoint.
WAYS = {
    "exact": [],
    "tolerance": ["--tolerance", "0.02"],
    "rounded": ["--tolerance", "auto", "--objective", "range", "--quantization-bits", "4"],
}
# The command line, with passes that are kept after every batch; what is loaded is loaded where it always is.
OFTEN = """
from onnx_optshift import cli
def often(main=cli.main):
    from onnx_optshift.run import checkpoint_folder
    checkpoint_folder.EVERY, checkpoint_folder.LEAST_SHARE = 0.0, 0
    return main()
cli.main = often
cli.run()
"""


@dataclass(frozen=True)
class Outcome:
    """What one kill led to: which case, who was hit, what stands at OUT, how the run ended, what else lies there."""

    case: str
    victim: str
    out: str
    end: str
    rest: str


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(model: Path, out: Path, case: str) -> list[str]:
    """The command line of one run."""
    options = ["--heldout", "none", "--quiet", *(["--save-as-external-data"] if "external" in case else [])]
    return [sys.executable, "-m", "onnx_optshift", str(model), str(out), *options]


def children(process: int) -> list[int]:
    """Living children of a process, as /proc has them."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def kill(run: subprocess.Popen[bytes], victim: str) -> None:
    """SIGKILL for the waiting process, the one that works for it, or both at once."""
    if victim == "both":
        os.killpg(run.pid, signal.SIGKILL)
        return
    for process in children(run.pid) if victim == "working" else [run.pid]:
        os.kill(process, signal.SIGKILL)


def gone(process: int, seconds: float = 10) -> bool:
    """Whether a process ends by itself within this time [s]."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def look(out: Path, case: str, finished: dict[str, str]) -> tuple[str, str]:
    """What stands at OUT, and what else is in its folder.

    Args:
        out: The output path.
        case: Of `CASES`.
        finished: Digest by name of all that an undisturbed run writes.
    """
    rest = {path.name: digest(path) for path in out.parent.iterdir()}
    found = rest.pop(out.name, None)
    old = hashlib.sha256(OLD).hexdigest() if case.startswith("old") else None
    data = {name: value for name, value in finished.items() if name != out.name}
    stands = "BROKEN"
    if found == finished[out.name] and data.items() <= rest.items():
        stands = "new complete"
        rest = {name: value for name, value in rest.items() if name not in data}
    elif found == old:
        stands = "old" if old else "absent"
    if any(name.startswith(".onnx-optshift-") for name in rest):
        return stands, "hidden file left"
    return stands, "data file left" if rest else "clean"


def killed_after(delay: float, victim: str, words: list[str]) -> bool:
    """Starts a command and kills it after a delay [s]; whether that came before its end.

    Raises:
        RuntimeError: The working process lives on although nobody waits for it.
    """
    # A session of its own, so that a kill of the group spares us.
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    workers: list[int] = []
    try:
        run.wait(delay)
    except subprocess.TimeoutExpired:
        workers = children(run.pid)
        kill(run, victim)
    killed = run.wait() != 0
    if not all(map(gone, workers)):
        raise RuntimeError("a working process outlives the one that waits for it")
    return killed


def one(model: Path, out: Path, case: str, victim: str, delay: float, finished: dict[str, str]) -> Outcome:
    """Starts a run, kills it after a delay [s], and looks.

    Raises:
        RuntimeError: The working process lives on although nobody waits for it.
    """
    if case.startswith("old"):
        out.write_bytes(OLD)
    killed = killed_after(delay, victim, command(model, out, case))
    stands, rest = look(out, case, finished)
    return Outcome(case, victim if killed else "nobody", stands, "killed" if killed else "finished", rest)


def undisturbed(model: Path, out: Path, case: str) -> tuple[float, dict[str, str]]:
    """Seconds of a whole run, and digests by name of what it writes."""
    subprocess.run(command(model, out, case), check=True)  # warms the caches
    start = time.perf_counter()
    subprocess.run(command(model, out, case), check=True)
    return time.perf_counter() - start, {path.name: digest(path) for path in out.parent.iterdir()}


@dataclass
class Resumed:
    """What became of the runs of one way: kills, runs that came to an end, and what these said."""

    kills: int = 0
    ends: int = 0
    same: int = 0  # of the ends: the bytes of an undisturbed run
    resumed: int = 0  # of the ends: took something from a killed run
    rejected: int = 0  # of the ends: found something that was not theirs
    left: int = 0  # of the ends: something unfinished lies in the folder


def until_its_end(model: Path, folder: Path, way: str, digest_of_it: str, delays: Iterator[float]) -> Resumed:
    """Kills one run again and again, after these delays [s], until it comes to its end before a kill."""
    out, report, kept = folder / "out.onnx", folder / "report.json", folder / "kept"
    words = [str(model), str(out), "--checkpoint", str(kept), "--report", str(report), "--quiet", *WAYS[way]]
    found = Resumed()
    for delay, victim in zip(delays, itertools.cycle(VICTIMS), strict=False):
        if not killed_after(delay, victim, [sys.executable, "-c", OFTEN, *words]):
            break
        found.kills += 1
        if out.exists() and digest(out) != digest_of_it:
            return found  # an end that is not the same
    said = json.loads(report.read_text())["checkpoint"]
    found.ends, found.same = 1, int(digest(out) == digest_of_it)
    found.resumed, found.rejected = int(said["used"] > 0), int(bool(said["rejected"]))
    found.left = int(any(kept.rglob("*.new")))
    return found


def with_checkpoint(model: Path, folder: Path, kills: int, draw: random.Random) -> int:
    """Kills so many runs that keep what they do, and prints what became of them; returns the exit status."""
    whole, known = {}, {}
    for way, options in WAYS.items():
        out = folder / f"{way}.onnx"
        for _ in range(2):  # the first one warms the caches
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "onnx_optshift", str(model), str(out), "--quiet", *options], check=True
            )
            whole[way] = time.perf_counter() - start
        known[way] = digest(out)
    total = {way: Resumed() for way in WAYS}
    for way in itertools.cycle(WAYS):
        if sum(found.kills for found in total.values()) >= kills and all(found.ends for found in total.values()):
            break
        with tempfile.TemporaryDirectory(dir=folder) as name:
            # What else the machine does makes runs slower: then kills come later too, or none would come to its end.
            delays = (draw.uniform(0.1, 1.3) * whole[way] * 1.03**number for number in itertools.count())
            one = until_its_end(model, Path(name), way, known[way], delays)
            total[way] = Resumed(*(sum(pair) for pair in zip(astuple(total[way]), astuple(one), strict=True)))
            print(f"{way}: {one}", file=sys.stderr, flush=True)
    titles = ("way", *(field.name for field in fields(Resumed)))
    print("".join(f"{title:<12}" for title in titles))
    for way, found in total.items():
        print("".join(f"{cell!s:<12}" for cell in (way, *astuple(found))))
    broken = [way for way, found in total.items() if found.same < found.ends or found.rejected]
    print(f"{sum(f.kills for f in total.values())} killed: {'BROKEN: ' + ', '.join(broken) if broken else '0 broken'}")
    return int(bool(broken))


def table(outcomes: list[Outcome]) -> str:
    """Counts of equal outcomes, as lines."""
    counts = collections.Counter(outcomes)
    lines = [f"{'before':<20}{'killed':<10}{'run':<10}{'OUT':<14}{'beside it':<22}count"]
    for outcome in sorted(counts, key=str):
        lines.append(
            f"{outcome.case:<20}{outcome.victim:<10}{outcome.end:<10}{outcome.out:<14}{outcome.rest:<22}"
            f"{counts[outcome]:>5}"
        )
    return "\n".join(lines)


def main() -> int:
    """Kills and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "noisy_mlp" / "model.onnx")
    parser.add_argument("--kills", type=int, default=200, help="how many runs to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--checkpoint", action="store_true", help="kill runs that go on where they were")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    outcomes, not_cleared = [], 0
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        shutil.copytree(args.model.parent, Path(name, "model"))
        model = Path(name, "model", args.model.name)
        if args.checkpoint:
            return with_checkpoint(model, Path(name), args.kills, draw)
        known = {}
        for number, case in enumerate(CASES):
            Path(name, f"whole{number}").mkdir()
            known[case] = undisturbed(model, Path(name, f"whole{number}", "out.onnx"), case)
        number = killed = 0
        while killed < args.kills:
            case, victim = CASES[number % 3], VICTIMS[number // 3 % 3]
            whole, finished = known[case]
            delay = draw.uniform(0 if number // 9 % 3 == 0 else LAST_PART * whole, 1.05 * whole)
            with tempfile.TemporaryDirectory(dir=name) as folder:
                out = Path(folder, "out.onnx")
                outcomes.append(one(model, out, case, victim, delay, finished))
                ended = outcomes[-1].end == "finished"
                # How long a run takes changes with what else the machine does: follow it, to hit the last part.
                known[case] = (whole * (0.95 if ended else 1.01), finished)
                number, killed = number + 1, killed + (not ended)
                if outcomes[-1].rest != "clean":
                    subprocess.run(command(model, out, case), check=True)
                    not_cleared += look(out, case, finished) != ("new complete", "clean")
    broken = sum(outcome.out == "BROKEN" for outcome in outcomes)
    print(table(outcomes))
    print(f"{len(outcomes)} runs, {sum(o.end == 'killed' for o in outcomes)} killed: {broken} broken; ", end="")
    print(f"{sum(o.rest != 'clean' for o in outcomes)} left files, of which the next run did not clear {not_cleared}")
    return int(bool(broken or not_cleared))


if __name__ == "__main__":
    sys.exit(main())
