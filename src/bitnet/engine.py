"""The engine: owns the native model; token ids in, logits out.

A forward takes a ragged batch: any number of sequences, any number of tokens each. Decoding, prompts and batches are
the same call, and a sequence's logits are the same bits in all of them, for any number of threads.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet import _native, ternary
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.files.hf import Checkpoint
from bitnet.files.tensor import Tensor
from bitnet.machine import require_memory, usable_cores
from bitnet.models import ModelConfig, Quantization, adapter_for, quantization

HEADS = ("stored", "int8")


class Sequence:
    """The keys and values of one sequence's tokens so far."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._cache)

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        self._cache.truncate(n)


class Engine:
    """A loaded model. Make one with `load_engine` or `random_engine`."""

    def __init__(self, config: ModelConfig, native: Any, codec: str) -> None:
        self.config = config
        self._native = native
        self.isa: str = native.isa
        self.codec = codec  # of the linear layers: "t2" (two-bit ternary), "int8" or "dense"
        self.threads: int = native.threads
        self.weight_bytes_per_token: int = native.weight_bytes_per_token  # read to decode one token

    def sequence(self) -> Sequence:
        """A fresh sequence without tokens."""
        return Sequence(self._native.cache())

    def forward(self, batch: ListLike[tuple[Sequence, ListLike[int]]], all_logits: bool = False) -> NDArray[np.float32]:
        """Append each sequence's tokens to it and return logits, float32 [rows, vocab].

        One row per sequence (for its last token), or with `all_logits` one per token, in the order of the batch. Raises `UsageError` for
        an empty batch, a token outside the vocabulary, or more tokens than the context holds; then nothing is appended.
        """
        if not batch:
            raise UsageError("forward: the batch is empty")
        spans = []
        for sequence, tokens in batch:
            ids = np.asarray(tokens)
            if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
                raise UsageError("forward: expected one or more integer token ids per sequence")
            if ids.min() < 0 or ids.max() >= self.config.vocab_size:
                raise UsageError(
                    f"forward: token ids run from {ids.min()} to {ids.max()}; the vocabulary has 0 to {self.config.vocab_size - 1}"
                )
            if len(sequence) + ids.size > self.config.max_context:
                raise UsageError(f"forward: {len(sequence)} + {ids.size} tokens; the model's context is {self.config.max_context}")
            spans.append((sequence._cache, np.ascontiguousarray(ids, np.int32)))
        try:
            logits: NDArray[np.float32] = self._native.forward(spans, all_logits)
        except ValueError as e:
            raise UsageError(f"forward: {e}") from None
        return logits


def load_engine(checkpoint: Checkpoint, *, threads: int | None = None, head: str = "stored") -> Engine:
    """Repack a checkpoint's weights for this machine. `head`: "stored" as in the file, or "int8" per row.

    Raises `UnsupportedModelError` for what this build does not compute, `FormatError` where names or shapes are not what the config says.
    """
    if head not in HEADS:
        raise UsageError(f"head is {head!r}; expected one of {', '.join(HEADS)}")
    where = str(checkpoint.path)
    adapter = adapter_for(checkpoint.config, where)
    config = adapter.config(checkpoint.config, where)
    quant = quantization(checkpoint.config, where)
    names, tensors = adapter.names(config), checkpoint.tensors
    missing = [n for n in names.values() if n not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(
            f"{where}: tensor {missing[0]!r}{more} not found; a {config.architecture} model of {config.n_layers} layers has it"
        )
    stray = [t for t in tensors if t.endswith(".bias")]
    if stray:
        raise UnsupportedModelError(f"{where}: has biases ({stray[0]}), which this build does not compute")
    shapes = _shapes(config)
    for ours, theirs in names.items():
        _check_shape(tensors[theirs], shapes[_kind(ours)], where)
    require_memory(where, sum(_native_bytes(_kind(ours), tensors[theirs], quant) for ours, theirs in names.items()))
    native = _new_native(config, threads)
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        if _kind(ours) in _VECTORS:
            native.set_vector(ours, np.ascontiguousarray(_finite(tensor), np.float32))
        elif _kind(ours) in ("embedding", "head"):
            _set_table(native, ours, tensor, head if ours == "head" or config.tied else "stored")
        else:
            _set_linear(native, ours, tensor, shapes[_kind(ours)], quant)
    return _finish(config, native, _codec([tensors[names[f"layers.0.{p}"]] for p in _LINEARS], quant))


_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_VECTORS = ("final_norm", "attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm")


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "embedding": (c.vocab_size, c.hidden_size),
        "head": (c.vocab_size, c.hidden_size),
        "q": (q, c.hidden_size),
        "k": (kv, c.hidden_size),
        "v": (kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate": (c.ffn_size, c.hidden_size),
        "up": (c.ffn_size, c.hidden_size),
        "down": (c.hidden_size, c.ffn_size),
        "final_norm": (c.hidden_size,),
        "attn_norm": (c.hidden_size,),
        "ffn_norm": (c.hidden_size,),
        "attn_sub_norm": (q,),
        "ffn_sub_norm": (c.ffn_size,),
    }


def _check_shape(tensor: Tensor, expected: tuple[int, ...], where: str) -> None:
    found = tensor.shape
    if tensor.dtype == "U8" and tensor.scheme != "ternary":
        raise FormatError(f"{where}: tensor {tensor.name!r} is packed (U8) but has no {tensor.name}_scale beside it; expected one float")
    padded = (-(-expected[0] // 4) * 4, *expected[1:])  # packed ternary comes in fours of rows
    if found != expected and not (tensor.scheme == "ternary" and found == padded):
        raise FormatError(f"{where}: tensor {tensor.name!r} has shape {list(found)}; config.json makes it {list(expected)}")


def _native_bytes(kind: str, tensor: Tensor, quant: Quantization | None) -> int:
    """About what the tensor will take: two bits a weight where it becomes ternary, what it takes in the file otherwise."""
    return math.prod(tensor.shape) // 4 if kind in _LINEARS and quant and quant.online else tensor.nbytes


def _finite(tensor: Tensor) -> NDArray[np.float32]:
    values = tensor.dense()
    if not np.isfinite(values).all():
        raise FormatError(f"{tensor.where}: holds NaN or infinity; the file is damaged or training diverged")
    return values


def _set_dense(native: Any, name: str, tensor: Tensor) -> None:
    _finite(tensor)
    if tensor.scheme in ("f16", "bf16"):
        native.set_dense_16(name, tensor.scheme, np.ascontiguousarray(tensor.raw()).view(np.uint16))
    elif tensor.scheme in ("f32", "f64"):
        native.set_dense_f32(name, np.ascontiguousarray(tensor.dense(), np.float32))
    else:
        raise UnsupportedModelError(f"{tensor.where}: stored as {tensor.dtype}; expected f32, f16, bf16 or packed ternary with its scale")


def _set_table(native: Any, name: str, tensor: Tensor, scheme: str) -> None:
    """The embedding or the head."""
    if scheme == "int8":
        codes, scales = ternary.quantize_int8(_finite(tensor))
        native.set_integer(name, "int8", codes, scales[:, None])
    else:
        _set_dense(native, name, tensor)


def _set_linear(native: Any, name: str, tensor: Tensor, shape: tuple[int, ...], quant: Quantization | None) -> None:
    stays_dense = quant is None or any(part in quant.dense for part in (tensor.name, tensor.name.removesuffix(".weight")))
    if tensor.scheme == "ternary":
        if quant is None:
            raise FormatError(f"{tensor.where}: packed ternary, but config.json has no quantization_config that says so")
        trits, scale = tensor.trits()[: shape[0]], tensor.scales()
        if not np.isfinite(scale).all():
            raise FormatError(f"{tensor.where}: its weight_scale gives a scale of {scale[0]}; expected a finite number")
    elif stays_dense:
        return _set_dense(native, name, tensor)
    elif quant and quant.online:
        trits, scale_value = ternary.absmean(_finite(tensor))
        scale = np.array([scale_value], np.float32)
    else:
        raise FormatError(
            f"{tensor.where}: {tensor.dtype} weights without a weight_scale; quantization_mode offline needs packed ternary ones (uint8)"
        )
    native.set_integer(name, "ternary", trits, np.broadcast_to(scale.reshape(1, -1), (shape[0], scale.size)).copy())
    return None


def _codec(linears: list[Tensor], quant: Quantization | None) -> str:
    return "t2" if any(t.scheme == "ternary" for t in linears) or (quant and quant.online) else "dense"


def _new_native(c: ModelConfig, threads: int | None) -> Any:
    wanted = usable_cores() if threads is None else threads
    if not 1 <= wanted <= 1024:
        raise UsageError(f"threads is {wanted}; expected 1 to 1024")
    isa, failed = _native.choose_isa()
    if failed:
        warnings.warn(f"the {failed} kernels failed their self-test on this CPU; running {isa or 'nothing'} instead", stacklevel=3)
    if not isa:
        raise BitNetError(
            f"BITNET_ISA={os.environ.get('BITNET_ISA', '')} cannot run here; there are {', '.join(_native.self_test())} (see bitnet doctor)"
        )
    try:
        native = _native.Model(
            n_layers=c.n_layers, vocab_size=c.vocab_size, hidden_size=c.hidden_size, ffn_size=c.ffn_size, n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, max_context=c.max_context, norm_eps=c.norm_eps, activation=c.activation,
            sub_norms=c.sub_norms, rope_interleaved=c.rope_interleaved, threads=wanted, isa=isa,
        )  # fmt: skip
    except ValueError as e:
        raise FormatError(f"the model's configuration: {e}") from None
    pairs = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
    native.set_vector("rope_inverse", (np.float32(1) / np.float32(c.rope_theta) ** pairs).astype(np.float32))
    return native


def _finish(config: ModelConfig, native: Any, codec: str) -> Engine:
    native.check_complete()
    return Engine(config, native, codec)


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
    group: int = 0  # inputs per scale; 0: one scale per tensor
    context: int = 4096


SHAPES = {
    "bitnet-2b-4t": Shape(30, 2560, 6912, 20, 5, 128256, 128, bitnet=True),
    "bonsai-1.7b": Shape(28, 2048, 6144, 16, 8, 151936, 128, group=128),
    "bonsai-8b": Shape(36, 4096, 12288, 32, 8, 151936, 128, group=128, tied=False),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 128, tied=False),
    "article-12x512": Shape(12, 512, 1536, 8, 8, 32000, 64),
}


def shape_bytes(shape: str, head: str = "f16") -> int:
    """Memory that the weights of a benchmark shape take."""
    s = SHAPES[shape]
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    layer = s.width * (2 * q + 2 * kv + 3 * s.ffn)
    tables = s.vocab * s.width * (1 if s.tied else 2)
    return s.layers * layer // 4 + tables * {"f16": 2, "int8": 1}[head]


def random_engine(shape: str, *, threads: int | None = None, head: str = "int8", seed: int = 1) -> Engine:
    """A model of one of `SHAPES` with random weights, made in memory: for speed, not for text.

    `head`: scheme of the embedding and head, "f16" or "int8". Families whose particulars this build lacks (the norms of
    Bonsai's queries and keys, its ternary embedding) run without them.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
    if head not in ("f16", "int8"):
        raise UsageError(f"head is {head!r}; expected f16 or int8")
    s = SHAPES[shape]
    config = ModelConfig(
        architecture="bitnet" if s.bitnet else "llama", vocab_size=s.vocab, hidden_size=s.width, n_layers=s.layers, n_heads=s.heads,
        n_kv_heads=s.kv_heads, head_dim=s.head_dim, ffn_size=s.ffn, max_context=s.context, norm_eps=1e-5, rope_theta=500_000.0,
        activation="relu2" if s.bitnet else "silu", sub_norms=s.bitnet, tied=s.tied,
    )  # fmt: skip
    native = _new_native(config, threads)
    shapes = _shapes(config)
    for name in ("embedding",) if s.tied else ("embedding", "head"):
        native.set_random(name, head, *shapes[name], 1, seed)
    for i in range(s.layers):
        for number, part in enumerate(_LINEARS):
            rows, cols = shapes[part]
            native.set_random(f"layers.{i}.{part}", "ternary", rows, cols, -(-cols // s.group) if s.group else 1, seed + 16 * i + number)
        for part in _VECTORS[1:] if s.bitnet else _VECTORS[1:3]:
            native.set_vector(f"layers.{i}.{part}", np.ones(shapes[part], np.float32))
    native.set_vector("final_norm", np.ones(shapes["final_norm"], np.float32))
    return _finish(config, native, "t2")
