"""What `shift_` may be asked for: the nouns of the pass, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from onnx_optshift.errors import InputError
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm, Objective, Point, make_objective
from onnx_optshift.solve.problem import Problem

OBJECTIVES = ("norm", "range")
TOLERANCES_OF = ("outputs", "layers")


class _NormAlone(Norm):
    """Of which nobody sees what other tolerances would give."""

    def frontier(self, problem: Problem, tolerances: Sequence[float]) -> list[Point]:
        return []


@dataclass(frozen=True)
class ShiftConfig:
    """Choices of one shift. What is called as in `Settings` means the same.

    Attributes:
        tolerance: Relative deviation (Frobenius, no unit, 0 to 1) that is allowed. 0, the default, is exact.
        tolerance_of: What may deviate by it: `"outputs"`, the default, the model's own, on the data; the largest
            residual that all layers may have for it is found by running the model. `"layers"`, each layer's
            outputs by themselves: one pass over the data, and the model's outputs deviate as they will.
        objective: What is made small: `"norm"`, the default, or `"range"`, what a quantizer scales by.
        stochastic: None, the default, solves on all data. A number B solves on a class-balanced batch of B samples:
            exact on these alone.
        row_weighting: `"relative"`, the default, or `"none"`.
        quantization_bits: Bit widths that the objective `"range"` judges a layer's rounded outputs by.
        range_scope: What shares a scale of the quantizer, `"channel"` or `"tensor"`.
        range_block: Consecutive inputs of a channel that share a scale; None, the default, for `range_scope`.
        range_levels: `"auto"`, `"symmetric"` or `"full"`.
        seed: Of the stochastic draw.
        verify: Whether the model is run again on the data, with its old and its new weights, and left as it was where
            its outputs moved farther than allowed; True, the default.

    Raises:
        InputError: A value cannot be used.
    """

    tolerance: float = 0.0
    tolerance_of: str = "outputs"
    objective: str = "norm"
    stochastic: int | None = None
    row_weighting: str = "relative"
    quantization_bits: int | Sequence[int] = ()
    range_scope: str = "channel"
    range_block: int | None = None
    range_levels: str = "auto"
    seed: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, str):
            raise InputError(
                f"tolerance: expected a number from 0 (exact) to 1, found {self.tolerance!r}. Only the ONNX pass has "
                "held-out data that chooses one ('auto')."
            )
        for name, known in (("tolerance_of", TOLERANCES_OF), ("objective", OBJECTIVES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: {getattr(self, name)!r} is not known here. Take one of {known}.")
        if self.stochastic == 0:
            raise InputError("stochastic 0 lets held-out data choose, which only the ONNX pass has. Give a number.")
        if not isinstance(self.verify, bool):
            raise InputError(f"verify: expected True or False, found {self.verify!r}.")
        known_there = {field.name for field in fields(Settings)}
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known_there}
        # The checks, and the normal form of every value.
        settings = Settings(**shared)
        for name in shared:
            object.__setattr__(self, name, getattr(settings, name))

    def make_objective(self) -> Objective:
        """What the solvers make small."""
        if self.objective == "norm":
            return _NormAlone()
        bits = self.quantization_bits
        assert not isinstance(bits, int)
        return make_objective(self.objective, bits, self.range_scope, self.range_block, self.range_levels)
