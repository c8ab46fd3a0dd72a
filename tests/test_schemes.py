"""Schemes that layers are quantized to while loading: the engine's logits against the same model in numpy, by ternary.py's definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import TernaryTransformer, ternary
from bitnet.errors import UsageError
from bitnet.files import safetensors
from bitnet.models import open_checkpoint
from bitnet.shapes import WEIGHTS as SHAPE_WEIGHTS
from bitnet.shapes import random_engine, shape_bytes
from bitnet.weights import QUANTIZED, WEIGHTS, check_weights, load_engine

WIDTH, FFN, HEADS, KV_HEADS, SIZE, VOCAB, LAYERS = 64, 80, 4, 2, 16, 60, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV_HEADS * SIZE, WIDTH), "self_attn.v_proj": (KV_HEADS * SIZE, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN),
}  # fmt: skip
IDS = [3, 14, 15, 9, 26, 5, 35]


def tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    found = {"model.embed_tokens.weight": rng.normal(size=(VOCAB, WIDTH)).astype(dtype), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (1 + 0.1 * rng.normal(size=WIDTH)).astype(np.float32)
        for name, shape in LINEARS.items():
            found[f"model.layers.{i}.{name}.weight"] = (rng.normal(size=shape) * 0.2).astype(dtype)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    safetensors.write(tmp_path / "model.safetensors", tensors(), {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def product(weights: str, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x w^T as ternary.py defines it for layers of this scheme."""
    if weights not in QUANTIZED:
        return ternary.matmul_dense(w.astype(np.float16).astype(np.float32) if weights == "f16" else w, x)
    group = QUANTIZED[weights]
    if weights == "ternary":
        codes, scale = ternary.absmean(w)
        scales = np.full((len(w), 1), scale, np.float32)
    else:
        codes, scales = getattr(ternary, f"quantize_{weights}")(w, group)
    return ternary.matmul_integer(codes, scales, *ternary.quantize_activations(x, group), group)


def numpy_logits(weights: str, t: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab]: llama with rotated halves, keys and values kept in f16."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return np.float32(x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * t[name])

    def rope(x: np.ndarray) -> np.ndarray:
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def halves(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float64).repeat(HEADS // KV_HEADS, 1)

    n = len(ids)
    x = t["model.embed_tokens.weight"][ids].astype(np.float32)
    for i in range(LAYERS):
        at = f"model.layers.{i}."

        def linear(name: str, h: np.ndarray, at: str = at) -> np.ndarray:
            return product(weights, t[f"{at}{name}.weight"].astype(np.float32), np.float32(h))

        h = norm(x, f"{at}input_layernorm.weight")
        q = rope(linear("self_attn.q_proj", h).reshape(n, HEADS, SIZE))
        k = halves(rope(linear("self_attn.k_proj", h).reshape(n, KV_HEADS, SIZE)))
        v = halves(linear("self_attn.v_proj", h).reshape(n, KV_HEADS, SIZE))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(SIZE) + np.triu(np.full((n, n), -np.inf), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + linear("self_attn.o_proj", np.einsum("hqk,khd->qhd", p, v).reshape(n, WIDTH))
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate = linear("mlp.gate_proj", h)
        x = x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", h))
    return ternary.matmul_dense(t["model.embed_tokens.weight"].astype(np.float32), norm(x, "model.norm.weight"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_are_those_of_numpy(folder: Path, weights: str) -> None:
    engine = load_engine(open_checkpoint(folder), threads=2, weights=weights)
    found = engine.forward([(engine.sequence(), IDS)], all_logits=True)
    expected = numpy_logits(weights, tensors(), IDS)
    # Products are equal. Sums in norms and attention differ by a few units of 2^-24, which may move a key or a value across its rounding to
    # f16, 2^-11 of itself, or one of some hundred activations of a token across its rounding to int8, 1/127 of the largest: either way
    # less than 2^-9 of a logit. Any other scheme is far off.
    tolerance = 2**-9 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= tolerance
    for other in {"f16", *QUANTIZED} - {weights, "f16" if weights == "stored" else ""}:
        assert np.abs(found - numpy_logits(other, tensors(), IDS)).max() > tolerance
    names = {"stored": "dense", "f16": "dense", "ternary": engine.codec}
    assert engine.codec == names.get(weights, weights) and engine.codec in ("t2", "b3", "dense", *QUANTIZED)
    assert engine.activation_group == QUANTIZED.get(weights, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("weights", QUANTIZED)
def test_values_of_any_type_are_quantized(tmp_path: Path, weights: str, dtype: type) -> None:
    t = {name: v.astype(np.float16) for name, v in tensors().items()}
    for folder, kind in (("narrow", np.float16), ("wide", dtype)):
        (tmp_path / folder).mkdir()
        safetensors.write(tmp_path / folder / "model.safetensors", {name: v.astype(kind) for name, v in t.items()}, {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps(CONFIG))
    one, other = (load_engine(open_checkpoint(tmp_path / name), threads=1, weights=weights) for name in ("narrow", "wide"))
    a, b = (e.forward([(e.sequence(), IDS)], all_logits=True) for e in (one, other))
    assert np.array_equal(a, b)


def test_every_scheme_is_as_large_as_it_says(folder: Path) -> None:
    sizes = {w: load_engine(open_checkpoint(folder), threads=1, weights=w).weight_bytes for w in ("f16", *QUANTIZED)}
    assert sizes["f16"] > sizes["int8"] > sizes["int4"] == sizes["fp4"] > sizes["binary"]
    for weights in SHAPE_WEIGHTS:
        engine = random_engine("article-12x512", threads=1, head="int8", weights=weights)
        assert np.isfinite(engine.forward([(engine.sequence(), [1, 2])])).all()
        # base-3 takes 1.6 of the two bits, the layers being a third; norms and the scales of the head are not counted
        assert (0.9 if weights == "ternary" else 0.999) * shape_bytes("article-12x512", "int8", weights) <= engine.weight_bytes
        assert engine.weight_bytes < 1.02 * shape_bytes("article-12x512", "int8", weights)
        assert engine.weight_bytes_per_token == engine.weight_bytes and engine.activation_group == QUANTIZED.get(weights, 0)


def test_groups_of_activations_for_binary_weights(folder: Path) -> None:
    for group in (16, 48):
        with pytest.raises(UsageError, match=f"^activation_group is {group}; binary weights meet one step per token"):
            load_engine(open_checkpoint(folder), threads=1, weights="binary", activation_group=group)
    engine = load_engine(open_checkpoint(folder), threads=1, weights="binary", activation_group=32)
    assert engine.activations == "int8 per 32 inputs" and np.isfinite(engine.forward([(engine.sequence(), IDS)])).all()
    with pytest.raises(UsageError, match=r"^activation_group is 16; binary weights"):
        engine.activation_group = 16


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="weights is 'fp16'; expected one of stored, f16, int8, int4, fp4, binary, ternary"):
        check_weights("fp16", None, "stored")
    for weights in ("int4", "fp4", "binary"):
        with pytest.raises(UsageError, match=r"is a BitNet model, .* it runs as trained only \(weights='stored'\)"):
            TernaryTransformer.from_pretrained(weights=weights)
    with pytest.raises(UsageError, match="codec is 't2' and weights 'int4'; codecs are for ternary layers, leave it out"):
        random_engine("article-12x512", weights="int4", codec="t2")
    with pytest.raises(UsageError, match="weights is 'q4'; expected one of f16, bf16, int8, int4, fp4, binary, ternary"):
        random_engine("article-12x512", weights="q4")
