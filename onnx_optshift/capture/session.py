"""ONNX Runtime sessions with strict device semantics: what was asked for is what runs, or there is an error.

The only module that imports onnxruntime.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from onnx_optshift.errors import DeviceError, InputError, OptShiftError, closest

# Has ONNX Runtime (1.24 and newer) tell which node runs where.
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@cache
def _runtime() -> ModuleType:
    """The onnxruntime module, quiet: a failing node is reported once, by our own message."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    return onnxruntime  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Device:
    """What runs where.

    Attributes:
        requested: What the user asked for: `auto`, `cpu`, `cuda`, `cuda:i`, or a list of providers.
        providers: Execution providers in order of preference; the first must really be used.
        index: CUDA device number.
        solve: The torch device of the statistics and the solvers: `cpu` or `cuda:i`.
        note: One line that says what runs where, and why.
        strict: Whether a node that falls back to the CPU is an error, as the GPU was asked for by name.
    """

    requested: str
    providers: tuple[str, ...]
    index: int
    solve: str
    note: str
    strict: bool = False

    @property
    def capture(self) -> str:
        """The execution provider that runs the model."""
        return self.providers[0]


def resolve_device(
    requested: str = "auto", providers: Sequence[str] = (), *, allow_cpu_fallback: bool = False
) -> Device:
    """Decides what runs where, before any work starts.

    Args:
        requested: `auto`, `cpu`, `cuda` or `cuda:i`.
        providers: Execution providers to use instead, full names or `cpu` and `cuda`; must agree with `requested`.
        allow_cpu_fallback: Whether single nodes may run on the CPU although CUDA was asked for by name.

    Returns:
        The device. With `auto` CUDA is taken when torch and ONNX Runtime both have it.

    Raises:
        DeviceError: The device or a provider is not available on this machine.
    """
    available = list(_runtime().get_available_providers())
    if providers:
        return _from_providers(requested, providers, available)
    kind, _, number = requested.partition(":")
    index = int(number) if number else 0
    if kind == "cpu":
        return Device(requested, (CPU,), 0, "cpu", "capture on CPUExecutionProvider, solve on cpu, as asked")
    missing = _why_no_cuda(index, available)
    if not missing:
        note = f"capture on CUDAExecutionProvider device {index}, solve on cuda:{index}"
        strict = kind == "cuda" and not allow_cpu_fallback
        return Device(requested, (CUDA, CPU), index, f"cuda:{index}", note, strict)
    if kind == "cuda":
        raise DeviceError(
            f"--device {requested} is not available: {missing}. Use --device cpu, or install what is missing."
        )
    return Device(requested, (CPU,), 0, "cpu", f"capture on CPUExecutionProvider, solve on cpu ({missing})")


def _why_no_cuda(index: int, available: Sequence[str]) -> str:
    if CUDA not in available:
        return f"this onnxruntime has no CUDAExecutionProvider (it has {', '.join(available)})"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if index >= torch.cuda.device_count():
        return f"there is no CUDA device {index}, torch finds {torch.cuda.device_count()}"
    return ""


def _from_providers(requested: str, providers: Sequence[str], available: list[str]) -> Device:
    short = {"cpu": CPU, "cuda": CUDA}
    names = [short.get(name.lower(), name) for name in providers]
    for name in names:
        if name not in available:
            raise DeviceError(
                f"--providers: {name!r} is not in this onnxruntime, which has {', '.join(available)}."
                f"{closest(name, available)} Name one of these."
            )
    kind, _, number = requested.partition(":")
    if (kind == "cpu" and names[0] != CPU) or (kind == "cuda" and names[0] != CUDA):
        raise DeviceError(
            f"--device {requested} and --providers {' '.join(providers)} contradict each other. Give one of them."
        )
    index = int(number) if number else 0
    on_gpu = names[0] == CUDA and torch.cuda.is_available()
    solve = f"cuda:{index}" if on_gpu else "cpu"
    # ONNX Runtime appends the CPU provider itself for nodes that the others do not take.
    ordered = tuple(dict.fromkeys([*names, CPU]))
    return Device(requested, ordered, index, solve, f"capture on {names[0]}, solve on {solve}, as asked")


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
        custom_op_library: Shared library with custom operators.

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
        custom_op_library: str | None = None,
    ) -> None:
        ort = _runtime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if custom_op_library is not None:
            _register(options, custom_op_library)
        if device.capture == CUDA:
            options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # takes the CUDA libraries that torch brought, which need not be on the system path
        # TensorFloat-32 rounds inputs to 10 bits: no promise of exactness would mean anything.
        cuda = {"device_id": device.index, "use_tf32": 0}
        providers = [(name, cuda) if name == CUDA else name for name in device.providers]
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=providers)
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot load the model: {_reason(error)}") from error
        took = self._session.get_providers()
        if device.capture not in took:
            raise DeviceError(
                f"{device.capture} was asked for, but ONNX Runtime runs this model on {', '.join(took)}. Its libraries "
                "(CUDA, cuDNN) are missing or of another version; install them, or use --device cpu."
            )
        self.device = device
        self.fallen_back = self._fallen_back()
        if self.fallen_back and device.strict:
            raise DeviceError(
                f"--device {device.requested}: {fallback_note(self.fallen_back)}. Leave it to --device auto, or accept "
                "it with --allow-cpu-fallback."
            )
        self.outputs: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())
        self._types = {node.name: node.type for node in self._session.get_inputs()}
        self._types |= {node.name: node.type for node in self._session.get_overridable_initializers()}
        self._output_types = {node.name: node.type for node in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Runs the model and returns outputs on the CPU.

        Sequences and maps come back flattened, one entry per leaf, named `output[key]`; bfloat16 as float32.

        Args:
            feeds: Inputs by name, and overridable initializers.
            outputs: Names of the outputs to compute; None for all.

        Returns:
            Arrays by output name.

        Raises:
            InputError: ONNX Runtime cannot run the model on these inputs.
        """
        names = list(self.outputs if outputs is None else outputs)
        if self._needs_values(names, feeds):
            values = self._run_values(feeds, names)
            return {n: _to_numpy(v) for n, v in zip(names, values, strict=True)}
        try:
            results = self._session.run(names, dict(feeds))
        except Exception as error:
            raise self._run_error(error, feeds) from error
        flat: dict[str, NDArray[Any]] = {}
        for name, result in zip(names, results, strict=True):
            _flatten(name, result, flat)
        return flat

    def run_tensors(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, torch.Tensor]:
        """Runs the model and returns tensor outputs where they were computed: no copy to the host from a GPU.

        On the CPU the arrays of ONNX Runtime are shared with torch; on CUDA the outputs are bound to device memory
        and handed over by DLPack.

        Args:
            feeds: Inputs by name, and overridable initializers.
            outputs: Names of the outputs to compute.

        Returns:
            Tensors by output name, on `device.solve`.

        Raises:
            InputError: ONNX Runtime cannot run the model on these inputs.
        """
        names = list(outputs)
        if not names:
            return {}
        if self.device.capture == CUDA and self.device.solve != "cpu":
            return self._run_bound(feeds, names)
        if self._needs_values(names, feeds):
            values = self._run_values(feeds, names)
            return {name: from_dlpack(value) for name, value in zip(names, values, strict=True)}
        try:
            results = self._session.run(names, dict(feeds))
        except Exception as error:
            raise self._run_error(error, feeds) from error
        return {name: as_tensor(result) for name, result in zip(names, results, strict=True)}

    def _fallen_back(self) -> tuple[str, ...]:
        """Operators of nodes that run on the CPU although the GPU was asked for, one entry for each node."""
        if self.device.capture != CUDA or not hasattr(self._session, "get_provider_graph_assignment_info"):
            return ()
        parts = self._session.get_provider_graph_assignment_info()
        return tuple(sorted(node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes()))

    def _needs_values(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> bool:
        # numpy has no bfloat16 that ONNX Runtime's plain `run` understands; OrtValues carry it.
        types = [self._types.get(name, "") for name in feeds] + [self._output_types.get(name, "") for name in names]
        return any("bfloat16" in kind for kind in types)

    def _ort_value(self, name: str, array: NDArray[Any]) -> Any:
        values = _runtime().OrtValue
        if "bfloat16" in self._types.get(name, ""):
            bits = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(torch.bfloat16)
            return values.ortvalue_from_numpy_with_onnx_type(bits.view(torch.uint16).numpy(), 16)
        return values.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _run_values(self, feeds: Mapping[str, NDArray[Any]], names: list[str]) -> list[Any]:
        try:
            values = {name: self._ort_value(name, array) for name, array in feeds.items()}
            return list(self._session.run_with_ort_values(names, values))
        except Exception as error:
            raise self._run_error(error, feeds) from error

    def _run_bound(self, feeds: Mapping[str, NDArray[Any]], names: list[str]) -> dict[str, torch.Tensor]:
        binding = self._session.io_binding()
        try:
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, self._ort_value(name, array))
            for name in names:
                binding.bind_output(name, "cuda", self.device.index)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise self._run_error(error, feeds) from error
        return {
            name: from_dlpack(value).to(self.device.solve)
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }

    def _run_error(self, error: Exception, feeds: Mapping[str, NDArray[Any]]) -> OptShiftError:
        given = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in list(feeds.items())[:8])
        return InputError(
            f"ONNX Runtime cannot run the model on the inputs {given}: {_reason(error)} "
            "Check these arrays against the model's inputs, and that the model runs at all with this onnxruntime."
        )


def fallback_note(operators: Sequence[str]) -> str:
    """One line about nodes that run on the CPU."""
    kinds = [f"{operators.count(kind)} {kind}" for kind in dict.fromkeys(operators)]
    more = f" and {len(kinds) - 5} kinds more" if len(kinds) > 5 else ""
    return f"ONNX Runtime runs {len(operators)} nodes of this model on the CPU ({', '.join(kinds[:5])}{more})"


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """An array as a CPU tensor sharing its memory where torch allows it (bfloat16 by its bits)."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    return torch.from_numpy(array)


def versions() -> tuple[str, str]:
    """Versions of onnxruntime and torch, for the report."""
    return str(_runtime().__version__), str(torch.__version__)


def _register(options: Any, library: str) -> None:
    try:
        options.register_custom_ops_library(library)
    except Exception as error:
        raise InputError(f"--custom-op-library {library}: ONNX Runtime cannot load it: {_reason(error)}") from error


# "/path/in/the/build/file.cc:123 namespace::Function(arguments) " in front of what ONNX Runtime has to say.
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|h|cu):\d+\s+(?:[\w\s:<>,&*~]*\((?:[^()]|\([^()]*\))*\)(?:\s*const)?\s*)?")


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words, on one line, without its error-code prefix, source paths and signatures."""
    text = " ".join(str(error).split())
    text = text.split("] : ", 1)[-1].split(" : ", 2)[-1] if text.startswith("[ONNXRuntimeError]") else text
    text = _SOURCE.sub("", text)
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return text.strip().rstrip(". ") + "."


def _to_numpy(value: Any) -> NDArray[Any]:
    if "bfloat16" in value.data_type():
        return from_dlpack(value).to(torch.float32).numpy()
    return np.asarray(value.numpy())


def _flatten(name: str, result: Any, into: dict[str, NDArray[Any]]) -> None:
    """Sequence and map outputs (ZipMap and its kind) become one array per key or position."""
    if isinstance(result, np.ndarray):
        into[name] = result
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
