"""Mutations of model files and calibration archives, each fixed by a seed and a number."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

PAYLOAD = 256  # a raw_data of at least this many bytes is weights, not structure


def flip_bits(content: bytearray, places: np.ndarray, rng: np.random.Generator) -> None:
    """One to eight bits, anywhere."""
    for place in rng.choice(places, rng.integers(1, 9)):
        content[place] ^= 1 << rng.integers(8)


def truncate(content: bytearray, places: np.ndarray, rng: np.random.Generator) -> None:
    """Everything from some place on."""
    del content[rng.choice(places) :]


def swap_bytes(content: bytearray, places: np.ndarray, rng: np.random.Generator) -> None:
    """Two bytes change places, up to four times."""
    for first, second in rng.choice(places, (rng.integers(1, 5), 2)):
        content[first], content[second] = content[second], content[first]


def zero_run(content: bytearray, places: np.ndarray, rng: np.random.Generator) -> None:
    """A run of up to 64 bytes becomes zero."""
    start = int(rng.choice(places))
    end = min(len(content), start + int(rng.integers(1, 65)))
    content[start:end] = bytes(end - start)


def append_bytes(content: bytearray, places: np.ndarray, rng: np.random.Generator) -> None:
    """Up to 64 random bytes at the end."""
    content += rng.bytes(int(rng.integers(1, 65)))


MUTATIONS: tuple[Callable[[bytearray, np.ndarray, np.random.Generator], None], ...] = (
    flip_bits,
    truncate,
    swap_bytes,
    zero_run,
    append_bytes,
)


def structure(model: bytes) -> np.ndarray:
    """Places in a model file that are not weights: where a mutation changes more than some numbers."""
    import onnx

    keep = np.ones(len(model), bool)
    for tensor in onnx.ModelProto.FromString(model).graph.initializer:
        start = model.find(tensor.raw_data) if len(tensor.raw_data) >= PAYLOAD else -1
        if start >= 0:
            keep[start : start + len(tensor.raw_data)] = False
    return np.flatnonzero(keep)


def repacked(archive: bytes, member: str, content: bytes) -> bytes:
    """The .npz with one member replaced and its checksum made to fit, so that the reader gets to see the content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            # The entry brings its old date along: the same seed gives the same bytes at any time.
            new.writestr(entry, content if entry.filename == member else old.read(entry))
    return buffer.getvalue()


@dataclass(frozen=True)
class Case:
    """One input of the command line: both files, one of them mutated (neither in the control).

    Attributes:
        label: What was done, with the number that repeats it.
        model: Bytes of the model file.
        data: Bytes of the calibration file.
    """

    label: str
    model: bytes
    data: bytes


def cases(model: bytes, data: bytes, counts: dict[str, int], seed: int) -> Iterator[Case]:
    """The mutated cases: each mutation in turn, at structural and at arbitrary places, inside and outside archives."""
    structural = structure(model)
    for k in range(counts["model"]):
        rng, mutate = np.random.default_rng([seed, 0, k]), MUTATIONS[k % len(MUTATIONS)]
        content = bytearray(model)
        mutate(content, structural if rng.random() < 0.75 else np.arange(len(model)), rng)
        yield Case(f"model-{k}-{mutate.__name__}", bytes(content), data)
    for k in range(counts["data"]):
        rng, mutate = np.random.default_rng([seed, 1, k]), MUTATIONS[k % len(MUTATIONS)]
        if rng.random() < 0.5 or not zipfile.is_zipfile(io.BytesIO(data)):
            content, place = bytearray(data), "file"
            mutate(content, np.arange(len(content)), rng)
        else:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                place = str(rng.choice(archive.namelist()))
                content = bytearray(archive.read(place))
            # Half of them in the header of the array: its dtype, order and shape.
            mutate(content, np.arange(min(128, len(content)) if rng.random() < 0.5 else len(content)), rng)
            content = bytearray(repacked(data, place, bytes(content)))
        yield Case(f"data-{k}-{mutate.__name__}-{place}", model, bytes(content))
