"""Which data must hold labels that the user named: the data that judges."""

import numpy as np
import pytest
from tiny_models import two_layers

from onnx_optshift.data import arrange, find_calibration
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
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


def test_named_labels_must_be_in_the_data_that_is_split(model):
    with pytest.raises(InputError, match=r"no array 'label' with labels.*Close matches: 'labels'"):
        find_calibration(model, data(model, labels=LABELS), NAMED)
    assert find_calibration(model, data(model, label=LABELS), NAMED).classes == 2
    assert find_calibration(model, data(model), Settings()).classes is None  # the default name was not asked for


def test_named_labels_must_be_in_the_held_out_data_if_that_judges(model):
    heldout = data(model, label=LABELS)
    calibration = find_calibration(model, data(model), NAMED, heldout)
    assert arrange(model, calibration, heldout, NAMED).judge.classes == 2
    with pytest.raises(InputError, match="no array 'label' with labels"):
        arrange(model, calibration, data(model), NAMED)
    with pytest.raises(InputError, match="no array 'label' with labels"):
        find_calibration(model, data(model), NAMED, ["none"])


def test_at_most_the_first_samples(model):
    assert len(find_calibration(model, data(model), Settings(max_samples=7))) == 7
    assert len(find_calibration(model, data(model), Settings(max_samples=70))) == 20
