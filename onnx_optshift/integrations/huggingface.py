"""A callback for the Trainer of Hugging Face's transformers: shifts during training.

Trainer(model, arguments, train_dataset=..., callbacks=[OptimumShiftCallback(every=100)])
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from onnx_optshift.torch.optimum_shift import Handle, OptimumShift
from onnx_optshift.torch.ranks import everyone


class OptimumShiftCallback(TrainerCallback):
    """Attaches an `OptimumShift` to the Trainer's optimizer for the time of its training.

    Args:
        every: Optimizer steps from one shift to the next.
        choices: Of `OptimumShift`.

    Attributes:
        shift: The attached one, with the result of its last shift; None before training.
    """

    def __init__(self, every: int, **choices: Any) -> None:
        self.shift: OptimumShift | None = None
        self._every, self._choices = every, choices
        self._handle: Handle | None = None

    def on_train_begin(self, *_: object, model: Any, optimizer: Any, **__: object) -> None:  # noqa: D102
        self.on_train_end()
        # Accelerate's wrapper steps the optimizer inside, whose hooks are the ones that are called.
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        # The Trainer hands out the model without its data-parallel wrapper.
        self.shift = OptimumShift(model, self._every, group=everyone(), **self._choices)
        self._handle = self.shift.attach(optimizer)

    def on_train_end(self, *_: object, **__: object) -> None:  # noqa: D102
        if self._handle is not None:
            self._handle.remove()
