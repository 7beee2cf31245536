"""What tests of discovery ask a model: its weights, its skips."""

from __future__ import annotations

import onnx

from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Skip, Weight


def find(proto: onnx.ModelProto, **selection: tuple[str, ...]) -> tuple[list[Weight], list[Skip]]:
    return discover(ModelFile.load(proto), Selection(**selection))


def only(proto: onnx.ModelProto) -> Weight:
    weights, skips = find(proto)
    assert len(weights) == 1, skips
    assert not skips
    return weights[0]


def skipped(proto: onnx.ModelProto) -> Skip:
    weights, skips = find(proto)
    assert not weights
    assert len(skips) == 1
    return skips[0]
