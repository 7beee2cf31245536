"""Which samples a run uses, and what for: to fit, to judge, and to promise on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_optshift.calibration.load import beside, load
from onnx_optshift.calibration.source import InputSpec, Samples
from onnx_optshift.calibration.split import limit, split
from onnx_optshift.calibration.synthetic import synthetic
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.settings import Settings

# Fewer samples than this cannot be split into one part that fits and one that judges.
FEWEST_TO_SPLIT = 10
# The word for `--heldout` that switches the gate off: exact on the calibration data is then all that is promised.
NO_HELDOUT = "none"

NO_DATA_WARNING = (
    "no calibration data: seeded random inputs are used, so only directions that nothing excites are removed. "
    "Give real data with --calib before relying on the result."
)


@dataclass(frozen=True)
class Data:
    """The samples of one run.

    Attributes:
        calibration: All samples that the final solve and the promise cover.
        fit: The part that settings are tried on; `calibration` itself unless some of it was split off to judge.
        judge: Data that only judges: given as held-out data, or split off; None when there is none.
        split: Whether `judge` was split off the calibration data and joins it for the final solve.
        warnings: One sentence each.
    """

    calibration: Samples
    fit: Samples
    judge: Samples | None
    split: bool
    warnings: tuple[str, ...] = ()


def input_specs(model: ModelFile) -> list[InputSpec]:
    """The model's inputs as the calibration side knows them."""
    return [InputSpec(spec.name, spec.dtype, spec.shape) for spec in model.inputs]


def find_calibration(model: ModelFile, sources: Sequence[object] | None, settings: Settings) -> Samples | None:
    """Calibration data as given, or else found beside the model; None when there is neither.

    Raises:
        InputError: The data cannot be used.
    """
    specs = input_specs(model)
    if not sources and model.path is not None:
        sources = list(beside(model.path, specs))
    if not sources:
        return None
    samples = load(sources, specs, labels_name=settings.labels)
    return samples if settings.max_samples is None else limit(samples, settings.max_samples)


def synthetic_calibration(model: ModelFile, samples: int, settings: Settings) -> Samples:
    """Seeded random inputs for a model that came without data.

    Raises:
        InputError: An input's type cannot be made up.
    """
    return synthetic(input_specs(model), samples, settings.seed)


def arrange(model: ModelFile, calibration: Samples, heldout: Sequence[object] | None, settings: Settings) -> Data:
    """Decides which samples fit and which judge.

    Args:
        model: For its inputs.
        calibration: All calibration samples.
        heldout: Sources of held-out data; `["none"]` switches the gate off; None splits it off.
        settings: For the fraction, the labels' name and the seed.

    Raises:
        InputError: The held-out data cannot be used.
    """
    warnings = [NO_DATA_WARNING] if calibration.synthetic else []
    if heldout and list(heldout) == [NO_HELDOUT]:
        warnings.append("the held-out gate is off: data unlike the calibration data may be served worse.")
        return Data(calibration, calibration, None, False, tuple(warnings))
    if heldout:
        judge = load(heldout, input_specs(model), labels_name=settings.labels)
        if judge.fingerprint == calibration.fingerprint:
            warnings.append(
                "the held-out data equals the calibration data (same fingerprint), so it cannot show harm to unseen "
                "data. Give other samples with --heldout."
            )
        return Data(calibration, calibration, judge, False, tuple(warnings))
    if len(calibration) < FEWEST_TO_SPLIT:
        warnings.append(
            f"{len(calibration)} calibration samples are too few to set some aside as judges: whether unseen data is "
            "served worse was not checked. Give more samples, or --heldout."
        )
        return Data(calibration, calibration, None, False, tuple(warnings))
    fit, judge_indices = split(calibration, settings.heldout_fraction, settings.seed)
    return Data(calibration, calibration.select(fit), calibration.select(judge_indices), True, tuple(warnings))
