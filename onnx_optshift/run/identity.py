"""What every bit of a run's results depends on besides its options: what a checkpoint is told apart by."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.device import Device
from onnx_optshift.capture.session import versions
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.checkpoint import Checkpoint, digest
from onnx_optshift.run.checkpoint_folder import PROCESS, Folder, homes
from onnx_optshift.run.world import ALONE, World
from onnx_optshift.write.atomic import digest as digest_of_file

_PACKAGE = Path(__file__).parents[1]


def checkpoint(
    folder: str | None, model: ModelFile, samples: Samples, device: Device, operators: str | None, world: World = ALONE
) -> Checkpoint:
    """The checkpoint of a run on this model and these calibration samples; one that keeps nothing without a folder.

    Args:
        folder: Of the user's choice.
        model: The original. Files of external data are read once.
        samples: All calibration samples. They are read once.
        device: Where the model runs and where statistics live.
        operators: Path of a library with custom operators.
        world: The processes that share the run: each keeps its own share.
    """
    if folder is None:
        return Checkpoint()
    runtime, torch_version = versions()
    made_from = {
        "model": digest(model.sha256, *(digest_of_file(file) for file in sorted(model.data_files))),
        "data": digest(samples.fingerprint, samples.arrangement),
        "operators": digest_of_file(Path(operators)) if operators is not None else "",
        "package": f"{metadata.version('onnx-optshift')} {_sources()}",
        "torch": torch_version,
        "onnxruntime": runtime,
        "numpy": metadata.version("numpy"),
        "device": _device(device),
        "machine": _machine(),
    }
    if world.size > 1:
        made_from |= {"processes": str(world.size), PROCESS: str(world.rank)}
    return Folder(Path(folder), made_from)


def check_folder(folder: str | None) -> None:
    """Insists that a folder can be a checkpoint's: its own, so that it may be removed at any time without a loss.

    Raises:
        InputError: It is a file, holds anything else, or nothing can be written there.
    """
    if folder is None:
        return
    path = Path(folder)
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not above.is_dir():
        raise InputError(f"--checkpoint {path}: {above} is a file. Give a folder, which is made where it is missing.")
    if not os.access(above, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(
            f"--checkpoint {path}: nothing can be written to {above}. Give a folder that you may write to."
        )
    if path.is_dir():
        ours = set(homes(path))
        other = next((entry.name for entry in sorted(path.iterdir()) if entry not in ours), None)
        if other is not None:
            raise InputError(
                f"--checkpoint {path}: holds {other!r}, which is none of a checkpoint's. Give an empty folder, or one "
                "that is missing: it may be removed later with all that it holds."
            )


def _device(device: Device) -> str:
    """Who computes, and on which model of GPU."""
    gpu = torch.cuda.get_device_name(device.index) if torch.cuda.is_available() else ""
    return f"{', '.join(device.providers)}; {device.solve}; {gpu}"


def _machine() -> str:
    """What kernels are chosen by on the host: its kind, its processors, and how many threads share the work."""
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{platform.machine()} {processor} {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}; {torch.get_num_threads()} threads of torch, {count} processors"


def _sources() -> str:
    """SHA-256 of the package itself: the same version may have been changed in place."""
    found = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        found.update(f"{file.relative_to(_PACKAGE).as_posix()} {digest_of_file(file)}\n".encode())
    return found.hexdigest()[:16]
