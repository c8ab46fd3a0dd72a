"""GPTQ for trits: error feedback on the grid {-s, 0, s}, whose scale is fitted in turn with the trits. It needs torch.

Error feedback (GPTQ, arXiv:2210.17323): the inputs of a layer are rounded one after another, those with the largest H_ii first, and the
error that each leaves in the outputs, e = (w_i - q_i) / U_ii, is taken from the inputs that are still to come: w_j -= e U_ij, where U is
the upper Cholesky factor of H^-1 = U^T U, and H = X^T X / tokens plus `DAMPING` of its mean diagonal. Blocks of columns keep the updates in
the cache.

The grid: s is first fitted to the weights (trits by the threshold s / 2, then the s of least weight error for them, in turn). Then in
rounds: trits by error feedback at this s and its threshold s / 2, which rounds to the nearest of the three; then the s of least output
error for these trits. Feedback makes trits for which another s is better, and another s makes other trits; of all rounds the one of least
error is kept.

Products of the walk through the layers run here, too, at torch's "medium" precision: bfloat16 where the CPU multiplies that faster.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from bitnet.convert.calibrated import as_ternary, refit
from bitnet.convert.quantize import TINY, finite, groups_of
from bitnet.convert.source import F32, I8, Weight
from bitnet.errors import BitNetError, UsageError

DAMPING = 0.01
ROUNDS = 4  # of trits and scale
_FITS = 20  # of the scale before the first
_BLOCK = 128  # columns updated at once
_ROWS = 8192  # of a weight worked on at once, where no scale is for all


class ErrorFeedback:
    """Rounds weights; keeps the factor of the last gram, which several layers share."""

    def __init__(self) -> None:
        try:
            self.torch: Any = importlib.import_module("torch")
        except ImportError:
            raise UsageError("method gptq needs torch; install it (pip install 'bitnet-ternary[train]'), or choose --alpha auto") from None
        self._gram: F32 | None = None
        self._factor: tuple[Any, Any] | None = None  # (U, the order of the columns)

    def product(self, x: F32, w: F32) -> F32:
        """x [tokens, in], w [out, in] -> x w^T, with factors rounded to bfloat16 where that is faster."""
        torch = self.torch
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return np.asarray(torch.mm(_tensor(torch, x), _tensor(torch, w).t()).numpy(), np.float32)
        finally:
            torch.set_float32_matmul_precision(before)

    def ternary(self, weight: Weight, gram: F32, unit: str | int, stored: str) -> Weight:
        """`weight` with trits and scales fitted to its inputs. unit: what shares a scale; stored: how scales lie in the file."""
        rows, groups = weight.shape[0], groups_of(weight, unit)
        step = rows if unit == "tensor" else _ROWS
        trits, scales = np.empty(weight.shape, np.int8), np.empty((1 if unit == "tensor" else rows, groups), np.float32)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            place = slice(0, 1) if unit == "tensor" else slice(first, last)
            trits[first:last], scales[place] = self._fitted(finite(weight, first, last), gram, unit, groups, weight.where)
        return as_ternary(weight, trits, scales, stored)

    def _fitted(self, w: F32, gram: F32, unit: str | int, groups: int, where: str) -> tuple[I8, F32]:
        upper, order = self._factored(gram, where)
        scales, wh = self.fitted_grid(w, gram, unit, groups), self.product(w, gram)
        best: tuple[float, I8, F32] | None = None
        for _ in range(ROUNDS):
            trits = error_feedback(self.torch, w, scales, upper, order)
            scales, error = refit(w, wh, trits, scales, gram, self.product)
            if best is not None and error >= best[0]:
                break
            best = error, trits, scales
        assert best is not None
        return best[1], best[2]

    def fitted_grid(self, w: F32, gram: F32, unit: str | int, groups: int) -> F32:
        """Scales for plain rounding: mean|W|, then trits by s / 2 and the scale of least weight error for them, in turn."""
        parts = np.abs(w.reshape(len(w), groups, -1))
        axes = (0, 2) if unit == "tensor" else 2
        scales = np.maximum(parts.mean(axis=axes, keepdims=True), TINY)
        for _ in range(_FITS):
            kept = parts > scales / 2
            count = kept.sum(axis=axes, keepdims=True)
            scales = np.where(count > 0, (parts * kept).sum(axis=axes, keepdims=True) / np.maximum(count, 1), scales).astype(np.float32)
        return np.ascontiguousarray(scales[:, :, 0] if unit != "tensor" else scales.reshape(1, 1))

    def _factored(self, gram: F32, where: str) -> tuple[Any, Any]:
        """(U float32 [in, in], the columns' order int64 [in])."""
        if self._gram is gram and self._factor is not None:
            return self._factor
        torch = self.torch
        h = _tensor(torch, gram).double()
        diagonal = h.diagonal()
        mean = float(diagonal.mean())
        if mean <= 0:
            raise BitNetError(f"{where}: the calibration text gives it no inputs but 0; give another text")
        order = torch.argsort(diagonal, descending=True, stable=True)
        h = h[order][:, order]
        h.diagonal().add_(DAMPING * mean)
        # with the order of rows and columns reversed, H = L L^T becomes H = R R^T with R upper; so H^-1 = U^T U with U = R^-1
        r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
        del h
        upper = torch.linalg.solve_triangular(r, torch.eye(len(gram), dtype=torch.float64), upper=True).float()
        self._gram, self._factor = gram, (upper, order)
        return self._factor


def error_feedback(torch: Any, w: F32, scales: F32, upper: Any, order: Any) -> I8:
    """Trits of w [out, in], column by column; scales [1 or out, groups]."""
    inputs = w.shape[1]
    columns = _tensor(torch, w).t()[order].contiguous()  # [in, out]: what is updated together lies together
    by_group = _tensor(torch, scales).t().contiguous()  # [groups, 1 or out]
    group = order // (inputs // scales.shape[1])
    trits = torch.empty(columns.shape, dtype=torch.int8)
    for first in range(0, inputs, _BLOCK):
        last = min(inputs, first + _BLOCK)
        errors = torch.empty((last - first, columns.shape[1]))
        for j in range(first, last):
            scale = by_group[group[j]]
            t = torch.clamp(torch.round(columns[j] / scale), -1, 1)
            error = (columns[j] - t * scale) / upper[j, j]
            columns[j:last] -= torch.outer(upper[j, j:last], error)
            trits[j], errors[j - first] = t.to(torch.int8), error
        columns[last:] -= upper[first:last, last:].t() @ errors
    out = torch.empty_like(trits)
    out[order] = trits
    return np.ascontiguousarray(out.numpy().T)


def _tensor(torch: Any, values: F32) -> Any:
    return torch.from_numpy(values if values.flags.writeable else values.copy())
