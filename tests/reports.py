"""Reports to print and to save, without a run: one of each kind, and some that try to break what shows them."""

import math
from dataclasses import replace

from onnx_optshift.report.diagnosis import (
    Check,
    Collapse,
    Diagnosis,
    Drift,
    Estimate,
    Flatness,
    FlatnessReport,
    LayerDrift,
    LayerFlatness,
    LayerRank,
    Sharpness,
    TopEigenvalue,
    Verdict,
)
from onnx_optshift.report.model import (
    DataInfo,
    DeviceInfo,
    FrontierPoint,
    Headline,
    HeldoutResult,
    LayerReport,
    ModelInfo,
    NoiseFloor,
    OutputComparison,
    QuantizationError,
    QuantizedScore,
    Report,
    Score,
    Timing,
    ToolInfo,
    Trial,
    Verification,
)

FULL_RANK = "the rows span all d directions: the equation has only one solution. Only a tolerance leaves room."
LONG = "/encoder/layers.11/attention/self/query_projection/MatMul"
HOSTILE = '</td><script>alert("x")</script>$\\frac{$ #0a0b01 \x1b[31m\u202e\ud800\'&amp;'
HOSTILE_SHOWN = '</td><script>alert("x")</script>$\\frac{$ #0a0b01 \\x1b[31m\\u202e\\ud800\'&amp;'


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
    fields |= changes
    before, after = fields["norm_before"], fields["norm_after"]
    headline = None if before is None or after is None else Headline("norm", before, after)
    return LayerReport(**({"headline": headline} | fields))


def unchanged(name="fc2.weight", reason=FULL_RANK, **changes):
    path = (FrontierPoint(0.0, 1.0, None), FrontierPoint(0.1, 0.7, None))
    same = {"rank": 64, "norm_after": 4.0, "range_after": 0.5, "measured_residual": 0.0, "frontier": path}
    return layer(name=name, status="unchanged", reason=reason, **(same | changes))


def skipped(node, reason="its weight is computed at run time"):
    return LayerReport(name=node, node=node, op_type="MatMul", weight=None, status="skipped", reason=reason)


def many(count=200):
    statuses = ("shifted", "unchanged", "rejected")
    return tuple(
        layer(
            name=f"{LONG}_{k}", status=statuses[k % 3], reason=statuses[k % 3], rank=10 + k % 54, norm_after=2.0 + k % 3
        )
        for k in range(count)
    )


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


def trial(**changes):
    fields = {
        "what": "all layers at residual 0.1",
        "tolerance": 0.1,
        "loss": 0.12,
        "top1": 0.95,
        "mean_difference": -0.01,
        "standard_error": 0.004,
        "accepted": True,
        "reason": "accepted on held-out data",
    }
    return Trial(**(fields | changes))


def heldout(*tried, **changes):
    score = Score(0.13, 0.95, 200), Score(0.12, 0.96, 200)
    return HeldoutResult(*score, accepted=True, loss_name="cross-entropy on logits", tried=tried, **changes)


def report(**changes):
    floor = NoiseFloor(3e-7, 2e-7, 4e-7, ("one thread",), 256, 32, 1e-3)
    fields = {
        "tool": ToolInfo(version="0.1.0"),
        "model": ModelInfo("in.onnx", "out.onnx", "aa", "bb", 17, 8),
        "settings": {"tolerance": 0.0, "objective": "norm", "op_types": ("Gemm",)},
        "device": DeviceInfo("auto", "CPUExecutionProvider", "cpu", "capture on CPUExecutionProvider, solve on cpu"),
        "calibration": DataInfo("calibration.npz", 1000, synthetic=False, classes=10, fingerprint="cc"),
        "heldout": DataInfo("calibration.npz", 200, synthetic=False, split=True),
        "layers": (layer(), unchanged(), skipped("/a"), skipped("/b")),
        "verification": Verification(passed=True, outputs=(output(),), noise_floor=floor),
        "heldout_result": heldout(trial(accepted=False, reason="held-out loss rises")),
        "timing": Timing(1.0, 2.0, 3.0, 7.0),
        "peak_memory_bytes": 300 * 2**20,
        "predicted_memory_bytes": 320 * 2**20,
        "warnings": ("few samples.",),
        "summary": "1 of 2 layers shifted.",
    }
    return Report(**(fields | changes))


def flatness(after=0.75, **changes):
    def figure(value):
        before = Estimate(value, 0.3 * value)
        if after is None:
            return Flatness(before)
        return Flatness(before, Estimate(after * value, 0.2 * value), Estimate((after - 1) * value, 0.01 * value))

    fields = {
        "loss": "cross-entropy",
        "samples": 500,
        "probes": 8,
        "seed": 0,
        "noise": 1e-9,
        "loss_before": 0.69,
        "loss_after": 0.27 if after else None,
        "trace": figure(105.5),
        "gauss_newton": figure(99.0),
        "layers": (LayerFlatness("fc1.weight", 4096, 1e-3, figure(55.5), figure(7.25)),),
        "sharpness": tuple(Sharpness(s, figure(30 * s * s)) for s in (0.01, 0.03, 0.1)),
        "top_before": TopEigenvalue(2.5, 3.5, 8),
        "top_after": TopEigenvalue(1.5, 2.25, 8) if after else None,
        "seconds": 1.0,
    }
    return FlatnessReport(**(fields | changes))


DIAGNOSIS = Diagnosis(
    Verdict(
        "try small",
        "Watch: every class present.",
        (
            Check("every class present", "warn", "8 of 10", "Add samples of 3 and 7."),
            Check("freedom exists", "pass", "3 of 61 directions"),
        ),
    ),
    Collapse("fc2.weight", 10, 200, {"0": 20, "1": 180}, 0.85, 0.11, 0.22, 0.33, 0.44, 0.153),
    (LayerRank("fc1.weight", 64, 1000, 61, 60, 4, 33.3, 2.5),),
)
DRIFT = Drift(
    figure=0.043,
    quantile=0.9,
    limit=None,
    passed=True,
    baseline_figure=0.001,
    layers=(LayerDrift("fc1.weight", 40, {"0.5": 0.02, "0.9": 0.043, "1.0": 0.09}, ((7, 0.09), (3, 0.05))),),
    baseline=(LayerDrift("fc1.weight", 40, {"0.5": 0.0004, "0.9": 0.001, "1.0": 0.002}, ((1, 0.002),)),),
)
ERRORS = tuple(
    QuantizationError(name, bits, 0.8 / 2**bits, 0.6 / 2**bits)
    for name in ("fc1.weight", "fc2.weight")
    for bits in (8, 4)
)
QUANTIZED = (QuantizedScore(4, 0.115, 0.102),)
# The objective "range" with bits: the quantized model is better, and its float loss is worse.
RANGE = report(
    settings={"tolerance": "auto", "objective": "range", "quantization_bits": (4, 8)},
    layers=(layer(headline=Headline("range", 0.5, 0.4)), unchanged(headline=Headline("range", 0.5, 0.5))),
    verification=Verification(True, (output(rel=0.46, bound=0.47, bound_kind="measured"),), None),
    heldout_result=replace(
        heldout(
            trial(quantized=QUANTIZED), trial(tolerance=0.2, quantized=QUANTIZED, chosen=True), quantized=QUANTIZED
        ),
        before=Score(0.1138, 0.95, 200),
        after=Score(0.1299, 0.94, 200),
    ),
    quantization=ERRORS,
    next_step="Next: --tolerance 0.1 may give more.",
)
AUTO = report(
    heldout_result=heldout(
        trial(tolerance=0.01, what="all layers at residual 0.01"),
        trial(chosen=True),
        trial(tolerance=0.2, accepted=False, loss=0.2, reason="held-out loss rises by 0.07"),
    )
)
REPORTS = {
    "shift": report(),
    "range": RANGE,
    "auto": AUTO,
    "flatness": report(flatness=flatness()),
    "inspect": report(command="inspect", verification=None, heldout=None, heldout_result=None),
    "verify": report(command="verify", heldout=None, heldout_result=None, drift=DRIFT),
    "drift": report(command="verify", heldout_result=None, drift=replace(DRIFT, limit=0.04, passed=False)),
    "diagnose": report(
        command="diagnose", verification=None, heldout_result=None, collapse=DIAGNOSIS, flatness=flatness(after=None)
    ),
    "no layers": report(layers=(), heldout=None, heldout_result=None),
    "only skips": report(layers=(skipped("/a"),)),
    "nothing known": report(
        layers=(layer(status="unchanged", **dict.fromkeys(("d", "m", "rank", "groups", "norm_before", "norm_after"))),),
        **dict.fromkeys(("calibration", "heldout", "heldout_result", "verification", "peak_memory_bytes")),
    ),
    "not finite": report(
        layers=(
            layer(norm_after=math.nan, range_before=math.inf, measured_residual=math.nan, spectrum=(math.nan, 1.0)),
            layer(frontier=(FrontierPoint(0.0, math.nan, None), FrontierPoint(0.1, math.inf, 0.5))),
        ),
        verification=Verification(
            passed=False,
            outputs=(output(rel=math.nan, max_abs=math.inf, passed=False),),
            noise_floor=NoiseFloor(math.inf, math.nan, None, ("one thread",), 8, 4, None),
        ),
        heldout_result=heldout(trial(loss=math.nan), trial(tolerance=0.2, standard_error=math.inf)),
        quantization=(QuantizationError("a", 4, math.nan, 0.1), QuantizationError("b", 2, 0.0, 0.0)),
        flatness=flatness(sharpness=(Sharpness(0.1, Flatness(Estimate(math.nan, None))),)),
    ),
    "hostile": report(
        layers=(layer(name=HOSTILE, node=HOSTILE, op_type=HOSTILE, reason=HOSTILE), skipped(HOSTILE, HOSTILE)),
        settings={HOSTILE: HOSTILE},
        summary=HOSTILE,
        next_step=HOSTILE,
        warnings=(HOSTILE,),
        verification=Verification(True, (output(name=HOSTILE),), None, 2, (HOSTILE,)),
        heldout_result=heldout(trial(what=HOSTILE, reason=HOSTILE), trial(accepted=False, reason=HOSTILE)),
        quantization=(QuantizationError(HOSTILE, 4, 0.2, 0.1),),
        decisions=(HOSTILE,),
        collapse=replace(DIAGNOSIS, verdict=Verdict(HOSTILE, HOSTILE, (Check(HOSTILE, HOSTILE, HOSTILE, HOSTILE),))),
    ),
    "unicode": report(layers=(layer(name="層/注意/クエリ"), layer(name="ü" * 300), unchanged("الطبقة"))),
    "200 layers": report(layers=many()),
}
