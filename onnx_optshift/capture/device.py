"""What runs where: decided before any work starts, and checked against what ONNX Runtime makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx_optshift.errors import DeviceError, closest

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# Arithmetic on shapes, which ONNX Runtime leaves on the CPU beside any GPU: its few numbers are needed there.
_SHAPE_ARITHMETIC = (
    "Abs Add And Cast Ceil Concat ConstantOfShape CumSum Div Equal Expand Floor Gather Greater GreaterOrEqual Identity "
    "Less LessOrEqual Max Min Mod Mul Neg Not Or Pow Range ReduceMax ReduceMin ReduceProd ReduceSum Reshape Shape Size "
    "Slice Split Sqrt Squeeze Sub Unsqueeze Where"
)


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

    @property
    def options(self) -> list[tuple[str, dict[str, int]]]:
        """The execution providers with their options, as ONNX Runtime takes them."""
        # TensorFloat-32, ONNX Runtime's default, rounds inputs to 10 bits: no promise of exactness would mean anything.
        cuda = {"device_id": self.index, "use_tf32": 0}
        return [(name, cuda if name == CUDA else {}) for name in self.providers]


def choose_device(
    requested: str,
    providers: Sequence[str],
    available: Sequence[str],
    gpus: int,
    *,
    allow_cpu_fallback: bool = False,
    local_rank: int = 0,
) -> Device:
    """Decides what runs where, before any work starts; with `auto` CUDA if torch and ONNX Runtime both have it.

    Args:
        requested: `auto`, `cpu`, `cuda` or `cuda:i`.
        providers: Execution providers to use instead, full names or `cpu` and `cuda`; must agree with `requested`.
        available: Execution providers of this onnxruntime.
        gpus: CUDA devices that torch finds.
        allow_cpu_fallback: Whether single nodes may run on the CPU although CUDA was asked for by name.
        local_rank: Number of this process among those of its host: each takes a GPU in turn, unless one is named.

    Raises:
        DeviceError: The device or a provider is not available on this machine.
    """
    kind, _, number = requested.partition(":")
    index = int(number) if number else local_rank % max(1, gpus)
    strict = kind == "cuda" and not allow_cpu_fallback
    missing = _why_no_cuda(index, available, gpus)
    if not providers:
        if kind == "cuda" and missing:
            raise DeviceError(
                f"--device {requested} is not available: {missing}. Use --device cpu, or install what is missing."
            )
        if kind == "cpu" or missing:
            why = ", as asked" if kind == "cpu" else f" ({missing})"
            return Device(requested, (CPU,), 0, "cpu", f"capture on {CPU}, solve on cpu{why}")
        note = f"capture on {CUDA} device {index}, solve on cuda:{index}"
        return Device(requested, (CUDA, CPU), index, f"cuda:{index}", note, strict)
    names = [{"cpu": CPU, "cuda": CUDA}.get(name.lower(), name) for name in providers]
    for name in names:
        if name not in available:
            raise DeviceError(
                f"--providers: {name!r} is not in this onnxruntime, which has {', '.join(available)}."
                f"{closest(name, list(available))} Name one of these."
            )
    if kind != "auto" and names[0] != {"cpu": CPU, "cuda": CUDA}[kind]:
        raise DeviceError(
            f"--device {requested} and --providers {' '.join(providers)} contradict each other. Give one of them."
        )
    solve = f"cuda:{index}" if names[0] == CUDA and not missing else "cpu"
    note = f"capture on {names[0]}, solve on {solve}, as asked"
    # ONNX Runtime appends the CPU provider itself for nodes that the others do not take.
    return Device(requested, tuple(dict.fromkeys([*names, CPU])), index, solve, note, strict and CPU not in names)


def _why_no_cuda(index: int, available: Sequence[str], gpus: int) -> str:
    if CUDA not in available:
        return f"this onnxruntime has no CUDAExecutionProvider (it has {', '.join(available)})"
    if index >= gpus:
        return f"there is no CUDA device {index}, torch finds {gpus}" if gpus else "torch finds no CUDA device"
    return ""


def fallback_note(device: Device, placements: Iterable[tuple[str, Sequence[str]]] | None) -> str:
    """One sentence about nodes that run on the CPU beside a GPU; empty where there are none.

    Args:
        device: What was asked for.
        placements: Execution providers, each with the operators of nodes that it runs; None where that is not known.

    Raises:
        DeviceError: There are some, or it is not known, and the GPU was asked for by name.
    """
    if device.capture == CPU:
        return ""
    if placements is None:
        note = "This onnxruntime is too old to tell which nodes of the model run on the CPU (1.24 can)"
    else:
        on_cpu = Counter(kind for provider, kinds in placements if provider == CPU for kind in kinds)
        counts = [(kind, count) for kind, count in on_cpu.most_common() if kind not in _SHAPE_ARITHMETIC.split()]
        if not counts:
            return ""
        listed = ", ".join(f"{count} {kind}" for kind, count in counts[:5])
        more = f" and {len(counts) - 5} kinds more" if len(counts) > 5 else ""
        total = sum(count for _, count in counts)
        note = f"ONNX Runtime runs {total} nodes of this model on the CPU ({listed}{more}), as {device.capture} cannot"
    if device.strict:
        raise DeviceError(
            f"--device {device.requested}: {note}. Leave it to --device auto, or accept it with --allow-cpu-fallback."
        )
    return f"{note}."
