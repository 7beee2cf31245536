"""Reports to print and to save, without a run."""

from onnx_optshift.report.model import (
    DataInfo,
    DeviceInfo,
    FrontierPoint,
    HeldoutResult,
    LayerReport,
    ModelInfo,
    NoiseFloor,
    OutputComparison,
    Report,
    Score,
    Timing,
    ToolInfo,
    Trial,
    Verification,
)

FULL_RANK = "the rows span all d directions: the equation has only one solution. Only a tolerance leaves room."
LONG = "/encoder/layers.11/attention/self/query_projection/MatMul"


def layer(**changes):
    fields = {
        "name": "fc1.weight",
        "node": "/fc1/Gemm",
        "op_type": "Gemm",
        "weight": "fc1.weight",
        "status": "shifted",
        "reason": "shifted",
        "d": 64,
        "m": 128,
        "groups": 1,
        "rows": 1000,
        "rank": 61,
        "tolerance": 0.0,
        "norm_before": 4.0,
        "norm_after": 3.0,
        "range_before": 0.5,
        "range_after": 0.4,
        "predicted_residual": 0.0,
        "measured_residual": 2.125e-8,
        "frontier": (FrontierPoint(0.0, 0.75, 0.8), FrontierPoint(0.1, 0.5, 0.6)),
        "spectrum": (1.0, 0.5, 1e-3, 1e-9, 0.0),
        "seconds": 0.5,
        "dtype": "float32",
        "uses": ("/fc1/Gemm",),
    }
    return LayerReport(**(fields | changes))


def unchanged(name="fc2.weight", reason=FULL_RANK, **changes):
    same = {"rank": 64, "norm_after": 4.0, "range_after": 0.5, "measured_residual": 0.0, "frontier": ()}
    return layer(name=name, status="unchanged", reason=reason, **(same | changes))


def skipped(node, reason="its weight is computed at run time"):
    return LayerReport(name=node, node=node, op_type="MatMul", weight=None, status="skipped", reason=reason)


def output(**changes):
    fields = {
        "name": "logits",
        "max_abs": 1.5e-6,
        "max_rel": 9e-7,
        "rel": 6e-7,
        "top1_agreement": 1.0,
        "samples": 1000,
        "bound": 3e-6,
        "passed": True,
    }
    return OutputComparison(**(fields | changes))


def report(**changes):
    floor = NoiseFloor(3e-7, 2e-7, 4e-7, ("one thread",), 256, 32, 1e-3)
    trial = Trial("exact", 0.0, 0.124, 0.95, 0.001, float("inf"), accepted=False, reason="held-out loss rises")
    score = Score(loss=0.123, top1=0.9561, n=200)
    fields = {
        "tool": ToolInfo(version="0.1.0"),
        "model": ModelInfo("in.onnx", "out.onnx", "aa", "bb", 17, 8),
        "settings": {"tolerance": 0.0, "objective": "norm", "op_types": ("Gemm",)},
        "device": DeviceInfo("auto", "CPUExecutionProvider", "cpu", "capture on CPUExecutionProvider, solve on cpu"),
        "calibration": DataInfo("calibration.npz", 1000, synthetic=False, classes=10, fingerprint="cc"),
        "heldout": DataInfo("calibration.npz", 200, synthetic=False, split=True),
        "layers": (layer(), unchanged(), skipped("/a"), skipped("/b")),
        "verification": Verification(passed=True, outputs=(output(),), noise_floor=floor),
        "heldout_result": HeldoutResult(score, score, accepted=True, loss_name="cross-entropy", tried=(trial,)),
        "timing": Timing(1.0, 2.0, 3.0, 7.0),
        "peak_memory_bytes": 300 * 2**20,
        "warnings": ("few samples.",),
        "summary": "1 of 2 layers shifted.",
    }
    return Report(**(fields | changes))
