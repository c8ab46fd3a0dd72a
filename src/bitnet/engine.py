"""The engine: owns the native model; token ids in, logits out.

A forward takes a ragged batch: any number of sequences, any number of tokens each. Decoding, prompts and batches are
the same call, and a sequence's logits are the same bits in all of them, for any number of threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet import _native
from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.kv import KvFormat
from bitnet.machine import usable_cores
from bitnet.models import ModelConfig
from bitnet.models.low_rank import LowRank

CODECS = {"t2": "ternary", "b3": "ternary_base3"}  # how ternary layers lie in memory: 2 or 1.6 bits a weight -> the native scheme
BASE3_ISAS = ("amx", "avx512vbmi")  # where a table gives the digits: from memory 162 G weights/s on two cores, against 137 with two bits
BASE3_GROUP = 128  # inputs that share a scale, from which on base-3 is the smaller: every group starts a new vector of 20 inputs
BASE3_STEPS = "base-3 weights meet activations with one step per token (0); for groups load the model with codec='t2'"
BINARY_STEPS = 32  # inputs that lie in one vector of binary weights: a step of the activations holds whole vectors
MOST_THREADS = 1024  # that the native pool takes


_READERS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # the matrices of a layer that read the same x


class Adapter:
    """A low-rank adapter in memory, for the engine that made it (`Engine.adapter`)."""

    def __init__(self, config: ModelConfig, native: Any) -> None:
        self.config = config
        self._native = native
        self.key = object()  # by which others know it without holding its weights
        self.nbytes: int = native.nbytes  # read, beside the weights, to decode one token


class Sequence:
    """The keys and values of one sequence's tokens so far, and the adapter by which they are made, if there is one."""

    def __init__(self, cache: Any, adapter: Adapter | None = None, kv: KvFormat = KvFormat(), center: int | None = None) -> None:  # noqa: B008
        self._cache = cache
        self._adapter = adapter
        self.kv = kv  # how they are kept
        self.center = center  # which of the engine's is taken off the keys; None: none is

    @property
    def adapter(self) -> Adapter | None:
        """Beside every product of this sequence. It stays what it is: other keys and values would not fit those that are here."""
        return self._adapter

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._cache)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token's keys and values; it is taken in pages of 256 tokens."""
        return int(self._cache.bytes_per_token)

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        self._cache.truncate(n)

    def pages(self) -> list[Any]:
        """What holds the tokens, 256 a page, to `share`. While a sequence shares a page, it writes into a copy of its own."""
        return list(self._cache.pages())

    def share(self, pages: ListLike[Any], n: int) -> None:
        """Hold the first n tokens of these pages, of a sequence of the same engine, format, center and adapter, and nothing else."""
        self._cache.share(list(pages), n)


class Engine:
    """A loaded model. Make one with `weights.load_engine` or `shapes.random_engine`."""

    def __init__(self, config: ModelConfig, native: Any, codec: str, head: str = "stored") -> None:
        native.check_complete()
        self.config = config
        self._native = native
        self.isa: str = native.isa
        self.codec = codec  # of the linear layers: "t2" (two-bit ternary), "b3" (base-3), "binary", "int4", "fp4", "int8" or "dense"
        self.head = head  # "stored", or the scheme that embedding and head were quantized to
        self.threads: int = native.threads
        self.weight_bytes_per_token: int = native.weight_bytes_per_token  # read to decode one token
        self.weight_bytes: int = native.weight_bytes  # of all weights in memory
        self._kv = KvFormat()
        self._center = 0  # how often `center_keys` has set one

    @property
    def activation_group(self) -> int:
        """Inputs that share an int8 step where weights are integers; 0: one step per token. To set it is to change every later forward."""
        return int(self._native.activation_group)

    @activation_group.setter
    def activation_group(self, group: int) -> None:
        if group and self.zero_skip:
            raise UsageError(f"activation_group is {group}; skipping zeros takes one step per token (0); load with zero_skip=False")
        if group and self.codec == "b3":
            raise UsageError(f"activation_group is {group}; {BASE3_STEPS}")
        if self.codec == "binary":
            check_binary_steps(group)
        self._native.activation_group = group

    @property
    def activations(self) -> str:
        """Of the linear layers, in words: "int8 per token", "int8 per 32 inputs" or "float32"."""
        if self.codec == "dense":
            return "float32"
        return f"int8 per {f'{self.activation_group} inputs' if self.activation_group else 'token'}"

    @property
    def can_skip_zeros(self) -> bool:
        """Whether its feed-forwards have zeros to skip: relu^2, ternary weights with one scale a row, one step per token."""
        return bool(getattr(self._native, "can_skip_zeros", False))

    @property
    def skippable_bytes(self) -> int:
        """Of up_proj and down_proj, whose rows and columns may be skipped."""
        return int(self._native.skippable_bytes)

    @property
    def zero_skip(self) -> bool:
        """Whether passes of few tokens skip zeros. To set it lays up_proj and down_proj anew in their memory; same bits."""
        return self.can_skip_zeros and bool(self._native.skips_zeros)

    @zero_skip.setter
    def zero_skip(self, on: bool) -> None:
        if on and not self.can_skip_zeros:
            raise UsageError("zero_skip is True; no relu^2 feed-forward with ternary weights, one scale a row and one step per token")
        if on != self.zero_skip:
            self._native.skips_zeros = on

    def lines(self) -> tuple[int, int, int, int]:
        """Since `reset_profile`, of the passes that skip: rows of up_proj, those read, columns of down_proj, those read."""
        return tuple(self._native.lines) if self.can_skip_zeros else (0, 0, 0, 0)

    def set_gate_bias(self, layer: int, bias: NDArray[np.float32]) -> None:
        """Adds `bias`, float32 [ffn_size], to a layer's gates: random ones have too few zeros (bench/zero_skip.py)."""
        self._native.set_vector(f"layers.{layer}.gate_bias", bias)

    def count_zeros(self, on: bool) -> None:
        """Begin to count `zeros` anew, or no longer."""
        self._native.count_zeros(on)

    def zeros(self) -> list[tuple[int, int, int]]:
        """Per layer since `count_zeros`: gates whose activation is zero, inputs of down_proj that are as it reads them, of how many."""
        return list(self._native.zeros)

    def reset_profile(self) -> None:
        """Begin to sum `profile` anew."""
        self._native.reset_profile()

    def profile(self) -> dict[str, float]:
        """Seconds since `reset_profile`, over all forwards: "matmul_s", "attention_s", "total_s"."""
        return dict(self._native.profile)

    @property
    def kv(self) -> KvFormat:
        """How fresh sequences keep their keys and values. Setting it raises `UsageError` for a format that does not fit the heads."""
        return self._kv

    @kv.setter
    def kv(self, kv: KvFormat) -> None:
        kv.group(self.config.head_dim)
        self._kv = kv

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers, as `kv` keeps them."""
        return self._kv.bytes_per_token(self.config.n_layers, self.config.n_kv_heads, self.config.head_dim)

    def sequence(self, adapter: Adapter | None = None, kv: KvFormat | None = None) -> Sequence:
        """A fresh sequence without tokens, with this adapter of the engine or the model alone. kv: a format instead of the engine's."""
        if adapter is not None and adapter.config != self.config:
            raise UsageError("the adapter was made for another model; make it with this engine's adapter()")
        kv = self._kv if kv is None else kv
        native = self._native.cache(
            None if adapter is None else adapter._native, key_bits=kv.key_bits, value_bits=kv.value_bits,
            group=kv.group(self.config.head_dim), rotate=kv.rotate, center=kv.center,
        )  # fmt: skip
        return Sequence(native, adapter, kv, self._center if kv.key_bits < 16 and kv.center else None)

    def center_keys(self, tokens: ListLike[int]) -> None:
        """From now on, take the mean key of these tokens off every quantized key (kv.py says why).

        The center is the whole model's: `forward` refuses sequences whose tokens had another one.
        """
        sequence = self.sequence(kv=KvFormat())
        self.forward([(sequence, tokens)])
        for layer in range(self.config.n_layers):
            mean = self._native.keys(sequence._cache, layer).mean(axis=0, dtype=np.float64)
            self._native.set_vector(f"layers.{layer}.key_center", mean.astype(np.float32))
        self._center += 1  # after them: what began in their midst is refused

    def adapter(self, parts: Mapping[str, LowRank]) -> Adapter:
        """An adapter of these parts, by the canonical name of the matrix ("layers.3.q"), rows in Hugging Face's order.

        It is never merged: y = W x + B (scale * (A x)) in float32, by ternary.low_rank's order, A and B as `LowRank.codes` has them.
        Raises `UsageError` for shapes that are not the model's.
        """
        native, head = _native.Adapter(self._native), self.config.head_dim
        try:
            for layer in range(self.config.n_layers):
                for reader in _READERS:
                    here = [(part, parts[name]) for part in reader if (name := f"layers.{layer}.{part}") in parts]
                    if not here:
                        continue
                    codes = [low.codes() for _, low in here]
                    missing = [-len(scales) % 4 for _, _, scales in codes]  # to a multiple of four rows
                    rows = [np.pad(a, ((0, n), (0, 0))) for (a, _, _), n in zip(codes, missing, strict=True)]
                    factors = [np.pad(scales, (0, n)) for (_, _, scales), n in zip(codes, missing, strict=True)]
                    native.set_a(layer, reader[0], np.concatenate(rows), np.concatenate(factors))
                    first = 0
                    for (part, low), (_, b, _), own in zip(here, codes, rows, strict=True):
                        if self.config.rope_interleaved and part in ("q", "k"):  # the base's rows lie by rope's pairs
                            b = b.reshape(-1, 2, head // 2, low.rank).swapaxes(1, 2).reshape(b.shape)
                        native.set_b(layer, part, np.ascontiguousarray(b), first)
                        first += len(own)
        except ValueError as e:
            raise UsageError(f"adapter: {e}") from None
        return Adapter(self.config, native)

    def forward(self, batch: ListLike[tuple[Sequence, ListLike[int]]], all_logits: bool = False) -> NDArray[np.float32]:
        """Append each sequence's tokens to it and return logits, float32 [rows, vocab].

        One row per sequence (for its last token), or with `all_logits` one per token, in the order of the batch. Raises `UsageError` for
        an empty batch, a token outside the vocabulary, more tokens than the context holds, or a sequence from before `center_keys`; then
        nothing is appended.
        """
        if not batch:
            raise UsageError("forward: the batch is empty")
        spans = [(sequence._cache, self._checked(sequence, tokens)) for sequence, tokens in batch]
        try:
            logits: NDArray[np.float32] = self._native.forward(spans, all_logits)
        except ValueError as e:
            raise UsageError(f"forward: {e}") from None
        return logits

    def _checked(self, sequence: Sequence, tokens: ListLike[int]) -> NDArray[np.int32]:
        """`tokens` as int32 [tokens], sure to fit the vocabulary and the context."""
        if sequence.center not in (None, self._center):
            if len(sequence):
                raise UsageError("forward: the sequence began before center_keys, which changed the keys; begin another")
            sequence.center = self._center
        vocab, context = self.config.vocab_size, self.config.max_context
        if type(tokens) is list and len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] < vocab and len(sequence) < context:
            return np.array(tokens, np.int32)  # decoding: at thousands of tokens a second the checks below would show
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError("forward: expected one or more integer token ids per sequence")
        if ids.min() < 0 or ids.max() >= vocab:
            raise UsageError(f"forward: token ids run from {ids.min()} to {ids.max()}; the vocabulary has 0 to {vocab - 1}")
        if len(sequence) + ids.size > context:
            raise UsageError(f"forward: {len(sequence)} + {ids.size} tokens; the model's context is {context}")
        return np.ascontiguousarray(ids, np.int32)


def check_binary_steps(activation_group: int) -> None:
    """Raises `UsageError` for groups of activations that binary weights cannot meet."""
    if activation_group % BINARY_STEPS:
        raise UsageError(
            f"activation_group is {activation_group}; binary weights meet one step per token (0) or per {BINARY_STEPS}, 64, ... inputs"
        )


def check_codec(codec: str) -> None:
    """Raises `UsageError` for a codec that is none."""
    if codec not in ("auto", *CODECS):
        raise UsageError(f"codec is {codec!r}; expected one of auto, {', '.join(CODECS)}")


def chosen_codec(codec: str, isa: str, activation_group: int = 0, scale_group: int = 0) -> str:
    """The codec of ternary layers that `codec` means; the results are the same bits.

    "auto" is base-3 where its kernels are the faster ones, it is the smaller one, and activations have one step per token; else two-bit.
    `scale_group`: inputs that share a scale of the weights, 0 for whole rows. Raises `UsageError` for base-3 with groups of activations.
    """
    check_codec(codec)
    if codec == "b3" and activation_group:
        raise UsageError(f"codec is 'b3' and activation_group {activation_group}; {BASE3_STEPS}")
    if codec != "auto":
        return codec
    smaller = not scale_group or scale_group >= BASE3_GROUP
    return "b3" if isa in BASE3_ISAS and smaller and not activation_group else "t2"


def new_native(c: ModelConfig, threads: int | None, activation_group: int = 0) -> Any:
    """A native model without weights, on the best instruction set that passes its self-test."""
    wanted = usable_cores() if threads is None else threads
    if not 1 <= wanted <= MOST_THREADS:
        raise UsageError(f"threads is {wanted}; expected 1 to {MOST_THREADS}")
    isa, failed = _native.choose_isa()
    if not isa:
        asked, there = os.environ.get("BITNET_ISA", ""), ", ".join(name for name, found in _native.self_test().items() if found == "ok")
        why = ", where it failed its self-test" if failed else ""
        raise BitNetError(f"BITNET_ISA={asked} cannot run here{why}; there are {there} (see bitnet doctor)")
    if failed:
        warnings.warn(f"the {failed} kernels failed their self-test on this CPU; running {isa} instead", stacklevel=3)
    windowed = list(c.windowed or (False,) * c.n_layers)
    try:
        native = _native.Model(
            n_layers=c.n_layers, vocab_size=c.vocab_size, hidden_size=c.hidden_size, ffn_size=c.ffn_size, n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, max_context=c.max_context, norm_eps=c.norm_eps, activation=c.activation,
            embedding_scale=c.embedding_scale, attention_scale=c.attention_scale, rope_scale=c.rope.attention_factor,
            sliding_window=c.sliding_window, windowed=windowed, activation_group=activation_group, sub_norms=c.sub_norms,
            post_norms=c.post_norms, qk_norms=c.qk_norms, rope_interleaved=c.rope_interleaved, threads=wanted, isa=isa,
        )  # fmt: skip
    except ValueError as e:
        raise FormatError(f"the model's configuration: {e}") from None
    if native.threads < wanted:
        warnings.warn(f"the system gives {native.threads} of {wanted} threads; going on with these", stacklevel=3)
    native.set_vector("rope_inverse", c.rope.frequencies(c.head_dim))
    if any(windowed):
        native.set_vector("rope_inverse_local", (c.rope_local or c.rope).frequencies(c.head_dim))
    return native
