"""Benchmark shapes: the sizes of models that people run, built with random weights in memory, so that speed needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet.engine import CODECS, Adapter, Engine, check_codec, chosen_codec, new_native
from bitnet.errors import UsageError
from bitnet.models import LINEARS, ModelConfig
from bitnet.models.config import LONGEST_CONTEXT, weight_shapes
from bitnet.models.low_rank import LowRank
from bitnet.models.rope import Rope
from bitnet.weights import QUANTIZED, layer_norms, scheme_bits

MOST_RANK = 256  # of a random adapter
# scheme of embedding and head -> bits per weight, with the scales of small groups
HEADS = {"f16": 16.0, "int8": 8.0, "int4": 4.5, "ternary": 2.0}
WEIGHTS = ("f16", "bf16", *QUANTIZED)  # of the linear layers


@dataclass(frozen=True)
class Shape:
    """A model's sizes for benchmarks, without its weights."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    bitnet: bool = False  # relu^2 and sub-norms
    tied: bool = True
    qk_norms: bool = False
    group: int = 0  # inputs per scale; 0: one scale per tensor
    context: int = 4096


SHAPES = {
    "bitnet-2b-4t": Shape(30, 2560, 6912, 20, 5, 128256, 128, bitnet=True),
    "bonsai-1.7b": Shape(28, 2048, 6144, 16, 8, 151936, 128, qk_norms=True, group=128),
    "bonsai-8b": Shape(36, 4096, 12288, 32, 8, 151936, 128, qk_norms=True, group=128, tied=False),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 128, tied=False),
    "article-12x512": Shape(12, 512, 1536, 8, 8, 32000, 64),
}


def shape_bytes(shape: str, head: str = "f16", weights: str = "ternary") -> int:
    """Memory that the weights of a benchmark shape take, about."""
    s = SHAPES[shape]
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    layer = s.width * (2 * q + 2 * kv + 3 * s.ffn)
    tables = s.vocab * s.width * (1 if s.tied else 2)
    return int(s.layers * layer * scheme_bits(weights, s.width) / 8 + tables * HEADS[head] / 8)


def random_engine(
    shape: str,
    *,
    threads: int | None = None,
    head: str = "int8",
    weights: str = "ternary",
    codec: str = "auto",
    seed: int = 1,
    context: int | None = None,
) -> Engine:
    """A model of one of `SHAPES` with random weights, made in memory: for speed, not for text.

    `head`: scheme of the embedding and head, "f16", "int8", "int4" or "ternary" (two-bit, in groups as the layers are).
    `weights`: scheme of the layers, one of `WEIGHTS`, with the scales and the steps of activations that it has in a loaded model.
    `codec`: of ternary layers, "t2", "b3" or "auto". `context`: tokens that it holds instead of the shape's own.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
    if head not in HEADS:
        raise UsageError(f"head is {head!r}; expected one of {', '.join(HEADS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    check_codec(codec)
    if codec != "auto" and weights != "ternary":
        raise UsageError(f"codec is {codec!r} and weights {weights!r}; codecs are for ternary layers, leave it out")
    if context is not None and not 1 <= context <= LONGEST_CONTEXT:
        raise UsageError(f"max_context is {context}; expected 1 to {LONGEST_CONTEXT} tokens")
    s = SHAPES[shape]
    config = ModelConfig(
        architecture="bitnet" if s.bitnet else "qwen3" if s.qk_norms else "llama", vocab_size=s.vocab, hidden_size=s.width,
        n_layers=s.layers, n_heads=s.heads, n_kv_heads=s.kv_heads, head_dim=s.head_dim, ffn_size=s.ffn,
        max_context=s.context if context is None else context, norm_eps=1e-5, rope=Rope(500_000.0),
        activation="relu2" if s.bitnet else "silu", sub_norms=s.bitnet, tied=s.tied, attention_scale=s.head_dim**-0.5, qk_norms=s.qk_norms,
    )  # fmt: skip
    native = new_native(config, threads, QUANTIZED.get(weights, 0))
    ternary_codec = chosen_codec(codec, native.isa, scale_group=s.group)
    shapes = weight_shapes(config)

    def groups(scheme: str, inputs: int) -> int:
        group = s.group if scheme in ("ternary", "binary") else QUANTIZED.get(scheme, 0)
        return -(-inputs // group) if group else 1

    head_groups = 1 if head == "int8" else groups(head, s.width)
    scheme = CODECS[ternary_codec] if weights == "ternary" else weights
    for name in ("embedding",) if s.tied else ("embedding", "head"):
        native.set_random(name, head, *shapes[name], head_groups, seed)
    for i in range(s.layers):
        for number, part in enumerate(LINEARS):
            rows, cols = shapes[part]
            native.set_random(f"layers.{i}.{part}", scheme, rows, cols, groups(weights, cols), seed + 16 * i + number)
        for part in layer_norms(config):
            native.set_vector(f"layers.{i}.{part}", np.ones(shapes[part], np.float32))
    native.set_vector("final_norm", np.ones(shapes["final_norm"], np.float32))
    runs = ternary_codec if weights == "ternary" else "dense" if weights in ("f16", "bf16") else weights
    return Engine(config, native, runs, head)


def random_adapter(engine: Engine, rank: int, seed: int = 1) -> Adapter:
    """A low-rank adapter with random weights beside every linear layer: for speed, not for text."""
    if not 1 <= rank <= MOST_RANK:
        raise UsageError(f"lora is {rank}; expected a rank from 1 to {MOST_RANK}")
    rng, shapes = np.random.default_rng(seed), weight_shapes(engine.config)

    def values(rows: int, cols: int) -> np.ndarray:
        return rng.standard_normal((rows, cols), np.float32) * np.float32(0.01)

    parts = {
        f"layers.{i}.{part}": LowRank("f32", values(rank, shapes[part][1]), values(shapes[part][0], rank), 2.0)
        for i in range(engine.config.n_layers)
        for part in LINEARS
    }
    return engine.adapter(parts)
