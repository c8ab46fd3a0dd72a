"""Ternary weights by what they do to a layer's outputs, Y = X W^T, over calibration text.

With the gram H = X^T X / tokens the mean squared error of an output (a row w of W, q in its place) is (w - q) H (w - q)^T: nothing else of
the text is needed. For trits t in place, the best scale s of a row has a closed form: s = w H t^T / t H t^T, and then the error is
w H w^T - (w H t^T)^2 / t H t^T. `best_threshold` tries thresholds alpha * mean|W| and takes the one of least error: with one scale for the
tensor one alpha for the layer, but for queries, keys and values one for each head (each is an output of its own); with scales by row or
group, one alpha for each row.

An embedding is looked up, so its inputs are single tokens, H = I, and a row's best trits are known exactly: with |w| in falling order the
first k are kept that maximize (|w_1| + ... + |w_k|)^2 / k (arXiv:1605.04711, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.layerwise import Product
from bitnet.convert.quantize import SMALLEST, TINY, Alpha, finite, grouped, groups_of, kept_codes, rounded
from bitnet.convert.source import F32, I8, Weight, from_codes, scaled

TRIED = (0.0, 0.05, 0.06, 0.08, *(round(0.1 * n, 1) for n in range(1, 16)))  # alphas; for Gaussian weights about 0.75 is the best
_ROUNDS = 10  # of alternation between thresholds and scale
_SWEEPS = 4  # over the groups of a row, each with the others in place


@dataclass(frozen=True)
class OutputError:
    """What a weight's change does to its outputs, over calibration text."""

    relative: float  # norm of the outputs' change by their norm
    heads: tuple[float, ...] = ()  # the same by attention head, of q, k and v


def output_error(before: F32, after: F32, gram: F32, product: Product, head: int = 0) -> OutputError:
    """head: rows of an attention head, 0 where there are none."""
    change, total = (quadratic(w, gram, product) for w in (before - after, before))
    heads = np.sqrt(change.reshape(-1, head).sum(axis=1) / np.maximum(total.reshape(-1, head).sum(axis=1), 1e-30)) if head else np.zeros(0)
    return OutputError(float(np.sqrt(change.sum() / max(total.sum(), 1e-30))), tuple(heads.tolist()))


def quadratic(w: F32, gram: F32, product: Product) -> NDArray[np.float64]:
    """w H w^T of every row, float64 [rows]."""
    found: NDArray[np.float64] = np.maximum(np.einsum("ri,ri->r", product(w, gram), w, dtype=np.float64), 0)
    return found


def best_threshold(weight: Weight, gram: F32, unit: str | int, stored: str, head: int, product: Product) -> tuple[Weight, Alpha]:
    """(`weight` as ternary, the alpha or alphas taken, of rows their mean).

    unit: what shares a scale; stored: how scales lie in the file; head: rows of an attention head, 0 where there are none.
    """
    rows = weight.shape[0]
    w = finite(weight, 0, rows)
    parts = grouped(w, groups_of(weight, unit))
    size = np.abs(parts)
    mean = size.mean(axis=None if unit == "tensor" else 2, keepdims=True, dtype=np.float64).reshape(
        -1, 1 if unit == "tensor" else parts.shape[1]
    )
    wh = product(w, gram)

    def trits(alpha: NDArray[np.float64]) -> I8:
        """alpha [rows or 1]"""
        return np.asarray(np.where(size > (alpha.reshape(-1, 1) * mean)[:, :, None], np.sign(parts), 0).astype(np.int8).reshape(w.shape))

    def plain(t: I8) -> F32:
        """float32 [rows, groups]: mean|W| of what is kept, before one factor for the row, or for the tensor, makes it right."""
        if not isinstance(unit, int):
            return np.ones((1, 1), np.float32)
        kept = np.abs(grouped(t, parts.shape[1])).sum(axis=2)
        return np.asarray(
            np.where(kept > 0, (size * np.abs(grouped(t, parts.shape[1]))).sum(axis=2) / np.maximum(kept, 1), mean), np.float32
        )

    along, across = np.empty((len(TRIED), rows)), np.empty((len(TRIED), rows))  # w H t^T, t H t^T
    for n, alpha in enumerate(TRIED):
        t = trits(np.array([alpha]))
        u = scaled(t, plain(t))
        along[n] = np.einsum("ri,ri->r", u, wh, dtype=np.float64)
        across[n] = quadratic(u, gram, product)
    across = np.maximum(across, 1e-30)
    if unit == "tensor":
        block = head or rows
        a, b = (values.reshape(len(TRIED), -1, block).sum(axis=2) for values in (along, across))  # [alphas, heads]
        chosen, scale = _one_scale(a, b)
        alphas = np.array(TRIED)[chosen]
        taken: Alpha = float(alphas[0]) if len(alphas) == 1 else tuple(alphas.tolist())
        codes, scales = trits(np.repeat(alphas, block)), np.full((1, 1), scale, np.float32)
    else:
        chosen = (np.maximum(along, 0) ** 2 / across).argmax(axis=0)
        alphas = np.array(TRIED)[chosen]
        codes, taken = trits(alphas), float(alphas.mean())
        factor = along[chosen, np.arange(rows)] / across[chosen, np.arange(rows)]
        scales = np.asarray(factor[:, None] * np.broadcast_to(plain(codes), (rows, parts.shape[1])), np.float32)
        if isinstance(unit, int):
            scales, _ = refit(w, wh, codes, scales, gram, product)
    return as_ternary(weight, codes, scales, stored), taken


def _one_scale(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.intp], float]:
    """(each head's alpha, the scale of all), of least s^2 b - 2 s a summed over heads; a, b: [alphas, heads].

    The best alphas for a scale, then the best scale for them, in turn, from every alpha that all heads could share.
    """
    columns, best, least = np.arange(a.shape[1]), (np.zeros(a.shape[1], np.intp), float(TINY)), np.inf
    for start in range(len(a)):
        chosen = np.full(a.shape[1], start)
        for _ in range(_ROUNDS):
            scale = max(a[chosen, columns].sum() / b[chosen, columns].sum(), float(TINY))
            chosen = (scale**2 * b - 2 * scale * a).argmin(axis=0)
        scale = max(a[chosen, columns].sum() / b[chosen, columns].sum(), float(TINY))
        error = (scale**2 * b - 2 * scale * a)[chosen, columns].sum()
        if error < least:
            least, best = error, (chosen, scale)
    return best


def refit(w: F32, wh: F32, trits: I8, scales: F32, gram: F32, product: Product) -> tuple[F32, float]:
    """(scales of less error for these trits, that error: the sum of (w - q) H (w - q)^T over rows); wh: w H.

    The scales are the best for the tensor [1, 1] or the rows [rows, 1]; of groups, one after another.
    """
    if scales.shape[1] == 1:
        t = trits.astype(np.float32)
        along, across = np.einsum("ri,ri->r", t, wh, dtype=np.float64), quadratic(t, gram, product)
        if len(scales) == 1:
            along, across = along.sum(keepdims=True), across.sum(keepdims=True)
        better = np.where((across > 0) & (along > 0), along / np.maximum(across, 1e-30), scales[:, 0])
        return np.asarray(better[:, None], np.float32), float(_inner(w, wh) + (better * (better * across - 2 * along)).sum())
    scales = np.broadcast_to(scales, (len(w), scales.shape[1])).copy()
    size = w.shape[1] // scales.shape[1]
    left = wh - product(scaled(trits, scales), gram)  # (w - q) H
    for _ in range(_SWEEPS):
        for g in range(scales.shape[1]):
            part = slice(g * size, (g + 1) * size)
            t = trits[:, part].astype(np.float32)
            th = product(t, np.ascontiguousarray(gram[:, part]))  # H is symmetric: t times its rows of this group
            across = np.einsum("ri,ri->r", th[:, part], t, dtype=np.float64)
            step = np.where(across > 0, np.einsum("ri,ri->r", left[:, part], t, dtype=np.float64) / np.maximum(across, 1e-30), 0)
            step = np.asarray(np.where(scales[:, g] + step > 0, step, 0), np.float32)
            scales[:, g] += step
            left -= step[:, None] * th
    return scales, _inner(w - scaled(trits, scales), left)


def _inner(a: F32, b: F32) -> float:
    return float(np.einsum("ri,ri->", a, b, dtype=np.float64))


def best_rows(weight: Weight, unit: str | int, stored: str) -> Weight:
    """The trits and scales of least weight error, row by row or group by group: what a table of rows that are looked up wants."""
    rows, groups = weight.shape[0], groups_of(weight, unit)
    trits, scales = np.empty(weight.shape, np.int8), np.empty((rows, groups), np.float32)
    for first, last in weight.spans():
        parts = grouped(finite(weight, first, last), groups)
        size = np.abs(parts)
        falling = -np.sort(-size, axis=2)
        sums = falling.cumsum(axis=2, dtype=np.float64)
        best = (sums**2 / np.arange(1, size.shape[2] + 1)).argmax(axis=2)[:, :, None]
        scales[first:last] = (np.take_along_axis(sums, best, axis=2) / (best + 1))[:, :, 0]
        trits[first:last] = np.where(size >= np.take_along_axis(falling, best, axis=2), np.sign(parts), 0).reshape(last - first, -1)
    return as_ternary(weight, trits, scales, stored)


def as_ternary(weight: Weight, trits: I8, scales: F32, stored: str) -> Weight:
    """`weight` as these trits times these scales, as they will lie in the file."""
    kept = rounded(np.asarray(np.where(scales > 0, np.maximum(scales, TINY), SMALLEST), np.float32), stored)
    return from_codes(weight.name, weight.shape, "ternary", weight.where, kept_codes(trits), kept)
