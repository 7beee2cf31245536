"""ONNX Runtime sessions with strict device semantics: what was asked for is what runs, or there is an error.

The only module that imports onnxruntime.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from onnx_optshift.capture.device import CPU, CUDA, Device, choose_device, fallback_note
from onnx_optshift.errors import DeviceError, InputError

_logger = logging.getLogger(__name__)

# Has ONNX Runtime (1.24 and newer) tell which node runs where.
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_CANNOT_RUN = "ONNX Runtime cannot run the model"
# "/path/in/the/build/file.cc:123 namespace::Function(arguments) " in front of what ONNX Runtime has to say.
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|h|cu):\d+\s+(?:[\w\s:<>,&*~]*\((?:[^()]|\([^()]*\))*\)(?:\s*const)?\s*)?")


@contextmanager
def _unheard() -> Iterator[None]:
    """What native code says on standard error leads nowhere."""
    try:
        heard, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard error
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)
        os.close(nowhere)


@cache
def _runtime() -> ModuleType:
    """The onnxruntime module, quiet: a failing node is reported once, by our own message."""
    with _unheard():  # it says on standard error where it cannot keep a number of its own in the home folder
        import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    kinds, usual = onnxruntime.OrtAllocatorType, onnxruntime.OrtMemType.DEFAULT
    with suppress(Exception):  # the program that we run in has registered one: then it serves us too
        onnxruntime.create_and_register_allocator(
            onnxruntime.OrtMemoryInfo("Cpu", kinds.ORT_ARENA_ALLOCATOR, 0, usual),
            onnxruntime.OrtArenaCfg(0, -1, -1, -1),
        )
    return onnxruntime  # type: ignore[no-any-return]


def resolve_device(
    requested: str = "auto", providers: Sequence[str] = (), *, allow_cpu_fallback: bool = False, local_rank: int = 0
) -> Device:
    """What runs where on this machine, as `choose_device` decides.

    Raises:
        DeviceError: The device or a provider is not available.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = _runtime().get_available_providers()
    device = choose_device(
        requested, providers, available, gpus, allow_cpu_fallback=allow_cpu_fallback, local_rank=local_rank
    )
    if device.solve != "cpu":
        torch.set_float32_matmul_precision("highest")  # products of float32 rows on it: no TensorFloat-32 there either
    return device


class Session:
    """One model, loaded and ready to run.

    Args:
        model: A model's path, or the bytes of an in-memory model.
        device: What must run it; checked against what ONNX Runtime really took.
        folder: Where the external data of an in-memory model lies.
        optimize: Whether graph optimizations are on. Off is one of the runs that make up the noise floor.
        threads: Threads within one operator; None lets ONNX Runtime choose.
        prepack: Whether kernels may keep copies of the weights in a layout of their own. Without them external data
            stays mapped: loading takes no time, and memory only as the weights are read.
        shared_arena: Whether its working memory is one that all sessions share and the process keeps; otherwise it is
            the session's own, and free once that is closed.
        custom_op_library: Shared library with custom operators.
        name: What messages call the model.

    Attributes:
        outputs: Names of the model's outputs.
        note: One sentence about nodes that run elsewhere than asked; empty where there are none.

    Raises:
        InputError: ONNX Runtime cannot load the model.
        DeviceError: The model would run somewhere else than asked.
    """

    def __init__(
        self,
        model: bytes | Path,
        device: Device,
        *,
        folder: Path | None = None,
        optimize: bool = True,
        threads: int | None = None,
        prepack: bool = True,
        shared_arena: bool = True,
        custom_op_library: str | None = None,
        name: str = "the model",
    ) -> None:
        ort = _runtime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        entries = {
            "session.intra_op.allow_spinning": "0",
            "session.disable_prepacking": str(int(not prepack)),
            # Sessions run one after the other: together they need what the largest does, not the sum of all.
            "session.use_env_allocators": str(int(shared_arena)),
            # Weights stay as long as a session does: they must not cut up what the others use again.
            "session.use_device_allocator_for_initializers": str(int(shared_arena)),
            "session.model_external_initializers_file_folder_path": str(folder or ""),
            _RECORD_ASSIGNMENT: str(int(device.capture != CPU)),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if device.capture != CPU and hasattr(ort, "preload_dlls"):
            # Takes the CUDA libraries that torch brought, which need not be on the system path; prints what it misses.
            with redirect_stdout(io.StringIO()) as said:
                ort.preload_dlls()
            _logger.info("onnxruntime: %s", " ".join(said.getvalue().split()))
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        if custom_op_library is not None:
            library = Path(custom_op_library).absolute()  # or the system would look for it in its own folders only
            if not library.is_file():
                raise InputError(f"--custom-op-library {library}: cannot load it: no such file. Give a shared library.")
            with _told(f"--custom-op-library {library}: ONNX Runtime cannot load it, as it must a shared library"):
                options.register_custom_ops_library(str(library))
        with _told(f"{name}: ONNX Runtime cannot load the model"):
            source = model if isinstance(model, bytes) else str(model)
            # Without its own fallback, which would print to standard output and go on elsewhere.
            self._session = ort.InferenceSession(source, options, providers=device.options, enable_fallback=0)
        took = self._session.get_providers()
        if device.capture not in took:
            raise DeviceError(
                f"{device.capture} was asked for, but ONNX Runtime runs this model on {', '.join(took)}. Its libraries "
                "(CUDA, cuDNN) are missing or of another version; install them, or use --device cpu."
            )
        self.device = device
        self.note = fallback_note(device, self._placements() if device.capture != CPU else ())
        self.outputs: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())
        values = (self._session.get_inputs, self._session.get_overridable_initializers, self._session.get_outputs)
        self._bfloat16 = {node.name for nodes in values for node in nodes() if "bfloat16" in node.type}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Runs the model on inputs (and overridable initializers) and returns all or some outputs, on the CPU.

        Sequences and maps come back flattened, one entry per leaf, named `output[key]`; bfloat16 as float32.

        Raises:
            InputError: ONNX Runtime cannot run the model on these inputs.
        """
        names = list(self.outputs if outputs is None else outputs)
        flat: dict[str, NDArray[Any]] = {}
        for name, result in zip(names, self._run(feeds, names), strict=True):
            _flatten(name, result, flat)
        return flat

    def run_tensors(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, torch.Tensor]:
        """Runs the model and returns outputs on `device.solve`, without a copy to the host from a GPU.

        On the CPU torch shares ONNX Runtime's arrays; on CUDA outputs are bound to the device, handed over by DLPack.

        Raises:
            InputError: ONNX Runtime cannot run the model on these inputs.
        """
        names = list(outputs)
        if not names:
            return {}
        bound = self.device.capture == CUDA and self.device.solve != "cpu"
        results = self._run_bound(feeds, names) if bound else map(as_tensor, self._run(feeds, names))
        return dict(zip(names, results, strict=True))

    def _placements(self) -> list[tuple[str, list[str]]] | None:
        """Execution providers, each with the operators of nodes that it runs; None before ONNX Runtime 1.24."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return None
        parts = self._session.get_provider_graph_assignment_info()
        return [(part.ep_name, [node.op_type for node in part.get_nodes()]) for part in parts]

    def _run(self, feeds: Mapping[str, NDArray[Any]], names: list[str]) -> list[Any]:
        """Results on the host: arrays, sequences, maps; bfloat16 as tensors, which numpy lacks."""
        with _told(_CANNOT_RUN, feeds):
            if self._bfloat16.isdisjoint([*feeds, *names]):
                return list(self._session.run(names, dict(feeds)))
            values = self._session.run_with_ort_values(names, {n: self._ort_value(n, a) for n, a in feeds.items()})
            return [from_dlpack(v) if "bfloat16" in v.data_type() else v.numpy() for v in values]

    def _run_bound(self, feeds: Mapping[str, NDArray[Any]], names: list[str]) -> list[torch.Tensor]:
        """Results on the GPU that computed them."""
        with _told(_CANNOT_RUN, feeds):
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, self._ort_value(name, array))
            for name in names:
                binding.bind_output(name, "cuda", self.device.index)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return [from_dlpack(value).to(self.device.solve) for value in binding.get_outputs()]

    def _ort_value(self, name: str, array: NDArray[Any]) -> Any:
        values = _runtime().OrtValue
        if name in self._bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(torch.bfloat16)
            return values.ortvalue_from_numpy_with_onnx_type(bits.view(torch.uint16).numpy(), 16)
        return values.ortvalue_from_numpy(np.ascontiguousarray(array))


def as_tensor(array: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """An array as a CPU tensor sharing its memory where torch allows it (bfloat16 by its bits)."""
    if isinstance(array, torch.Tensor):
        return array
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())


def versions() -> tuple[str, str]:
    """Versions of onnxruntime and torch, for the report."""
    return str(_runtime().__version__), str(torch.__version__)


@contextmanager
def _told(what: str, feeds: Mapping[str, NDArray[Any]] | None = None) -> Iterator[None]:
    # What goes wrong inside ONNX Runtime becomes one message.
    try:
        yield
    except Exception as error:
        if feeds is None:
            raise InputError(f"{what}: {_reason(error)}") from error
        given = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in list(feeds.items())[:8])
        raise InputError(
            f"{what} on the inputs {given}: {_reason(error)} Check these arrays against the model's inputs, and that "
            "the model runs at all with this onnxruntime."
        ) from error


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words, on one line, without its error-code prefix, source paths and signatures."""
    text = " ".join(str(error).split())
    text = text.split("] : ", 1)[-1].split(" : ", 2)[-1] if text.startswith("[ONNXRuntimeError]") else text
    text = _SOURCE.sub("", text)
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return text.strip().rstrip(". ") + "."


def _flatten(name: str, result: Any, into: dict[str, NDArray[Any]]) -> None:
    """Sequence and map outputs (ZipMap and its kind) become one array per key or position."""
    if isinstance(result, torch.Tensor):
        into[name] = result.float().numpy()
    elif isinstance(result, dict):
        for key, value in result.items():
            _flatten(f"{name}[{key}]", value, into)
    elif isinstance(result, list) and result and isinstance(result[0], dict):
        for key in result[0]:
            into[f"{name}[{key}]"] = np.asarray([entry.get(key, np.nan) for entry in result])
    elif isinstance(result, list):
        for position, value in enumerate(result):
            _flatten(f"{name}[{position}]", value, into)
    else:
        into[name] = np.asarray(result)
