"""Sessions of one model: opened when first needed, kept while they may be, closed when memory asks for it.

A model with gigabytes of external data has one session open at a time, without packed copies of its weights; what a run
holds for it stays in files that are mapped.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from onnx_optshift.capture.device import Device
from onnx_optshift.capture.session import Session
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model
from onnx_optshift.graph.tensors import all_tensors, is_external, raw_size
from onnx_optshift.run.mapped import MappedStore

# External data from this size on is never copied: one session at a time maps it, without packed copies of its own.
LARGE_MODEL = 2**30
# What ONNX Runtime says of an operator that it does not have: of another domain, and of the standard one.
_UNKNOWN = re.compile(r"(\S+:\w+)\(-?\d+\) is not a registered function/op|No Op registered for (\w+)")


class Sessions:
    """Opens sessions of a model, its copies with probes, and files made from it."""

    def __init__(
        self, model: ModelFile, device: Device, custom_op_library: str | None = None, threads: int | None = None
    ) -> None:
        self._model = model
        self._device = device
        self._custom_op_library = custom_op_library
        self._threads = threads  # within one operator; None lets ONNX Runtime choose
        self._kept: dict[tuple[str, ...], Session] = {}
        self._probe: tuple[frozenset[str], Session] | None = None  # the last one, with the values that it gives
        self._store = MappedStore()
        self.external = sum(raw_size(tensor) for tensor in all_tensors(model.proto) if is_external(tensor))  # bytes
        self.large = self.external >= LARGE_MODEL  # one session at a time, and weights stay in their file

    def open(self, model: bytes | Path | None = None, **options: Any) -> Session:
        """A new session on the original, on another file, or on bytes whose external data is the original's.

        Raises:
            InputError: ONNX Runtime cannot load it.
        """
        self._probe = None  # or one session more than was planned for would be open
        options = {"threads": self._threads, **options}
        if self.large:
            self.rest()
            options = {"prepack": False, "shared_arena": False, **options}
        if model is None:
            model = self._model.path or probe_model(self._model, ())
        folder = self._model.folder if isinstance(model, bytes) else None
        where, library = self._model.where, self._custom_op_library
        try:
            return Session(model, self._device, folder=folder, custom_op_library=library, name=where, **options)
        except InputError as error:
            unknown = _UNKNOWN.search(str(error))
            if unknown is None:
                raise
            kind = unknown[1] or unknown[2]
            node = next(self._model.nodes(kind), None)
            at = "" if node is None else f" of node {node.name or node.output[0]!r}"
            given = f" (nor has {library})" if library else ""
            raise InputError(
                f"{where}: this onnxruntime has no operator {kind}{at}{given}. Give the library that has it with "
                "--custom-op-library FILE, or update onnxruntime."
            ) from error

    def original(self) -> Session:
        """The original model, as a user runs it; opened once."""
        return self._kept_or_open((), None)

    def trial(self, names: Sequence[str]) -> Session:
        """The original model with these initializers as inputs that may be overridden; opened once."""
        key = tuple(names)
        return self._kept.get(key) or self._kept_or_open(key, probe_model(self._model, (), key))

    def probe(self, taps: Sequence[Tap], overridable: Sequence[str] = ()) -> Session:
        """The original model with the values of these taps as outputs; kept until another session is opened.

        One with more outputs would not do: what ONNX Runtime fuses depends on them, and so may the last bit of a value.
        """
        values = frozenset(tap.value for tap in taps)
        if self._probe is not None and not overridable and values == self._probe[0]:
            return self._probe[1]
        session = self.open(probe_model(self._model, taps, overridable))
        if not (self.large or overridable):
            self._probe = (values, session)
        return session

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the size of weights or outputs, to be held for long: in a file where the model is large."""
        return self._store.keep(array) if self.large else array

    def in_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array to be held for long, in a file whatever the model's size."""
        return self._store.keep(array, least=1)

    def let_go(self) -> None:
        """Lets go of pages of arrays in files that were read."""
        self._store.let_go()

    def disk_space(self) -> int:
        """Bytes that `keep` has room for in files."""
        return self._store.free_space()

    def rest(self) -> None:
        """Lets go of all that a large model holds between passes: its session, and pages of its files."""
        if self.large:
            self._kept.clear()
            self._store.let_go()
            with suppress(OSError, AttributeError):  # glibc keeps what was freed, for the next time
                ctypes.CDLL(None).malloc_trim(0)

    def _kept_or_open(self, key: tuple[str, ...], model: bytes | None) -> Session:
        if key not in self._kept:
            self._kept[key] = self.open(model)
        return self._kept[key]
