"""Shifts of torch modules in place, after training and during it, by the solvers of the ONNX pass."""

from onnx_optshift.torch.config import ShiftConfig
from onnx_optshift.torch.distillation import distill_
from onnx_optshift.torch.optimum_shift import OptimumShift
from onnx_optshift.torch.result import ShiftResult
from onnx_optshift.torch.shifting import shift_

__all__ = ["OptimumShift", "ShiftConfig", "ShiftResult", "distill_", "shift_"]
