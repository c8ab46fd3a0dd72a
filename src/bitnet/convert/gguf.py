"""Models as GGUF, as llama.cpp's own convert scripts write them: names, metadata, rows of llama's queries and keys by pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.fit import stored_scales
from bitnet.convert.formats import Format
from bitnet.convert.hf import as_bits, trits
from bitnet.convert.quantize import TABLES
from bitnet.convert.source import F32, I8, Model, Weight, permuted
from bitnet.errors import UnsupportedModelError
from bitnet.files import shown
from bitnet.files.ggml import I2_S_TAIL
from bitnet.files.gguf_write import Item
from bitnet.models import LINEARS, ModelConfig, gguf
from bitnet.packing import BLOCKS
from bitnet.tokenizer import replace_surrogates

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "bitnet": "bitnet"}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "i2_s": 40}  # where programs agree on them
BIASES = {"llama": LINEARS, "qwen2": ("q", "k", "v")}  # that llama.cpp loads
WINDOW_PERIOD = 6  # of gemma 3 in llama.cpp: every sixth layer sees everything


def architecture(config: ModelConfig, form: Format) -> str:
    """bitnet.cpp tells its models with relu^2 by a name of their own; llama.cpp knows `bitnet` only."""
    return "bitnet-b1.58" if form.weights == "i2_s" and config.activation == "relu2" else ARCHITECTURES[config.architecture]


def keeps_scale_beside(config: ModelConfig) -> bool:
    """Whether llama.cpp multiplies by a tensor's scale that is a tensor of its own (`blk.0.attn_q.scale`).

    Seen in llama.cpp of 2026 for these three; of qwen2 and gemma3 it loads such a tensor and forgets it.
    """
    return config.architecture in ("llama", "qwen3", "bitnet") and not config.biases


def notes(config: ModelConfig, form: Format) -> list[str]:
    """What the user of such a file must know."""
    found = []
    if form.weights == "i2_s":
        found.append("I2_S is bitnet.cpp's format, and only bitnet.cpp and this program read it; for llama.cpp choose gguf-tq2_0")
    if config.architecture == "bitnet" and config.activation == "relu2":
        found.append(
            "this model's feed-forward is relu(gate)^2 * up; today's llama.cpp computes architecture bitnet with SiLU instead: it loads "
            "the file and answers something else. bitnet.cpp (gguf-i2_s) and this program run it as trained"
        )
    if config.architecture == "bitnet" and (unknown := _not_loaded(config)):
        found.append(f"today's llama.cpp does not load this file, for the model has {unknown}; this program does")
    if form.weights in ("pq2_0", "ptq1_0"):
        found.append(f"{form.weights.upper()} is the Bonsai models' format, and llama.cpp itself does not read it; q2_0 is exact as well")
    return found


def metadata_of(model: Model, form: Format, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The file's keys. Raises UnsupportedModelError for what llama.cpp does not load, or computes otherwise whatever the file says."""
    c, name = model.config, architecture(model.config, form)
    path = model.checkpoint.path
    if obstacle := _obstacle(c):
        raise UnsupportedModelError(f"{shown(path)}: as GGUF {obstacle}; choose a Hugging Face layout (hf, safetensors)")
    kept = {key: value for key, value in model.checkpoint.gguf_metadata.items() if key.startswith("general.")}
    general: dict[str, Any] = {
        "general.name": replace_surrogates(path.name or path.absolute().name),
        **kept,
        "general.quantization_version": 2,
    }
    general |= {"general.architecture": name, "general.file_type": FILE_TYPES.get(form.weights)}
    general = {key: value for key, value in general.items() if value is not None and key != "general.alignment"}
    keys: dict[str, Any] = {
        "vocab_size": c.vocab_size, "context_length": c.max_context, "embedding_length": c.hidden_size, "block_count": c.n_layers,
        "feed_forward_length": c.ffn_size, "attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": c.head_dim, "rope.freq_base": float(c.rope.theta),
    }  # fmt: skip
    if c.architecture == "bitnet":
        keys["hidden_activation"] = c.activation
    if c.architecture == "gemma3_text":
        keys |= {"attention.sliding_window": c.sliding_window} if c.sliding_window else {}
        keys["rope.freq_base_swa"] = float((c.rope_local or c.rope).theta)
    if c.rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": c.rope.kind, "rope.scaling.factor": float(c.rope.factor)}
    if c.rope.kind == "yarn":
        keys |= {"rope.scaling.original_context_length": c.rope.original_context}
        keys |= {"rope.scaling.yarn_beta_fast": c.rope.beta_fast, "rope.scaling.yarn_beta_slow": c.rope.beta_slow}
        if not math.isclose(own := _own_attention_factor(c), 1):
            keys["rope.scaling.attn_factor"] = own  # llama.cpp multiplies its own by it, and does not read yarn_attn_factor of these models
    return general | {f"{name}.{key}": value for key, value in keys.items()} | tokenizer


def _own_attention_factor(c: ModelConfig) -> float:
    """By what yarn's attention factor differs from that which follows from its scaling."""
    return c.rope.attention_factor / (0.1 * math.log(c.rope.factor) + 1 if c.rope.factor > 1 else 1.0)


def _not_loaded(c: ModelConfig) -> str | None:
    """What of this model llama.cpp's graph of its architecture has no place for: it does not load such a file (seen in that of 2026)."""
    more = [part for part in c.biases if part not in BIASES.get(c.architecture, ())]
    if more:
        return f"biases of {', '.join(more)}"
    if c.architecture in ("qwen2", "bitnet") and c.head_dim * c.n_heads != c.hidden_size:
        return f"{c.n_heads} heads of {c.head_dim}, which is not its width of {c.hidden_size}"
    if c.architecture == "bitnet" and not c.tied:
        return "a head of its own"
    if c.architecture != "llama" and (c.rope.kind == "llama3" or c.rope.divisors):
        return "rope scaled by llama3's rule"
    return None


def _obstacle(c: ModelConfig) -> str | None:
    """What keeps llama.cpp from loading a file of this model, or has it compute something else, whatever the file says."""
    if c.architecture != "bitnet" and (unknown := _not_loaded(c)):
        return f"the model has {unknown}, with which llama.cpp does not load it"
    if c.architecture == "gemma3_text":
        usual = all(windowed == ((i + 1) % WINDOW_PERIOD != 0) for i, windowed in enumerate(c.windowed))
        if c.windowed and not usual:
            return f"llama.cpp gives every {WINDOW_PERIOD}th layer full attention, and this model has others"
        scale = (c.hidden_size / c.n_heads if c.n_layers == 62 else c.head_dim) ** -0.5
        if not math.isclose(c.attention_scale, scale, rel_tol=1e-6):
            return f"llama.cpp scales its queries by {scale:g}, and this model by {c.attention_scale:g}"
        if c.rope_local is not None and c.rope_local.kind != "default":
            return f"the rope of windowed layers is scaled ({c.rope_local.kind}), which no key says"
        if c.rope.kind == "yarn" and not math.isclose(_own_attention_factor(c), 1):
            return f"llama.cpp uses yarn's attention factor of {c.rope.attention_factor:g} in the windowed layers as well"
    elif any(c.windowed) and c.sliding_window < c.max_context:
        return f"{sum(c.windowed)} layers see {c.sliding_window} tokens only, and llama.cpp computes them with full attention"
    if c.rope.kind == "dynamic":
        return "the rope is scaled dynamically, which no key says and llama.cpp does not compute"
    if c.rope.kind == "yarn":
        plain = replace(c.rope, beta_fast=32.0, beta_slow=1.0, truncate=True)
        if not np.allclose(c.rope.frequencies(c.head_dim), plain.frequencies(c.head_dim), rtol=1e-5, atol=0):
            cut = "" if c.rope.truncate else " without truncation"
            return (
                f"llama.cpp computes yarn with beta_fast 32 and beta_slow 1, truncated, whatever the file says, and this model has "
                f"{c.rope.beta_fast:g} and {c.rope.beta_slow:g}{cut}"
            )
    return None


def items(model: Model, weights: Iterable[Weight], form: Format) -> Iterator[Item]:
    """The tensors in the order of the model."""
    c = model.config
    names = gguf.names(c)
    if c.rope.kind == "llama3" or c.rope.divisors:
        yield Item("rope_freqs.weight", "f32", (c.head_dim // 2,), lambda: [_divisors(c)])
    for weight in weights:
        name = names[weight.name]
        heads = c.architecture == "llama" and weight.kind in ("q", "k", "q_bias", "k_bias")
        if weight.codes is not None and weight.kind in (*LINEARS, *TABLES):
            if form.integer:
                yield Item(name, form.weights, weight.shape, _integers(weight, _turned(weight.codes, heads, c), form, heads, c))
                continue
            scales = weight.scales
            assert scales is not None
            apart = form.scale == "f16" and not np.array_equal(stored_scales(scales, form), scales)
            inner = np.ones((1, 1), np.float32) if apart else scales
            make = _whole if form.weights == "i2_s" else _blocks
            yield Item(
                name, form.weights, weight.shape, make(weight, _turned(weight.codes, heads, c), _turned_scales(inner, heads, c), form)
            )
            if apart:
                yield Item(f"{name.removesuffix('.weight')}.scale", "f32", (1,), lambda scales=scales: [scales.reshape(1)])  # type: ignore[misc]
        else:
            if c.architecture == "bitnet" and weight.kind in LINEARS and not _one_scale(weight):
                raise UnsupportedModelError(
                    f"{weight.where}: is dense, and what is dense in a bitnet model's GGUF is read as what becomes ternary at load; choose "
                    "a Hugging Face layout, such as hf-dense-f32, or make it ternary with one scale (--quantization ternary)"
                )
            yield Item(name, weight.scheme, weight.shape, _plain(weight, heads, c))


def _one_scale(weight: Weight) -> bool:
    """Whether all that is not 0 has the same size."""
    most = np.float32(0)
    for first, last in weight.spans():
        size = np.abs(weight.values(first, last))
        most = most or size.max()
        if not ((size == 0) | (size == most)).all():
            return False
    return True


def _turned(rows: Callable[[int, int], NDArray[Any]], heads: bool, c: ModelConfig) -> Callable[[int, int], NDArray[Any]]:
    return permuted(rows, c.head_dim, by_pairs=True) if heads else rows


def _turned_scales(scales: F32, heads: bool, c: ModelConfig) -> F32:
    if not heads or len(scales) == 1:
        return scales
    return permuted(lambda a, b: scales[a:b], c.head_dim, by_pairs=True)(0, len(scales))


def _blocks(weight: Weight, codes: Callable[[int, int], I8], scales: F32, form: Format) -> Callable[[], Iterator[NDArray[Any]]]:
    codec = BLOCKS[form.codec]
    blocks = weight.shape[1] // codec.block

    def chunks() -> Iterator[NDArray[Any]]:
        for first, last in weight.spans():
            found = codes(first, last) if form.weights in ("q2_0", "pq2_0") else trits(weight, codes(first, last))
            each = np.broadcast_to(scales if len(scales) == 1 else scales[first:last], (last - first, scales.shape[1]))
            yield codec.pack(found.reshape(-1, codec.block), np.repeat(each, blocks // scales.shape[1], axis=1).reshape(-1))

    return chunks


def _whole(weight: Weight, codes: Callable[[int, int], I8], scales: F32, form: Format) -> Callable[[], Iterator[NDArray[Any]]]:
    """I2_S: codes in stretches of 128 over the whole tensor, its scale after them."""
    codec = BLOCKS[form.codec]

    def chunks() -> Iterator[NDArray[Any]]:
        for first, last in weight.spans(codec.block // math.gcd(weight.shape[1], codec.block)):
            yield codec.pack(trits(weight, codes(first, last)).reshape(-1, codec.block))
        tail = np.zeros(I2_S_TAIL // 4, np.float32)
        tail[0] = scales[0, 0]
        yield tail

    return chunks


def _integers(
    weight: Weight, codes: Callable[[int, int], I8], form: Format, heads: bool, c: ModelConfig
) -> Callable[[], Iterator[NDArray[Any]]]:
    """Q8_0 and Q4_0: 32 codes after the f16 scale that they share; Q4_0 keeps code + 8, the first 16 in the low halves of bytes."""
    assert weight.scales is not None
    scales = _turned_scales(weight.scales, heads, c)

    def chunks() -> Iterator[NDArray[Any]]:
        for first, last in weight.spans():
            found = codes(first, last).reshape(-1, 32)
            d = np.ascontiguousarray(scales[first:last].reshape(-1, 1), "<f2").view(np.uint8)
            if form.weights == "q4_0":
                fields = (found + np.int8(8)).view(np.uint8)
                body = fields[:, :16] | (fields[:, 16:] << np.uint8(4))
            else:
                body = found.view(np.uint8)
            yield np.concatenate([d, body], axis=1)

    return chunks


def _plain(weight: Weight, heads: bool, c: ModelConfig) -> Callable[[], Iterator[NDArray[Any]]]:
    read = _turned(weight.values if weight.stored is None else weight.stored, heads, c)

    def chunks() -> Iterator[NDArray[Any]]:
        for first, last in weight.spans():
            rows = read(first, last)
            yield np.ascontiguousarray(rows if weight.stored is not None else as_bits(rows, weight.scheme))

    return chunks


def _divisors(c: ModelConfig) -> F32:
    """By how much llama3's rule slows each pair of rope down."""
    if c.rope.divisors:
        return np.array(c.rope.divisors, np.float32)
    plain = replace(c.rope, kind="default", factor=1.0).frequencies(c.head_dim)
    return np.asarray(plain / c.rope.frequencies(c.head_dim), np.float32)
