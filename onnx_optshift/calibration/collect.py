"""A collector: readers of every kind put checked arrays in, `Samples` come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnx_optshift.calibration.checks import Checked, check
from onnx_optshift.calibration.source import Feeds, InputSpec, Part, Samples, fixed_batch
from onnx_optshift.errors import InputError


class Collector:
    """Gathers parts from several sources (mutable).

    Attributes:
        inputs: The model's inputs.
        labels_name: Name of the array that holds labels.
    """

    def __init__(self, inputs: Sequence[InputSpec], labels_name: str) -> None:
        self.inputs = tuple(inputs)
        self.labels_name = labels_name
        self._parts: list[Part] = []
        self._notes: dict[str, None] = {}  # ordered, and the same note of a thousand files once
        self._synthetic = False

    def add(self, arrays: Mapping[str, object], where: str, *, feed: bool = False) -> None:
        """Takes arrays that stay in memory.

        Args:
            arrays: Array by name, labels among them.
            where: Where they come from, for messages.
            feed: Whether they are one feed; otherwise stacked samples, if the shapes allow.

        Raises:
            InputError: They do not fit the model.
        """
        checked = self._check(arrays, where, feed=feed)
        self._parts.append(Part(checked.rows, checked.stacked, lambda: checked.feeds, checked.labels))

    def add_lazy(self, read: Callable[[], Mapping[str, object]], where: str, *, feed: bool = False) -> None:
        """Takes arrays that are read now, to check them, and again on every pass.

        Args:
            read: Reads the arrays.
            where: Where they come from, for messages.
            feed: Whether they are one feed; otherwise stacked samples, if the shapes allow.

        Raises:
            InputError: They cannot be read, or do not fit the model. Reading them again may raise it too.
        """
        first = self._check(read(), where, feed=feed)
        rows, stacked, labels = first.rows, first.stacked, first.labels
        del first  # the closure below must not keep its arrays alive

        def again() -> Feeds:
            checked = self._check(read(), where, feed=feed)
            if (checked.rows, checked.stacked) != (rows, stacked):
                raise InputError(
                    f"{where}: changed while it was in use ({rows} samples, now {checked.rows}). Run again."
                )
            return checked.feeds

        self._parts.append(Part(rows, stacked, again, labels))

    def add_samples(self, samples: Samples) -> None:
        """Takes samples that were loaded before."""
        self._parts += samples.parts
        self._notes |= dict.fromkeys(samples.notes)
        self._synthetic |= samples.synthetic

    def samples(self, source: str) -> Samples:
        """Everything taken so far.

        Args:
            source: Where it comes from, for the report.

        Raises:
            InputError: There is nothing, or the parts disagree about labels.
        """
        if not self._parts:
            raise InputError(f"{source}: no samples. Give at least one, better some hundreds.")
        batch = fixed_batch(self.inputs)
        return Samples(self._parts, source=source, batch=batch, synthetic=self._synthetic, notes=list(self._notes))

    def _check(self, arrays: Mapping[str, object], where: str, *, feed: bool) -> Checked:
        checked = check(arrays, self.inputs, where, labels_name=self.labels_name, feed=feed)
        self._notes |= dict.fromkeys(checked.notes)
        return checked
