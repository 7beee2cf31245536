"""The example networks: each trains in torch and writes itself, node by node, as an ONNX graph."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # the one of opset 17's release, so that old runtimes read the files too


class GraphWriter:
    """Collects nodes and initializers. A node's one output is named after the node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def tensor(self, name: str, value: Tensor | NDArray[np.generic]) -> str:
        """Adds an initializer; returns its name."""
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: object) -> str:
        """Adds a node; returns its output's name."""
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def model(
        self,
        name: str,
        inputs: tuple[str, int, list[str | int]],
        outputs: tuple[str, int, list[str | int]],
        properties: dict[str, str] | None = None,
        **fields: str,
    ) -> onnx.ModelProto:
        """The model of all nodes, with one input and one output (name, element type, shape)."""
        values = [[helper.make_tensor_value_info(*each)] for each in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, name, *values, self.initializers)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, **fields)
        helper.set_model_props(model, properties or {})
        return model

    def network(
        self, network: nn.Module, name: str, x: str, shape: tuple[int, ...], output: str, **more: Any
    ) -> onnx.ModelProto:
        """The checked model of a network from float32 images to logits, with a dynamic batch axis."""
        network.write(self, x, output)
        model = self.model(
            name, (x, TensorProto.FLOAT, ["batch", *shape]), (output, TensorProto.FLOAT, ["batch", CLASSES]), **more
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def gemm(self, x: str, name: str, layer: nn.Linear, *, trans_b: bool) -> str:
        """A Gemm with the weight as PyTorch stores it `[m, d]` (trans_b) or as a plain factor `[d, m]`."""
        weight = self.tensor(f"{name}.weight", layer.weight if trans_b else layer.weight.T)
        return self.node("Gemm", [x, weight, self.tensor(f"{name}.bias", layer.bias)], name, transB=int(trans_b))

    def matmul_add(self, x: str, name: str, layer: nn.Linear, *, output: str = "") -> str:
        """A MatMul with a weight `[d, m]`, and an Add for the bias, named `output` if given."""
        product = self.node("MatMul", [x, self.tensor(f"{name}.weight", layer.weight.T)], f"{name}.matmul")
        return self.node("Add", [product, self.tensor(f"{name}.bias", layer.bias)], output or name)

    def layer_norm(self, x: str, name: str, layer: nn.LayerNorm) -> str:
        """LayerNormalization over the last axis."""
        scale, bias = self.tensor(f"{name}.scale", layer.weight), self.tensor(f"{name}.bias", layer.bias)
        return self.node("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=layer.eps)

    def conv(self, x: str, name: str, layer: nn.Conv2d) -> str:
        """A Conv with its bias."""
        (pad_y, pad_x), group = layer.padding, layer.groups
        parameters = [self.tensor(f"{name}.weight", layer.weight), self.tensor(f"{name}.bias", layer.bias)]
        return self.node(
            "Conv",
            [x, *parameters],
            name,
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[pad_y, pad_x, pad_y, pad_x],
            group=group,
        )


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: tuple[int, ...], *, plain_layout: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, m) for d, m in itertools.pairwise(widths))
        self.plain_layout = plain_layout

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of `x [n, d]`."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    def write(self, graph: GraphWriter, x: str, output: str) -> None:
        """Gemm layers; those listed in `plain_layout` store `[d, m]` (transB=0), the others `[m, d]` (transB=1)."""
        for k, layer in enumerate(self.layers, start=1):
            last = k == len(self.layers)
            x = graph.gemm(x, output if last else f"fc{k}", layer, trans_b=k not in self.plain_layout)
            if not last:
                x = graph.node("Relu", [x], f"relu{k}")


class Transformer(nn.Module):
    """One pre-norm transformer block whose tokens are the image's eight rows of eight pixels."""

    tokens, width, heads, hidden = 8, 32, 2, 64

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, self.width)
        self.position = nn.Parameter(0.1 * torch.randn(self.tokens, self.width))
        self.attention_norm, self.ffn_norm = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.q, self.k, self.v, self.o = (nn.Linear(self.width, self.width) for _ in range(4))
        self.ffn_up, self.ffn_down = nn.Linear(self.width, self.hidden), nn.Linear(self.hidden, self.width)
        self.classifier = nn.Linear(self.width, CLASSES)

    @property
    def scale(self) -> float:
        """Factor on the attention scores: 1/sqrt(head width)."""
        return 1.0 / math.sqrt(self.width // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of `x [n, 8, 8]`."""
        x = self.embed(x) + self.position
        normed = self.attention_norm(x)
        split = (-1, self.tokens, self.heads, self.width // self.heads)
        q, k, v = (layer(normed).reshape(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(-1, self.tokens, self.width))
        x = x + self.ffn_down(F.relu(self.ffn_up(self.ffn_norm(x))))
        return self.classifier(x.mean(dim=1))

    def write(self, graph: GraphWriter, x: str, output: str) -> None:
        """MatMul + Add layers; q, k and v read one tensor."""
        split = graph.tensor("split_heads.shape", np.array([0, self.tokens, self.heads, self.width // self.heads]))
        join = graph.tensor("join_heads.shape", np.array([0, self.tokens, self.width]))
        scale = graph.tensor("attention.scale", np.array(self.scale, np.float32))

        def project(name: str, layer: nn.Linear, perm: list[int]) -> str:
            heads = graph.node("Reshape", [graph.matmul_add(normed, name, layer), split], f"{name}.split_heads")
            return graph.node("Transpose", [heads], f"{name}.transpose", perm=perm)

        x = graph.matmul_add(x, "embed", self.embed)
        x = graph.node("Add", [x, graph.tensor("position", self.position)], "tokens")
        normed = graph.layer_norm(x, "attention.norm", self.attention_norm)
        q = project("attention.q", self.q, [0, 2, 1, 3])
        k = project("attention.k", self.k, [0, 2, 3, 1])
        v = project("attention.v", self.v, [0, 2, 1, 3])
        scores = graph.node("Mul", [graph.node("MatMul", [q, k], "attention.scores"), scale], "attention.scaled")
        shares = graph.node("Softmax", [scores], "attention.softmax", axis=-1)
        mixed = graph.node("MatMul", [shares, v], "attention.mix")
        mixed = graph.node("Transpose", [mixed], "attention.transpose", perm=[0, 2, 1, 3])
        mixed = graph.node("Reshape", [mixed, join], "attention.join_heads")
        x = graph.node("Add", [x, graph.matmul_add(mixed, "attention.o", self.o)], "attention.residual")
        y = graph.matmul_add(graph.layer_norm(x, "ffn.norm", self.ffn_norm), "ffn.up", self.ffn_up)
        y = graph.matmul_add(graph.node("Relu", [y], "ffn.relu"), "ffn.down", self.ffn_down)
        x = graph.node("Add", [x, y], "ffn.residual")
        pooled = graph.node("ReduceMean", [x], "pool", axes=[1], keepdims=0)
        graph.matmul_add(pooled, "classifier", self.classifier, output=output)


class Cnn(nn.Module):
    """A small Conv net: dense, strided, depthwise and pointwise Conv, average pool, Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 48, 1, padding=0)
        self.classifier = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of `x [n, 1, 8, 8]`."""
        for layer in (self.stem, self.down, self.depthwise, self.pointwise):
            x = F.relu(layer(x))
        return self.classifier(x.mean(dim=(2, 3)))

    def write(self, graph: GraphWriter, x: str, output: str) -> None:
        """Conv layers and a Gemm, closed by a Softmax: the output is probabilities."""
        for name in ("stem", "down", "depthwise", "pointwise"):
            x = graph.node("Relu", [graph.conv(x, name, getattr(self, name))], f"{name}.relu")
        x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
        x = graph.gemm(x, "classifier", self.classifier, trans_b=True)
        graph.node("Softmax", [x], output, axis=-1)
