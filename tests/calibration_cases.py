"""The same few samples, written as every kind of calibration data."""

import base64
import io
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_optshift.calibration.inputs import InputSpec

X = InputSpec("x", np.dtype(np.float32), ("batch", 3))
IDS = InputSpec("ids", np.dtype(np.int64), ("batch", "time"))
INPUTS = [X, IDS]


def arrays(count: int = 6, labels: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    made = {
        "x": rng.standard_normal((count, 3)).astype(np.float32),
        "ids": rng.integers(0, 9, (count, 2)),
    }
    return made | ({"labels": np.arange(count) % 3} if labels else {})


def feeds(stacked: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each row as the feed of leading dimension 1 that it is."""
    count = len(next(iter(stacked.values())))
    return [{name: array[i : i + 1] for name, array in stacked.items()} for i in range(count)]


def encoded(array: np.ndarray) -> dict[str, str]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}


def write_npz(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "data.npz", **stacked)
    return folder / "data.npz"


def write_npz_folder(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    """Twelve files or fewer, unevenly filled, so that neither batches nor text order follow the files."""
    root = folder / "npz"
    root.mkdir()
    cuts = [0, 1, 3, *range(4, len(next(iter(stacked.values()))) + 1)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        np.savez(root / f"part_{number + 8}.npz", **{name: array[start:stop] for name, array in stacked.items()})
    return root


def write_npy_by_name(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    root = folder / "npy"
    root.mkdir()
    for name, array in stacked.items():
        np.save(root / f"{name}.npy", array)
    return root


def write_safetensors(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    """Byte by byte from the format's description: length of the header, header, data."""
    kinds, header, end = {"f": "F", "i": "I", "u": "U", "V": "BF"}, {"__metadata__": {"made": "here"}}, 0
    for name, array in stacked.items():
        dtype = f"{kinds[array.dtype.kind]}{8 * array.itemsize}"
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    path = folder / "data.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in stacked.values()))
    return path


def write_test_sets(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    root = folder / "sets"
    for i, feed in enumerate(feeds(stacked)):
        one = root / f"test_data_set_{i + 8}"
        one.mkdir(parents=True)
        for number, array in enumerate(feed.values()):
            (one / f"input_{number}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
        (one / "output_0.pb").write_bytes(onnx.TensorProto().SerializeToString())
    return root


def write_json(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    content = [{name: encoded(array) for name, array in feed.items()} for feed in feeds(stacked)]
    (folder / "inputs.json").write_text(json.dumps(content))
    return folder / "inputs.json"


def write_json_folder(folder: Path, stacked: dict[str, np.ndarray]) -> Path:
    root = folder / "json"
    root.mkdir()
    for i, feed in enumerate(feeds(stacked)):
        (root / f"{i + 8}.json").write_text(json.dumps({name: encoded(array) for name, array in feed.items()}))
    return root


def write_script(folder: Path, stacked: dict[str, np.ndarray]) -> str:
    data = write_npz(folder, stacked)
    (folder / "feeds.py").write_text(
        "import numpy as np\n"
        "def mine():\n"
        f"    with np.load({str(data)!r}) as data:\n"
        "        arrays = dict(data)\n"
        "    for i in range(len(arrays['x'])):\n"
        "        yield {name: array[i:i + 1] for name, array in arrays.items()}\n"
    )
    return f"{folder / 'feeds.py'}:mine"


class Reader:
    """An ONNX Runtime calibration reader at its strictest: one buffer, no truth value, no length, no copies."""

    def __init__(self, stacked: dict[str, np.ndarray], end: object = None) -> None:
        self._stacked, self._end, self._next = stacked, end, 0
        self._buffer = {name: array[:1].copy() for name, array in stacked.items()}

    def get_next(self) -> object:
        if self._next >= len(self._stacked["x"]):
            return self._end
        for name, array in self._stacked.items():
            self._buffer[name][...] = array[self._next : self._next + 1]
        self._next += 1
        return self._buffer

    def __bool__(self) -> bool:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self):
        raise NotImplementedError

    def __deepcopy__(self, memo: object):
        raise NotImplementedError


FILES = {
    "npz": write_npz,
    "folder of npz": write_npz_folder,
    "npy files named as inputs": write_npy_by_name,
    "safetensors": write_safetensors,
    "Polygraphy JSON file": write_json,
    "Polygraphy JSON folder": write_json_folder,
    "script": write_script,
}
FILES_WITHOUT_LABELS = {"test_data_set folders": write_test_sets}  # there is no place for them

PYTHON = {
    "dict of arrays": lambda stacked: stacked,
    "list of dicts": feeds,
    "tuple of dicts": lambda stacked: tuple(feeds(stacked)),
    "generator": lambda stacked: (feed for feed in feeds(stacked)),
    "generator with one buffer": lambda stacked: iter(Reader(stacked).get_next, None),
    "function giving a generator": lambda stacked: lambda: iter(feeds(stacked)),
    "function giving a dict": lambda stacked: lambda: stacked,
    "reader": Reader,
    "reader ending with an empty dict": lambda stacked: Reader(stacked, {}),
    "function giving a reader": lambda stacked: lambda: Reader(stacked),
}
