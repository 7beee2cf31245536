"""Settings refuse what cannot be meant, and say what would be accepted."""

import dataclasses
import math

import numpy as np
import pytest

from onnx_optshift.errors import InputError
from onnx_optshift.settings import Settings


def test_defaults_are_exact_norm_shift_of_everything():
    settings = Settings()
    assert settings.tolerance == 0.0
    assert settings.objective == "norm"
    assert settings.stochastic is None
    assert settings.nodes_to_include == settings.nodes_to_exclude == settings.op_types == settings.providers == ()
    assert settings.seed == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


def test_every_field_is_documented():
    undocumented = [f.name for f in dataclasses.fields(Settings) if f"        {f.name}: " not in Settings.__doc__]
    assert not undocumented


@pytest.mark.parametrize(
    ("given", "field", "kept"),
    [
        ({"tolerance": 0}, "tolerance", 0.0),
        ({"tolerance": 1}, "tolerance", 1.0),
        ({"tolerance": np.float32(0.5)}, "tolerance", 0.5),
        ({"tolerance": "auto"}, "tolerance", "auto"),
        ({"objective": "range"}, "objective", "range"),
        ({"stochastic": 0}, "stochastic", 0),
        ({"batch_size": np.int64(3)}, "batch_size", 3),
        ({"device": "cuda:12"}, "device", "cuda:12"),
        ({"op_types": ["Gemm", "Conv"]}, "op_types", ("Gemm", "Conv")),
        ({"nodes_to_include": "/fc1"}, "nodes_to_include", ("/fc1",)),
        ({"stochastic": 8, "tolerance": 0.0}, "stochastic", 8),
        ({"input_shapes": {"x:0": (1, 3), "n": [7], "m": 4}}, "input_shapes", ("x:0:1,3", "n:7", "m:4")),
        ({"range_block": 64, "quantization_bits": 4}, "range_block", 64),
        ({"range_scope": "tensor", "objective": "range"}, "range_scope", "tensor"),
        ({"snap": False, "objective": "range"}, "snap", False),
    ],
)
def test_accepted(given, field, kept):
    value = getattr(Settings(**given), field)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance": -0.01}, "tolerance: expected 'auto' or a relative deviation from 0 .* found -0.01"),
        ({"tolerance": math.nan}, "found nan"),
        ({"tolerance": math.inf}, "found inf"),
        ({"tolerance": 1.01}, "found 1.01"),
        ({"tolerance": "0.1"}, "found '0.1'"),
        ({"tolerance": True}, "found True"),
        ({"tolerance": None}, "found None"),
        ({"objective": "nrom"}, "objective: 'nrom' is not known.*Close matches: 'norm'"),
        ({"stochastic": -1}, "stochastic: expected a whole number of at least 0, found -1"),
        ({"stochastic": True}, "Give 0 to have the batch size chosen"),
        ({"stochastic": 8, "tolerance": 0.1}, "stochastic and tolerance 0.1 contradict each other"),
        ({"stochastic": 8, "tolerance": "auto"}, "contradict each other"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, found 0"),
        ({"batch_size": 1.5}, "found 1.5"),
        ({"max_samples": -5}, "max_samples"),
        ({"max_memory": 0}, "max_memory"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed: .*found None"),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N .*found 'gpu'"),
        ({"device": "GPU:1"}, r"For a GPU take 'cuda'\.$"),
        ({"range_block": 32}, "range_block only has a meaning with the objective 'range' or quantization_bits"),
        ({"range_scope": "tensor", "objective": "curvature"}, "range_scope only has a meaning with"),
        ({"snap": False, "quantization_bits": 4}, r"no-snap\) only has a meaning with the objective 'range'\. Give"),
        ({"objective": "range", "range_scope": "tensor", "range_block": 32}, "contradict each other: a scale"),
        ({"max_drift": 0.3, "tolerance": 0.1}, "are two questions"),
        ({"recapture": "always"}, "recapture 'always' has nothing to make up for"),
        ({"recapture": "allways", "tolerance": 0.1}, "recapture"),
        ({"input_shapes": 3}, "input_shapes: expected names, found 3"),
        ({"device": "cuda:"}, "found 'cuda:'"),
        ({"device": "cuda:-1"}, "found 'cuda:-1'"),
        ({"device": "cpu\n"}, "found 'cpu"),
        ({"device": None}, "found None"),
        ({"op_types": [1]}, "op_types: expected names"),
        ({"op_types": [""]}, "op_types: expected names"),
        ({"providers": 3}, "providers: expected names"),
        ({"labels": ""}, "labels"),
        ({"dry_run": 1}, "dry_run: expected True or False, found 1"),
        ({"save_as_external_data": "yes"}, "save_as_external_data"),
        ({"heldout_fraction": 0.0}, "heldout_fraction.*'none'"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"heldout_fraction": math.nan}, "heldout_fraction"),
    ],
)
def test_refused(given, message):
    with pytest.raises(InputError, match=message):
        Settings(**given)
