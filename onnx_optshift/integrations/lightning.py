"""A callback for Lightning's Trainer: shifts during training.

Trainer(callbacks=[OptimumShiftCallback(every=100)])
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from onnx_optshift.torch.optimum_shift import Handle, OptimumShift
from onnx_optshift.torch.ranks import everyone


class OptimumShiftCallback(Callback):
    """Attaches an `OptimumShift` to each optimizer of a training.

    Args:
        every: Optimizer steps from one shift to the next.
        choices: Of `OptimumShift`.

    Attributes:
        shifts: Those attached, one for each optimizer, with the results of their last shifts; none before training.
    """

    def __init__(self, every: int, **choices: Any) -> None:
        self.shifts: list[OptimumShift] = []
        self._every, self._choices = every, choices
        self._handles: list[Handle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._remove()
        self.shifts = [
            OptimumShift(pl_module, self._every, group=everyone(), **self._choices) for _ in trainer.optimizers
        ]
        self._handles = [s.attach(optimizer) for s, optimizer in zip(self.shifts, trainer.optimizers, strict=True)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
