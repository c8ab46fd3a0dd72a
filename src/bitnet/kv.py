"""How keys and values are kept: f16, or 8 or 4 bits a value. The format, and in numpy what the native core must equal.

A key or value of one token and one head is cut into groups of `group_size` dimensions, and each group has one scale in f16: codes =
round(x / scale), scale = |x|max / 127 or / 7, symmetric. So a token is quantized once, from its own numbers alone, when it is written, and
every later token sees the same, however the batch was cut. Groups of tokens (KIVI, arXiv:2402.02750, cuts keys so) would have to wait for
their last token; what they are for, channels of keys that are large for all tokens, center and rotation do instead.

The center: some models' keys have channels that are large and of one sign for all tokens. A vector taken off all keys of a head moves all
scores of a query alike, which softmax does not notice; so the mean key of a text, layer by layer (`Engine.center_keys`), is taken off every
key after rope.

The rotation (QuaRot, arXiv:2404.00456): keys, then, are multiplied by an orthonormal Hadamard matrix in blocks, and so are the queries that
meet them. Their products stay, but a few large channels become a little of all.

Attention reads the codes. Scores: queries in int8, one step per head; the integer product of each group times its scale, summed over the
groups in order, times step * attention_scale. Values: in each run of 64 positions the weights p * scale become fixed-point numbers of 15
bits, steps of the largest / 16256, kept as 128 high + low; the integer products of both parts times their steps are summed over the runs of
each page of 256 positions in order, high and low are added, then the pages in order. All integer sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import UsageError
from bitnet.ternary import F32, I8, quantize_activations, quantize_groups

BITS = (16, 8, 4)
MOST_HEAD = 1024  # values of a head in a quantized cache (native/kv_cache.h)
DEFAULT_GROUP = 64  # values that share a scale: with it 4.25 bits a value
PAGE, RUN = 256, 64  # positions


@dataclass(frozen=True)
class KvFormat:
    """Bits of keys and values, values of a head that share a scale, and whether quantized keys are rotated and centered."""

    key_bits: int = 16
    value_bits: int = 16
    group_size: int = DEFAULT_GROUP
    rotate: bool = True
    center: bool = True

    def __post_init__(self) -> None:
        if self.key_bits not in BITS or self.value_bits not in BITS or self.group_size < 1:
            raise UsageError(f"{self}: expected 16, 8 or 4 bits, and a group of at least 1 value")

    @property
    def quantized(self) -> bool:
        """Whether any of it is not f16."""
        return self.key_bits < 16 or self.value_bits < 16

    @property
    def name(self) -> str:
        """As tables have it: "f16", "8 bits", "K8V4"."""
        if self.key_bits != self.value_bits:
            return f"K{self.key_bits}V{self.value_bits}"
        return "f16" if self.key_bits == 16 else f"{self.key_bits} bits"

    def group(self, head_dim: int) -> int:
        """Values of a head of this size that share a scale; 0 for all of them. Raises `UsageError` for what does not fit such heads."""
        if self.quantized and head_dim > MOST_HEAD:
            raise UsageError(
                f"this model's heads have {head_dim} values, a quantized KV cache takes at most {MOST_HEAD}; leave kv_bits at 16"
            )
        if not self.quantized or self.group_size == head_dim or (self.group_size == DEFAULT_GROUP and head_dim < DEFAULT_GROUP):
            return 0
        if self.group_size % 16 or head_dim % self.group_size:
            fitting = [g for g in range(16, head_dim, 16) if head_dim % g == 0] + [head_dim]
            raise UsageError(
                f"kv_group_size is {self.group_size}, this model's heads have {head_dim} values; "
                f"expected a multiple of 16 that divides them: {', '.join(map(str, fitting))}"
            )
        return self.group_size

    def bytes_per_token(self, n_layers: int, n_kv_heads: int, head_dim: int) -> int:
        """Of keys and values in all layers; heads lie in multiples of 16 values."""
        groups = head_dim // (self.group(head_dim) or head_dim)
        padded = -(-head_dim // 16) * 16
        each = [padded * bits // 8 + (2 * groups if bits < 16 else 0) for bits in (self.key_bits, self.value_bits)]
        return n_layers * n_kv_heads * sum(each)


def kv_format(
    kv_bits: int = 16, kv_bits_k: int | None = None, kv_bits_v: int | None = None, kv_group_size: int = DEFAULT_GROUP, rotate: bool = True
) -> KvFormat:
    """The format that these options mean: kv_bits for both, unless keys or values have their own. Raises `UsageError` for other bits."""
    wanted = {"kv_bits": kv_bits, "kv_bits_k": kv_bits_k, "kv_bits_v": kv_bits_v}
    for name, bits in wanted.items():
        if not (bits is None and name != "kv_bits") and not (_whole(bits) and bits in BITS):
            raise UsageError(f"{name} is {bits!r}; expected 16, 8 or 4")
    if not _whole(kv_group_size) or kv_group_size < 1:
        raise UsageError(
            f"kv_group_size is {kv_group_size!r}; expected a whole number >= 1, a multiple of 16 that divides the model's heads"
        )
    keys, values = (kv_bits if bits is None else bits for bits in (kv_bits_k, kv_bits_v))
    return KvFormat(int(keys), int(values), int(kv_group_size), rotate)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def hadamard_block(head_dim: int) -> int:
    """The largest power of two that divides a head: heads of 96 values are rotated in three blocks of 32."""
    return head_dim & -head_dim


def hadamard(x: F32, block: int) -> F32:
    """Runs of `block` values, a power of two, times the Hadamard matrix (Sylvester's order) over the root of `block`; its own inverse.

    In float32: sums and differences of values 1 apart, then 2, 4, ..., at last the factor.
    """
    y = np.asarray(x, np.float32)
    width = 1
    while width < block:
        pairs = y.reshape(-1, 2, width)
        y = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1)
        width *= 2
    return np.asarray(y.reshape(np.shape(x)) * (np.float32(1) / np.sqrt(np.float32(block))), np.float32)


def quantize_kv(x: F32, bits: int, group: int = 0) -> tuple[I8, F32]:
    """x float32 [tokens, head_dim] -> (codes int8 [tokens, head_dim], scales float32 [tokens, groups], of f16); bits 8 or 4."""
    return quantize_groups(x, group or x.shape[1], {8: 127, 4: 7}[bits])


def kv_scores(codes: I8, scales: F32, queries: F32, attention_scale: float) -> F32:
    """Quantized keys [positions, head_dim], queries float32 [queries, head_dim], both rotated or not -> float32 [queries, positions]."""
    q, steps = quantize_activations(queries)
    size = codes.shape[1] // scales.shape[1]
    total = np.zeros((len(q), len(codes)), np.float32)
    for g in range(scales.shape[1]):
        part = slice(g * size, (g + 1) * size)
        dots = q[:, part].astype(np.int64) @ codes[:, part].astype(np.int64).T
        total = total + dots.astype(np.float32) * scales[:, g]
    return np.asarray(total * (steps * np.float32(attention_scale))[:, None], np.float32)


def kv_weigh(codes: I8, scales: F32, weights: F32) -> F32:
    """Quantized values [positions, head_dim] and weights float32 [queries, positions], not negative -> float32 [queries, head_dim]."""
    size = codes.shape[1] // scales.shape[1]
    total = np.zeros((len(weights), codes.shape[1]), np.float32)
    for page in range(0, len(codes), PAGE):
        for g in range(scales.shape[1]):
            part = slice(g * size, (g + 1) * size)
            high = np.zeros((len(weights), size), np.float32)
            low = high.copy()
            for first in range(page, min(page + PAGE, len(codes)), RUN):
                run = slice(first, min(first + RUN, page + PAGE, len(codes)))
                w = weights[:, run] * scales[run, g]
                top = np.maximum(w.max(axis=1, keepdims=True), np.float32(1e-30))
                whole = np.rint(w * (np.float32(16256) / top)).astype(np.int64)
                upper = (whole + 64) >> 7
                step = top / np.float32(16256)
                for sums, parts, factor in ((high, upper, np.float32(128) * step), (low, whole - 128 * upper, step)):
                    sums += (parts @ codes[run, part].astype(np.int64)).astype(np.float32) * factor
            total[:, part] = total[:, part] + (high + low)
    return total


def dequantize_kv(codes: I8, scales: F32) -> NDArray[np.float32]:
    """What the codes stand for, float32 [tokens, head_dim]."""
    return np.asarray(codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1), np.float32)
