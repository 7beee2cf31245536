"""Which data must hold labels that the user named: the data that judges, and draws class by class."""

import numpy as np
import pytest
from tiny_models import two_layers

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.prepare import arrange, find_calibration
from onnx_optshift.settings import Settings

NAMED = Settings(labels="label")


@pytest.fixture
def model():
    return ModelFile.load(two_layers())


def data(model, **labels):
    (spec,) = model.inputs
    width = spec.shape[-1]
    return [{spec.name: np.arange(20 * width, dtype=np.float32).reshape(20, width)} | labels]


LABELS = np.arange(20) % 2


@pytest.mark.parametrize("heldout", [None, ["none"]])
def test_named_labels_must_be_in_the_calibration_data_unless_other_data_judges(model, heldout):
    with pytest.raises(InputError, match=r"no array 'label' with labels.*Close matches: 'labels'"):
        find_calibration(model, data(model, labels=LABELS), NAMED, heldout)
    assert find_calibration(model, data(model, label=LABELS), NAMED, heldout).classes == 2
    # The default name was not asked for.
    assert find_calibration(model, data(model), Settings(), heldout).classes is None


def test_named_labels_must_be_in_the_held_out_data_if_that_judges(model):
    heldout = data(model, label=LABELS)
    calibration = find_calibration(model, data(model), NAMED, heldout)
    assert arrange(model, calibration, heldout, NAMED).heldout.classes == 2
    with pytest.raises(InputError, match="no array 'label' with labels"):
        arrange(model, calibration, data(model), NAMED)


def test_at_most_the_first_samples(model):
    assert len(find_calibration(model, data(model), Settings(max_samples=7))) == 7
    assert len(find_calibration(model, data(model), Settings(max_samples=70))) == 20
