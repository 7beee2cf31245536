"""A checkpoint's folder: files named after hashes of what they were made from.

The entries of one model, data and place lie in a folder of their own; a hash inside each file covers all its bytes.
They appear by an atomic rename and never change: runs may share a folder, and anything may be removed at any time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import torch

from onnx_optshift import tensorfile
from onnx_optshift.capture.statistics import Moments, from_state, state_of
from onnx_optshift.geometry import Tap
from onnx_optshift.report.run_info import CheckpointInfo
from onnx_optshift.run.checkpoint import Beside, Checkpoint, Entry, Pass, digest
from onnx_optshift.write.atomic import lock, sync

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Seconds of a pass over the data after which its sums are kept, and the least multiple of what that takes.
EVERY, LEAST_SHARE = 30.0, 20
FOLDER = re.compile(r"[0-9a-f]{16}")
_SUFFIX, _UNFINISHED = ".safetensors", ".new"
# Is no work that is saved, but how to do it.
_PLAN = "plan"
# What outlives a run that went well: all else can only serve the same run again.
_LASTING = ("statistics", _PLAN)
_OTHER = {
    "model": "another model",
    "data": "other data",
    "package": "another version of this package",
    "operators": "another library of operators",
    "device": "another device",
    "machine": "another machine or number of threads",
    "processes": "another number of processes",
}
# The number of one of several processes that share a run.
PROCESS = "process"


class Folder(Checkpoint):
    """Keeps entries in a folder.

    Args:
        path: The folder; made when there is something to keep.
        made_from: What every entry depends on, by a word for each; those of another process of a run must differ.
    """

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        self._path = path
        self._made_from = dict(made_from)
        self._identity = digest(*(f"{name} {value}" for name, value in sorted(made_from.items())))
        self._home = path / self._identity[:16]
        self._used: set[str] = set()  # names of files, as in all that follow
        self._saved: set[str] = set()
        self._damaged: dict[str, str] = {}
        self._failed: str | None = None
        self._others = tuple(self._strangers())
        self._found = {file.name for file in _entries(self._home)}
        _sweep(self._home)

    def once(
        self,
        kind: str,
        key: Callable[[], str],
        make: Callable[[], _T],
        pack: Callable[[_T], Entry],
        unpack: Callable[[Entry], _T],
    ) -> _T:
        """See `Checkpoint.once`."""
        name = _name(kind, key())
        found = self._load(name)
        if found is not None:
            return unpack(found)
        value = make()
        self._save(name, pack(value))
        return value

    def moments(
        self,
        key: Callable[[], str],
        taps: Sequence[Tap],
        capture: Callable[[Pass], Moments],
        device: str,
        products: torch.dtype = torch.float64,
        beside: Beside | None = None,
    ) -> Moments:
        """See `Checkpoint.moments`."""
        whole = key()
        name = _name("pass", whole)

        def pack(moments: Moments) -> Entry:
            state = state_of(moments) | (beside.state() if beside is not None else {})
            return Entry({key: tensor.cpu().numpy() for key, tensor in state.items()})

        def unpack(entry: Entry) -> Moments:
            state = {key: torch.from_numpy(array) for key, array in entry.arrays.items()}
            moments = from_state(taps, state, device, products)
            if beside is not None:
                beside.restore(moments, state)
            return moments

        def make() -> Moments:
            begun = self._load(name)
            done, known = (int(begun.facts["steps"]), unpack(begun)) if begun else (0, {})
            moments = capture(_Kept(done, known, lambda entry: self._save(name, entry), pack))
            self._remove(name)
            return moments

        return self.once("statistics", lambda: whole, make, pack, unpack)

    def report(self) -> CheckpointInfo:
        """See `Checkpoint.report`."""
        idle = [self._home / name for name in sorted(self._found - {*self._used, *self._saved, *self._damaged})]
        rejected = [f"{name} ({why})" for name, why in self._damaged.items()]
        rejected += self._others
        if idle := [file for file in idle if file.exists()]:
            rejected.append(f"{_counted(idle)} of runs with other options")
        used, saved = (sum(not name.startswith(_PLAN) for name in names) for names in (self._used, self._saved))
        return CheckpointInfo(str(self._path), used, saved, tuple(rejected), self._failed)

    def finish(self) -> None:
        """See `Checkpoint.finish`."""
        for name in {*self._used, *self._saved}:
            if not name.startswith(_LASTING):
                self._remove(name)

    def _load(self, name: str) -> Entry | None:
        """An entry; None where there is none that is whole and was made from the same."""
        file = self._home / f"{name}{_SUFFIX}"
        try:
            arrays, about = tensorfile.read(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            why = str(error)
        else:
            why = (
                "" if (about["identity"], about["entry"]) == (self._identity, name) else "it is another entry, renamed"
            )
        if why:
            self._damaged[file.name] = why
            _logger.warning("%s: not used: %s", file, why)
            return None
        if file.name not in self._saved:  # what this run has made itself is no help of another one
            self._used.add(file.name)
        return Entry(arrays, json.loads(about["facts"]))

    def _save(self, name: str, entry: Entry) -> None:
        """Puts an entry in place. Where the system refuses the run goes on, and nothing more is kept."""
        if self._failed is not None:
            return
        about = {"entry": name, "identity": self._identity, "made_from": json.dumps(self._made_from)}
        final = self._home / f"{name}{_SUFFIX}"
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with self._unfinished() as file:
                tensorfile.write(file, entry.arrays, {**about, "facts": json.dumps(dict(entry.facts))})
                file.flush()
                os.fsync(file.fileno())
                if sys.platform == "win32":
                    file.close()  # open files are not renamed there, nor locked
                os.replace(file.name, final)
            sync(self._home)
        except OSError as error:
            self._failed = f"nothing more was kept: {error.strerror or error}"
            _logger.warning("%s: %s", final, self._failed)
            return
        self._saved.add(final.name)

    def _unfinished(self) -> IO[bytes]:
        """A new file under a name that nobody looks for, locked as long as it is open."""
        while True:
            file = (self._home / f".{secrets.token_hex(6)}{_UNFINISHED}").open("xb")
            with suppress(OSError):  # a file system without locks: then it is never swept
                lock(file, wait=True)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # somebody's sweep has come between

    def _remove(self, name: str) -> None:
        with suppress(OSError):
            (self._home / f"{name.removesuffix(_SUFFIX)}{_SUFFIX}").unlink()

    def _strangers(self) -> Iterator[str]:
        """What lies beside our entries, and why it is not used."""
        for home in sorted(homes(self._path)):
            if home != self._home and (files := _entries(home)) and (other := self._difference(files[0])):
                yield f"{_counted(files)} for {other}"

    def _difference(self, file: Path) -> str:
        """What an entry was made from that this run is not; empty where only another of its processes keeps it."""
        try:
            theirs = json.loads(tensorfile.words(file)["made_from"])
        except (OSError, ValueError, KeyError, TypeError):
            return "something that cannot be read any more"
        names = [name for name in {**self._made_from, **theirs} if name != PROCESS]
        other = [name for name in names if self._made_from.get(name) != theirs.get(name)]
        return " and ".join(dict.fromkeys(_OTHER.get(name, f"another version of {name}") for name in other))


class _Kept(Pass):
    """A pass that is kept now and then."""

    def __init__(
        self, done: int, moments: Moments, save: Callable[[Entry], None], pack: Callable[[Moments], Entry]
    ) -> None:
        super().__init__(moments)
        self.done = self._steps = done
        self._save, self._pack = save, pack
        self._due = time.monotonic() + EVERY

    def added(self, moments: Moments) -> None:
        self._steps += 1
        if (start := time.monotonic()) < self._due:
            return
        self._save(Entry(self._pack(moments).arrays, {"steps": self._steps}))
        now = time.monotonic()
        self._due = now + max(EVERY, LEAST_SHARE * (now - start))


def homes(path: Path) -> list[Path]:
    """Folders of entries in a checkpoint's folder."""
    with suppress(OSError):
        return [entry for entry in path.iterdir() if FOLDER.fullmatch(entry.name) and entry.is_dir()]
    return []


def _name(kind: str, key: str) -> str:
    return f"{kind}-{digest(kind, key)[:32]}"


def _entries(home: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(home.glob(f"*{_SUFFIX}"))
    return []


def _counted(files: Sequence[Path]) -> str:
    size = sum(file.stat().st_size for file in files)
    shown = f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
    return f"{len(files)} {'entry' if len(files) == 1 else 'entries'} ({shown})"


def _sweep(home: Path) -> None:
    """Removes files that dead processes have not finished; the living hold a lock on theirs."""
    if sys.platform == "win32":  # nothing is locked there
        return
    with suppress(OSError):
        for file in home.glob(f".*{_UNFINISHED}"):
            with suppress(OSError), file.open("r+b") as opened:
                lock(opened, wait=False)
                file.unlink()
