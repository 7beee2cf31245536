"""`OptimumShift`: shifts during training, after every so many steps of an optimizer (arXiv 2405.14111)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onnx_optshift.capture.session import as_tensor
from onnx_optshift.errors import InputError, OptShiftWarning
from onnx_optshift.geometry import Tap
from onnx_optshift.run.candidate import Candidate
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve import min_norm
from onnx_optshift.solve.finish import as_matrix, finished
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.torch import ranks
from onnx_optshift.torch.arrays import as_array
from onnx_optshift.torch.calls import Calls
from onnx_optshift.torch.capture import Hooks, Statistics, solver_device
from onnx_optshift.torch.config import ShiftConfig
from onnx_optshift.torch.discover import Discovered, FilterFn, discover
from onnx_optshift.torch.result import ShiftResult, layer_reports
from onnx_optshift.torch.running import check_hooks_are_seen, eagerly, evaluating, put, unwrapped
from onnx_optshift.torch.shifting import layers_of, tensors

MOMENTA = ("keep", "project")
# What optimizers of torch call the running mean of their gradients.
_MOMENTUM_STATES = ("momentum_buffer", "exp_avg")


class OptimumShift:
    """Shifts a model's weights in place after every k-th step of its optimizer.

    ```python
    shift = OptimumShift(model, every=100)
    handle = shift.attach(optimizer)  # before training; handle.remove() ends it
    ```

    Rows are seen by forward pre-hooks that are in place for one step out of k: the other steps run as if there were
    nothing. A compiled model runs uncompiled for that step.

    Args:
        model: What is trained. With DistributedDataParallel the rows of all ranks count, and all ranks end up with the
            weights of the first.
        every: k, optimizer steps from one shift to the next.
        batch: Whose rows: None, the default, those of the training batches of the step (of all of them, where
            gradients accumulate), as the layers met them in training. A number B: the first B entries along axis 0 of
            each layer's input. Anything else is a batch as `shift_` takes it, or a function that gives one: the model
            runs on it after the optimizer's step, in eval mode; so class-balanced batches are given.
        tolerance: Residual that each layer may have on these rows; 0, the default, is exact.
        objective: `"norm"` or `"range"`.
        filter_fn: `(module, qualified name) -> bool`, which modules may be shifted; all that can be by default. Weights
            that the optimizer does not have stay as they are in any case.
        momentum: `"keep"`, the default, leaves the optimizer's state alone. `"project"` takes from the momentum of a
            shifted weight (SGD's and RMSprop's `momentum_buffer`, Adam's `exp_avg`) what no row reaches, so that it
            does not carry back what the shift took away.
        recheck: A layer whose rows span all directions has no exact shift: it is looked at again at every so many
            shifts only.
        group: The processes that train the model together, where it is not given in its DistributedDataParallel.

    Attributes:
        steps: Optimizer steps counted so far.
        result: Of the last shift; None before the first.

    Raises:
        InputError: A value cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        batch: object = None,
        tolerance: float = 0.0,
        objective: str = "norm",
        filter_fn: FilterFn | None = None,
        momentum: str = "keep",
        recheck: int = 10,
        group: ranks.Group | None = None,
    ) -> None:
        numbers = {"every": every, "recheck": recheck} | ({"batch": batch} if isinstance(batch, int) else {})
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected a whole number of at least 1, found {value!r}.")
        if momentum not in MOMENTA:
            raise InputError(f"momentum: {momentum!r} is not known. Take one of {MOMENTA}.")
        check_hooks_are_seen(model)
        self.steps = 0
        self.result: ShiftResult | None = None
        self._group = group or ranks.group_of(model)
        self._model = unwrapped(model)
        self._every, self._batch, self._filter = every, batch, filter_fn
        self._config = ShiftConfig(tolerance=tolerance, tolerance_of="layers", objective=objective)
        self._momentum, self._recheck = momentum, recheck
        self._resting: dict[str, int] = {}  # shifts for which a weight is not looked at
        self._optimizer: Optimizer | None = None
        # Of the step whose rows are seen.
        self._found = Discovered((), (), {}, {})
        self._statistics: Statistics | None = None
        self._armed = ExitStack()

    @property
    def armed(self) -> bool:
        """Whether hooks are in place: the next step is followed by a shift."""
        return self._statistics is not None

    def attach(self, optimizer: Optimizer) -> Handle:
        """Shifts after every k-th step of an optimizer from now on, until the handle is removed.

        Raises:
            InputError: It is attached already, or the optimizer has no weight that can be shifted.
        """
        if self._optimizer is not None:
            raise InputError("this OptimumShift is attached already. Remove its handle first, or make another one.")
        self._optimizer = optimizer
        if not self._discovered().weights:
            self._optimizer = None
            raise InputError(
                "the optimizer has no weight that can be shifted. (a) It was given other parameters than the model's. "
                "(b) filter_fn leaves all layers out. (c) The model has no linear layer that is handled"
            )
        hook = optimizer.register_step_post_hook(lambda *_: self._after_step())
        self._arm_if_due()
        return Handle(hook.remove, self._detach)

    def step(self) -> None:
        """Counts one step of an optimizer that is not attached, and shifts where it is due.

        Raises:
            InputError: One is attached.
        """
        if self._optimizer is not None:
            raise InputError("the optimizer that this is attached to counts the steps. Leave out step().")
        self._after_step()

    def _after_step(self) -> None:
        self.steps += 1
        if self.steps % self._every == 0:
            self._shift()
        self._arm_if_due()

    def _detach(self) -> None:
        self._disarm()
        self._optimizer = None

    def _arm_if_due(self) -> None:
        """Puts hooks in place where the next step is followed by a shift of what they see."""
        if (self.steps + 1) % self._every or not (self._batch is None or isinstance(self._batch, int)):
            return
        self._found = found = self._discovered()
        first = self._batch if isinstance(self._batch, int) else None
        statistics = self._statistics = Statistics(tuple(found.modules), solver_device(self._model), first=first)

        def watch(tap: Tap, activation: Tensor) -> None:
            # Validation is not training; and under activation checkpointing only the second of two runs has gradients.
            if torch.is_grad_enabled():
                statistics.add(tap, activation)

        self._armed.enter_context(eagerly())
        self._armed.enter_context(Hooks(found.modules, watch))

    def _disarm(self) -> None:
        self._statistics = None
        self._armed.close()

    def _discovered(self) -> Discovered:
        """The weights that are looked at now."""
        found = discover(self._model, self._filter)
        held = None
        if self._optimizer is not None:
            held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        return found.only(
            weight.name
            for weight in found.weights
            if (held is None or id(found.parameters[weight.name]) in held) and not self._resting.get(weight.name)
        )

    def _shift(self) -> None:
        if self._statistics is not None:
            found, statistics = self._found, self._statistics
            self._disarm()
        else:
            found = self._discovered()
            with ranks.together(self._group):
                statistics = self._capture(found)
        self._resting = {name: left - 1 for name, left in self._resting.items() if left > 1}
        if not found.weights:
            return  # all of them rest
        moments = ranks.merged(statistics.moments, self._group)
        if not any(some.rows or some.nonfinite for some in moments.values()):
            warnings.warn(
                "no layer has met any row since the step before, and nothing is shifted. (a) Another copy of the model "
                "is trained. (b) Its forward runs without gradients",
                OptShiftWarning,
                stacklevel=2,
            )
        layers = layers_of(found, moments, self._config)
        candidate = layers.candidate(self._config.tolerance)
        put(found.parameters, tensors(candidate.arrays))
        if self._momentum == "project":
            self._project(layers, candidate, found)
        ranks.agree([found.parameters[weight.name] for weight in found.weights], self._group)
        full = [name for name, solved in candidate.solved.items() if solved.shift.outcome is Outcome.FULL_RANK]
        # One decision for all ranks: they must look at the same layers.
        self._resting |= dict.fromkeys(ranks.gathered(full, self._group)[0], self._recheck - 1)
        self.result = ShiftResult(layer_reports(layers, candidate, found.skips), None, candidate.tolerance)

    def _capture(self, found: Discovered) -> Statistics:
        """Statistics of the batch that was given, after the optimizer's step."""
        batch: Any = self._batch() if callable(self._batch) else self._batch
        statistics = Statistics(tuple(found.modules), solver_device(self._model))
        source = Calls(self._model, [batch])
        with evaluating(self._model), Hooks(found.modules, statistics.add):
            for call in source:
                source.run(call)
        return statistics

    def _project(self, layers: Layers, candidate: Candidate, found: Discovered) -> None:
        """Takes from the momentum of shifted weights what no row reaches."""
        if self._optimizer is None:
            return
        for weight in found.weights:
            state = self._optimizer.state.get(found.parameters[weight.name], {})
            for key in _MOMENTUM_STATES:
                buffer = state.get(key)
                if candidate.solved[weight.name].moved and isinstance(buffer, Tensor):
                    array, spectrum = as_array(buffer), layers.factored.spectrum(weight)
                    matrix = as_matrix(array, weight.form, str(spectrum.basis.device))
                    # The exact shift of any matrix is its projection on the rows' space.
                    shift = min_norm.solve(spectrum, matrix, ROUNDING_UNIT[weight.dtype])
                    buffer.copy_(as_tensor(finished(shift.matrix, weight.form, array.dtype)))


class Handle:
    """What an attachment is undone by; also as a context manager."""

    def __init__(self, *undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Ends the attachment, and takes hooks that are in place out again."""
        undo, self._undo = self._undo, ()
        for step in undo:
            step()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
