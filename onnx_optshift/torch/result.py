"""What a shift of a module found, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.report.model import LayerReport
from onnx_optshift.run.candidate import Candidate
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.shift import Outcome

_BROKEN = {Outcome.NONFINITE_ROWS, Outcome.NONFINITE_WEIGHT}


@dataclass(frozen=True)
class ShiftResult:
    """What became of a model's weights.

    Attributes:
        layers: One for each weight, shifted, unchanged or skipped with its reason; the fields of the pass's report.
        deviation: Relative Frobenius difference of the model's outputs on the data, the largest over outputs; None
            where it was not measured.
        residual: That each layer was allowed.
    """

    layers: tuple[LayerReport, ...]
    deviation: float | None
    residual: float

    @property
    def shifted(self) -> tuple[LayerReport, ...]:
        """The layers whose weights changed."""
        return tuple(layer for layer in self.layers if layer.status == "shifted")

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            size = "" if layer.d is None else f" {layer.d} x {layer.m}, rank {layer.rank}"
            change = layer.reason
            if layer.status == "shifted":
                change = (
                    f"norm {layer.norm_before:.4g} -> {layer.norm_after:.4g}, residual {layer.measured_residual:.2g}"
                )
            lines.append(f"{layer.name}{size}: {layer.status}, {change}")
        deviation = "not measured" if self.deviation is None else f"{self.deviation:.2g}"
        total = f"{len(self.shifted)} of {len(self.layers)} layers shifted; output deviation {deviation}"
        return "\n".join([*lines, total])


def layer_reports(layers: Layers, candidate: Candidate, skips: tuple[Skip, ...]) -> tuple[LayerReport, ...]:
    """Every layer's line: where it ended, why, and its figures."""
    shown = [_layer(weight, layers, candidate) for weight in layers.weights.values()]
    return (*shown, *(LayerReport(s.weight or s.node, s.node, s.op_type, s.weight, "skipped", s.reason) for s in skips))


def _layer(weight: Weight, layers: Layers, candidate: Candidate) -> LayerReport:
    solved = candidate.solved[weight.name]
    shift = solved.shift
    status = "shifted" if solved.moved else "skipped" if shift.outcome in _BROKEN else "unchanged"
    return LayerReport(
        name=weight.name,
        node=weight.uses[0].node,
        op_type=weight.uses[0].op_type,
        weight=weight.name,
        status=status,
        reason=shift.outcome.value,
        d=weight.d,
        m=weight.m,
        groups=weight.groups,
        rows=sum(layers.store.rows(use.tap) for use in weight.uses),
        rank=shift.rank,
        tolerance=candidate.tolerance if solved.moved else None,
        norm_before=shift.norm_before,
        norm_after=shift.norm_after if solved.moved else shift.norm_before,
        range_before=shift.range_before,
        range_after=shift.range_after if solved.moved else shift.range_before,
        predicted_residual=shift.predicted_residual if solved.moved else 0.0,
        measured_residual=solved.residual,
        dtype=weight.dtype,
        uses=tuple(use.node for use in weight.uses),
    )
