"""Small models as text, with seeded weights: what the tests of `graph` (and of everything behind it) run on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.write.patch import write_beside


def model(
    body: str,
    tensors: Mapping[str, np.ndarray | onnx.TensorProto] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: str = "",
    imports: str = "",
    inputs_too: bool = False,
) -> onnx.ModelProto:
    """A model from the text of its graph, with these initializers put first.

    Args:
        body: The graph in onnx.parser syntax.
        tensors: Initializers by name.
        opset: Of the standard domain.
        ir_version: Of the file.
        functions: Text of model-local functions.
        imports: More opset imports, such as `, "com.microsoft":1`.
        inputs_too: Lists the initializers as graph inputs, as IR 3 demands.
    """
    text = f'<ir_version: {ir_version}, opset_import: ["":{opset}{imports}], domain: "tests">\n{body}\n{functions}'
    proto = parser.parse_model(text)
    for name, value in (tensors or {}).items():
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        proto.graph.initializer.append(tensor)
        if inputs_too:
            proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return proto


def weight(*shape: int, seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    """A seeded normal array."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def typed(name: str, array: np.ndarray, data_type: int) -> onnx.TensorProto:
    """A tensor stored in the typed field of its element type, not as raw bytes."""
    tensor = TensorProto(name=name, data_type=data_type, dims=array.shape)
    if data_type == TensorProto.FLOAT:
        tensor.float_data.extend(array.ravel().tolist())
    elif data_type == TensorProto.DOUBLE:
        tensor.double_data.extend(array.ravel().tolist())
    else:
        tensor.int32_data.extend(array.ravel().view(np.uint16).tolist())
    return tensor


def two_layers(seed: int = 0, width: int = 4) -> onnx.ModelProto:
    """x [N, width] -> Gemm -> Relu -> MatMul -> y [N, 3]; weights `W1` [width, 5] and `W2` [5, 3]."""
    text = f"g (float[N,{width}] x) => (float[N,3] y) {{ h = Gemm(x, W1, b)  r = Relu(h)  y = MatMul(r, W2) }}"
    tensors = {"W1": weight(width, 5, seed=seed), "b": weight(5, seed=seed), "W2": weight(5, 3, seed=seed)}
    return model(text, tensors)


def patched(model: ModelFile, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """What the package writes for a model with these arrays."""
    with tempfile.TemporaryDirectory() as folder, write_beside(model, arrays, Path(folder, "new.onnx")) as written:
        return onnx.load(written.temp_path)


def save_external(
    proto: onnx.ModelProto, path: Path, files: Mapping[str, str], *, before: int = 0, gap: int = 0
) -> Path:
    """Saves with the named initializers in external files.

    Args:
        proto: The model; changed in place.
        path: Of the model.
        files: Location by initializer name.
        before: Bytes in a file before the first tensor.
        gap: Bytes between tensors.
    """
    filler = np.random.default_rng(5).bytes
    for tensor in proto.graph.initializer:
        if tensor.name not in files:
            continue
        target = path.parent / files[tensor.name]
        content = target.read_bytes() + filler(gap) if target.exists() else filler(before)
        payload = numpy_helper.to_array(tensor).tobytes()
        target.write_bytes(content + payload)
        for field in ("raw_data", "float_data", "int32_data", "double_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": files[tensor.name], "offset": len(content), "length": len(payload)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(proto, path)
    return path
