"""Ordinary weights -> codes times scales, without calibration: the plain rules.

- threshold: T = sign(W) where |W| > alpha * mean|W|, else 0, and scale = the mean of |W| over the weights that are kept. For a given T that
  is the scale of least squared error: |W - sT|^2 is smallest at s = sum(W T) / sum(T^2), and T is the sign of W where it is not 0
  (arXiv:1605.04711). absmean's scale, mean|W| over all weights, would be too small by the weights that became zeros.
- absmean (BitNet b1.58, arXiv:2402.17764): scale = mean|W|, T = clip(round(W / scale), -1, 1): a threshold of 0.5 mean|W|.

A scale holds for the whole tensor, for a row (an output), or for a group of a row's inputs; mean and threshold are taken over the same
weights. The embedding and the head have a scale for every row at least: a row is a token, and tokens differ in length.

int8 and int4 are symmetric in groups of 32 inputs with f16 scales, as GGUF's Q8_0 and Q4_0 hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.source import F32, I8, Weight, from_codes
from bitnet.errors import FormatError, UsageError
from bitnet.models import LINEARS
from bitnet.packing import bf16_bits

SCHEMES = ("ternary", "int8", "int4", "fp16")
METHODS = ("threshold", "absmean")
TABLES = ("embedding", "head")
# The article's alphas by kind of layer. It leaves o_proj out; that one writes into the residual stream, as down_proj does, with no softmax
# behind it that would forgive an error as it does those of queries and keys: so it has the feed-forward's.
ALPHAS = {"embedding": 0.05, "head": 0.05, "q": 0.08, "k": 0.08, "v": 0.08, "o": 0.06, "gate": 0.06, "up": 0.06, "down": 0.06}
GROUP = 32  # of int8 and int4
_SMALLEST = 1e-5  # a scale, so that weights of nothing but zeros have one


@dataclass(frozen=True)
class Ternarization:
    """How weights become ternary."""

    method: str = "threshold"  # one of METHODS
    alpha: float | None = None  # of every layer; None: ALPHAS
    scale: str | int = "tensor"  # what shares a scale: "tensor", "row", or so many inputs of a row

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.alpha is not None and not (np.isfinite(self.alpha) and self.alpha >= 0):
            raise UsageError(f"alpha is {self.alpha}; expected a finite number >= 0 (0.05 to 0.1 is usual)")
        if self.alpha is not None and self.method == "absmean":
            raise UsageError("absmean has no alpha: its threshold is half of mean|W|; leave out one of the two")
        if self.scale not in ("tensor", "row") and not (isinstance(self.scale, int) and self.scale > 0 and self.scale % 32 == 0):
            raise UsageError(f"scale is {self.scale!r}; expected tensor, row, or a multiple of 32 inputs that share one")

    def alpha_of(self, name: str) -> float:
        """Of the layer with this canonical name."""
        return ALPHAS[name.rsplit(".", 1)[-1]] if self.alpha is None else self.alpha


def is_quantized(weight: Weight) -> bool:
    """Whether a scheme is for this one: the linear layers, the embedding and the head, but no vector."""
    return weight.kind in (*LINEARS, *TABLES)


def ternarized(weight: Weight, how: Ternarization, stored: str) -> Weight:
    """`weight` by `how`; its scales are rounded to `stored` ("f32", "f16", "bf16"), as they will lie in the file."""
    unit = "row" if how.scale == "tensor" and weight.kind in TABLES else how.scale
    rows, inputs = weight.shape
    if isinstance(unit, int) and inputs % unit:
        raise UsageError(f"{weight.where}: has {inputs} inputs, which are no whole groups of {unit}; choose another scale")
    alpha = how.alpha_of(weight.name) if how.method == "threshold" else None
    groups = inputs // unit if isinstance(unit, int) else 1
    units = (1, 1) if unit == "tensor" else (rows, groups)
    sums, kept, counts = np.zeros(units), np.zeros(units), np.zeros(units)

    def place(first: int, last: int) -> slice:
        return slice(0, 1) if unit == "tensor" else slice(first, last)

    def add(to: NDArray[np.float64], first: int, last: int, values: NDArray[np.float64]) -> None:
        """values [rows, inputs] to the sums of their units."""
        summed = values.sum().reshape(1, 1) if unit == "tensor" else values.reshape(last - first, groups, -1).sum(axis=2)
        to[place(first, last)] += summed

    for first, last in weight.spans():
        add(sums, first, last, np.abs(_finite(weight, first, last), dtype=np.float64))
    mean = sums / (rows * inputs / sums.size)
    if alpha is None:
        exact = np.maximum(mean, _SMALLEST).astype(np.float32)
    else:
        for first, last in weight.spans():
            size = np.abs(weight.values(first, last), dtype=np.float64)
            above = _grouped(size, groups) > alpha * mean[place(first, last), :, None]
            add(kept, first, last, np.where(above, _grouped(size, groups), 0).reshape(size.shape))
            add(counts, first, last, above.reshape(size.shape).astype(np.float64))
        exact = np.maximum(np.where(counts > 0, kept / np.maximum(counts, 1), mean), _SMALLEST).astype(np.float32)

    def codes(first: int, last: int) -> I8:
        values = _grouped(weight.values(first, last), groups)
        if alpha is None:
            trits = np.clip(np.rint(values / exact[place(first, last), :, None]), -1, 1).astype(np.int8)
        else:
            threshold = alpha * mean[place(first, last), :, None]
            trits = (values > threshold).astype(np.int8) - (values < -threshold).astype(np.int8)
        return np.asarray(trits.reshape(last - first, inputs), np.int8)

    return from_codes(weight.name, weight.shape, "ternary", weight.where, codes, rounded(exact, stored))


def integer(weight: Weight, scheme: str) -> Weight:
    """`weight` as int8 or int4 in groups of 32 inputs."""
    rows, inputs = weight.shape
    if inputs % GROUP:
        raise UsageError(f"{weight.where}: has {inputs} inputs, which are no whole groups of {GROUP}; {scheme} needs those")
    most = 127 if scheme == "int8" else 7
    scales = np.empty((rows, inputs // GROUP), np.float32)
    for first, last in weight.spans():
        size = np.abs(_grouped(_finite(weight, first, last), scales.shape[1])).max(axis=2)
        scales[first:last] = rounded(size / np.float32(most), "f16")

    def codes(first: int, last: int) -> I8:
        inverse = np.divide(np.float32(1), scales[first:last], out=np.zeros_like(scales[first:last]), where=scales[first:last] > 0)
        values = _grouped(weight.values(first, last), scales.shape[1]) * inverse[:, :, None]
        return np.asarray(np.clip(np.rint(values), -most, most).astype(np.int8).reshape(last - first, inputs), np.int8)

    return from_codes(weight.name, weight.shape, scheme, weight.where, codes, scales)


def rounded(scales: F32, stored: str) -> F32:
    """Scales as `stored` holds them."""
    if stored == "f16":
        with np.errstate(over="ignore"):
            return scales.astype(np.float16).astype(np.float32)
    if stored == "bf16":
        return (bf16_bits(scales).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return scales


def _grouped(values: NDArray[Any], groups: int) -> NDArray[Any]:
    """[rows, inputs] -> [rows, groups, inputs of a group]."""
    return values.reshape(len(values), groups, -1)


def _finite(weight: Weight, first: int, last: int) -> F32:
    values: F32 = weight.values(first, last)
    if not np.isfinite(values).all():
        raise FormatError(f"{weight.where}: holds NaN or infinity; the file is damaged or training diverged")
    return values
