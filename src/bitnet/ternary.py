"""What ternary means: the definitions that everything else must equal.

Plain numpy, no speed. The native kernels are compared with these functions for equality, not closeness, so the order of
every floating-point operation here is part of the definition.

Ternary weights are W = scale * T with T in {-1, 0, +1}. Two ways to T are in use:
- a threshold, `ternarize`: T = sign(W) where |W| > alpha * mean|W|, else 0;
- absmean (BitNet b1.58, arXiv:2402.17764): scale = mean|W|, T = clip(round(W / scale), -1, 1), which is the threshold 0.5.

Activations are int8 per token: step = max(|x|max, 1e-5) / 127, q = round half to even(x * 127 / |x|max), clipped to [-128, 127]; or
likewise per group of a token's inputs, for models that were trained without quantized activations and whose outliers one step cannot hold.
Other weights are W = scale * integer too, and meet the same activations:
- int8 and int4, symmetric: scale = |W|max / 127 or / 7, per row or per group of a row's inputs;
- fp4, the 4-bit floats E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Doubled they are integers, so that is how they are kept;
- binary: +1 or -1, scale = mean|W| per row.
So all six schemes share the product and differ in their integers alone; f16, bf16 and float32 weights meet float32 activations.

A product is an integer dot product per run of inputs over which the weights' scale and the activations' step are constant, times that
scale (and that step, if there are several), summed over the runs in order, times the token's step (if there is one).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import UsageError

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]

SMALLEST_ABSMAX = np.float32(1e-5)  # of an activation row, so that a row of zeros has a step
FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)  # twice the value of each E2M1 code without its sign


def ternarize(weights: Any, alpha: float = 0.05) -> Any:
    """Unscaled ternary weights: sign(w) where |w| > alpha * mean|w|, 0 elsewhere; one threshold for the whole array.

    `weights` is a numpy array or a torch tensor of any floating dtype of at most 64 bits, and of any shape; the result is of the same
    kind, dtype, shape and device, with the values -1, 0, +1. Raises `UsageError` for an empty array, for values that are not finite, for
    a negative alpha, for a dtype that lacks those values (float8_e8m0fnu) or has more than 64 bits, and for a masked array.
    """
    number = isinstance(alpha, (int, float, np.floating, np.integer)) and not isinstance(alpha, bool)
    given: Any = alpha
    exact = float(given) if isinstance(given, np.floating) else given  # beside float16 the limit would be rounded
    if not (number and 0 <= exact <= float(np.finfo(np.float64).max)):
        raise UsageError(f"ternarize: alpha is {alpha!r}; expected a finite number >= 0 (0.05 to 0.1 is usual)")
    is_torch = any(kind.__module__.split(".")[0] == "torch" for kind in type(weights).__mro__)
    try:
        w: Any = weights if is_torch else np.asanyarray(weights)
    except ValueError:
        raise UsageError("ternarize: the weights are lists of different lengths; expected a numpy array or a torch tensor") from None
    floating = w.is_floating_point() if is_torch else np.issubdtype(w.dtype, np.floating)
    if not floating or str(w.dtype) == "torch.float8_e8m0fnu" or w.dtype.itemsize > 8:
        raise UsageError(
            f"ternarize: the weights are of dtype {w.dtype}; expected floating point that holds -1, 0 and 1, of at most 64 bits"
        )
    if isinstance(w, np.ma.MaskedArray):
        raise UsageError("ternarize: the weights are a masked array; expected a plain one (filled(0), where the mask means zeros)")
    if (w.numel() if is_torch else w.size) == 0:
        raise UsageError(f"ternarize: the weights are empty (shape {tuple(w.shape)})")
    if is_torch and w.device.type == "meta":
        raise UsageError("ternarize: the weights are on torch's device meta, which holds no values; load them first")
    if is_torch and str(w.layout) != "torch.strided":
        raise UsageError(f"ternarize: the weights are a tensor of layout {w.layout}; expected a dense one (to_dense())")
    wide: Any = w.detach().double() if is_torch else w.astype(np.float64)
    size = abs(wide)
    most = float(size.max())
    if not np.isfinite(most):
        raise UsageError("ternarize: the weights hold NaN or infinity; expected finite values")
    with np.errstate(over="ignore"):
        mean = float(size.mean())
    threshold = float(alpha) * (mean if np.isfinite(mean) else float((size / most).mean()) * most)  # whose sum no float64 may hold
    if is_torch:  # by way of float32: not every dtype subtracts
        return ((wide > threshold).float() - (wide < -threshold).float()).to(w.dtype)
    return np.asarray((wide > threshold).astype(np.int8) - (wide < -threshold)).astype(w.dtype)


def absmean(weights: F32) -> tuple[I8, np.float32]:
    """(trits int8, scale float32): the ternarization that BitNet models are trained with, one scale for the whole array."""
    w = np.asarray(weights, np.float32)
    scale = np.float32(max(np.abs(w).mean(dtype=np.float64), 1e-5))
    return np.clip(np.rint(w / scale), -1, 1).astype(np.int8), scale


def quantize_activations(x: F32, group: int = 0) -> tuple[I8, F32]:
    """x float32 [tokens, in] -> (q int8 [tokens, in], step float32); x is about q * step.

    step is [tokens], or with a `group` of inputs [tokens, ceil(in / group)]; the last group may be shorter.
    """
    x = np.asarray(x, np.float32)
    if group:
        parts = [quantize_activations(x[:, at : at + group]) for at in range(0, x.shape[1], group)]
        return np.concatenate([q for q, _ in parts], axis=1), np.stack([step for _, step in parts], axis=1)
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), SMALLEST_ABSMAX)
    q = np.clip(np.rint(x * (np.float32(127) / absmax)), -128, 127).astype(np.int8)
    return q, (absmax / np.float32(127))[..., 0]


def quantize_int8(weights: F32, group: int = 0) -> tuple[I8, F32]:
    """weights float32 [out, in] -> (codes int8 [out, in] in [-127, 127], scales float32), symmetric.

    One scale per row, scales [out]; or with a `group` of inputs, of which the last may be shorter, [out, ceil(in / group)].
    """
    w = np.asarray(weights, np.float32)
    if group:
        rows, inputs = w.shape
        padded = np.zeros((rows, -(-inputs // group) * group), np.float32)
        padded[:, :inputs] = w
        codes, scale = quantize_int8(padded.reshape(-1, group))
        return codes.reshape(padded.shape)[:, :inputs], scale.reshape(rows, -1)
    scale = np.abs(w).max(axis=-1) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint(w * inverse[:, None]), -127, 127).astype(np.int8), scale


def quantize_int4(weights: F32, group: int = 32) -> tuple[I8, F32]:
    """weights float32 [out, in] -> (codes int8 [out, in] in [-7, 7], scales float32 [out, ceil(in / group)]), symmetric.

    One scale per `group` of inputs, of which the last may be shorter, rounded to f16: 4.5 bits a weight in groups of 32.
    """
    return quantize_groups(weights, group, 7)


def quantize_groups(x: F32, group: int, top: int) -> tuple[I8, F32]:
    """x float32 [rows, n] -> (codes int8 [rows, n] in [-top, top], scales float32 [rows, ceil(n / group)], rounded to f16), symmetric."""
    scaled, scale = _scaled_groups(x, group, top)
    codes = np.clip(np.rint(scaled), -top, top).astype(np.int8)
    return codes.reshape(len(scaled), -1)[:, : np.shape(x)[1]], scale


def quantize_fp4(weights: F32, group: int = 32) -> tuple[I8, F32]:
    """weights float32 [out, in] -> (codes int8 [out, in], twice the E2M1 values, scales float32 [out, ceil(in / group)]).

    Codes are those of `FP4_DOUBLED` and their negatives. One scale per `group` of inputs, of which the last may be shorter: |W|max / 12,
    rounded to f16, half of what an E2M1 value is multiplied by. A weight becomes the nearest value; of two as near, the one whose E2M1
    code is even, which is round half to even.
    """
    x, scale = _scaled_groups(weights, group, 12)
    a = np.abs(x)
    # code 0 to 7 of the magnitude, by the points halfway between two doubled values: where the upper code is even, a tie goes up
    code = (a > 0.5) + (a >= 1.5).astype(np.int8) + (a > 2.5) + (a >= 3.5) + (a > 5) + (a >= 7) + (a > 10)
    codes = np.where(x < 0, -FP4_DOUBLED[code], FP4_DOUBLED[code])
    return codes.reshape(len(x), -1)[:, : np.shape(weights)[1]], scale


def _scaled_groups(weights: F32, group: int, top: int) -> tuple[F32, F32]:
    """(weights / scale [out, groups, group], zero-padded; scale [out, groups] = |W|max / top of each group, rounded to f16)."""
    w = np.asarray(weights, np.float32)
    rows, inputs = w.shape
    groups = np.zeros((rows, -(-inputs // group), group), np.float32)
    groups.reshape(rows, -1)[:, :inputs] = w
    scale = (np.abs(groups).max(axis=-1) / np.float32(top)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return groups * inverse[..., None], scale


def quantize_binary(weights: F32, group: int = 0) -> tuple[I8, F32]:
    """weights float32 [out, in] -> (codes int8 [out, in], -1 or +1, scales float32 [out, 1 or ceil(in / group)]).

    codes are the signs, that of 0 being +1; a scale is mean|W|, which for given signs has the least squared error (XNOR-Net,
    arXiv:1603.05279, section 3.1). One per row, as there: rows of a matrix differ in size, and a row's scale is all but free (32 bits for
    thousands of weights) where one for every 32 inputs would make 1 bit 1.5; and it leaves one exact integer sum a row. With a `group`
    of inputs, a multiple of 16 of which the last may be shorter, as files have it that store blocks.

    The mean is of float64 sums: input k goes to partial sum k mod 8, in order; ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), rounded after
    the division.
    """
    w = np.asarray(weights, np.float32)
    rows, inputs = w.shape
    size = group or inputs
    scales = np.empty((rows, -(-inputs // size)), np.float32)
    for number, at in enumerate(range(0, inputs, size)):
        part = np.abs(w[:, at : at + size])
        lanes = np.zeros((rows, -(-part.shape[1] // 8), 8))
        lanes.reshape(rows, -1)[:, : part.shape[1]] = part
        s = lanes.cumsum(axis=1)[:, -1]
        total = ((s[:, 0] + s[:, 1]) + (s[:, 2] + s[:, 3])) + ((s[:, 4] + s[:, 5]) + (s[:, 6] + s[:, 7]))
        scales[:, number] = total / part.shape[1]
    return np.where(w < 0, -1, 1).astype(np.int8), scales


def matmul_integer(codes: I8, scales: F32, q: I8, step: F32, activation_group: int = 0) -> F32:
    """The product of weights of any integer scheme with int8 activations.

    codes int8 [out, in]; scales float32 [out, groups], the groups being equal runs of inputs (the last may be shorter);
    q int8 [tokens, in]; step float32 [tokens], or [tokens, ceil(in / activation_group)]. Returns float32 [tokens, out].
    """
    out_features, in_features = codes.shape
    size = group_size(in_features, scales.shape[1])
    bounds = sorted({*range(0, in_features, size), *range(0, in_features, activation_group or in_features), in_features})
    y = np.zeros((q.shape[0], out_features), np.float32)
    for first, end in pairwise(bounds):
        dot = q[:, first:end].astype(np.int64) @ codes[:, first:end].astype(np.int64).T
        assert np.abs(dot).max(initial=0) < 2**31, "int32 accumulators would wrap"
        scaled = dot.astype(np.int32).astype(np.float32) * scales[:, first // size]
        y = y + (scaled * step[:, first // activation_group, None] if activation_group else scaled)
    return np.asarray(y if activation_group else y * step[:, None], np.float32)


def matmul_dense(weights: F32, x: F32) -> F32:
    """weights float32 [out, in] (widened from whatever is stored), x float32 [tokens, in] -> float32 [tokens, out].

    Input k goes to the partial sum k mod 4, in order, by fused multiply-adds; the four are added as (0 + 1) + (2 + 3).
    """
    partial = np.zeros((4, x.shape[0], weights.shape[0]), np.float32)
    for k in range(weights.shape[1]):
        partial[k % 4] = fused_multiply_add(x[:, k, None], weights[None, :, k], partial[k % 4])
    return np.asarray((partial[0] + partial[1]) + (partial[2] + partial[3]), np.float32)


def low_rank(a: F32, b: F32, scale: float | F32, x: F32) -> F32:
    """What an adapter adds to W x: B (scale * (A x)) (LoRA, arXiv:2106.09685; there scale is alpha / rank).

    a float32 [rank, in], b whole numbers up to 32,767 as float32 [out, rank], scale one or float32 [rank], x float32 [tokens, in] ->
    float32 [tokens, out]. A's sums run in 16 lanes, lane l over the inputs l, l + 16, ... in order, by fused multiply-adds; then halves of
    them are added. B meets them four at a time, rounded to 15 bits (`round_fours`): exact sums of four products, each added by a fused
    multiply-add with its step.
    """
    rank, inputs = a.shape
    lanes = np.zeros((x.shape[0], rank, 16), np.float32)
    for k in range(0, inputs, 16):
        n = min(16, inputs - k)
        lanes[..., :n] = fused_multiply_add(x[:, None, k : k + n], a[None, :, k : k + n], lanes[..., :n])
    for n in (8, 4, 2, 1):
        lanes = lanes[..., :n] + lanes[..., n : 2 * n]
    codes, steps = round_fours(lanes[..., 0] * np.float32(scale))
    b = np.pad(b, ((0, 0), (0, -rank % 4)))
    total = np.zeros((x.shape[0], b.shape[0]), np.float32)
    for four in range(steps.shape[1]):
        of_four = slice(4 * four, 4 * four + 4)
        dots = (codes[:, of_four].astype(np.int64) @ b[:, of_four].T.astype(np.int64)).astype(np.float32)
        total = fused_multiply_add(dots, steps[:, four, None], total)
    return total


def round_fours(x: F32) -> tuple[NDArray[np.int32], F32]:
    """x float32 [tokens, n] -> int32 [tokens, n up to a multiple of 4] up to 16,383, and the steps of each four, float32 [tokens, fours].

    A value moves by 1 / 32766 of the largest of its four at most; fours below 1e-30 become zeros.
    """
    fours = np.pad(x, ((0, 0), (0, -x.shape[1] % 4))).reshape(x.shape[0], -1, 4)
    most = np.abs(fours).max(axis=2)
    inverse = np.divide(np.float32(16383), most, out=np.zeros_like(most), where=most > np.float32(1e-30))
    codes = np.rint(fours * inverse[..., None]).astype(np.int32)
    return codes.reshape(x.shape[0], -1), np.asarray(most / np.float32(16383), np.float32)


def fused_multiply_add(a: F32, b: F32, c: F32) -> F32:
    """a * b + c, rounded once to float32; finite numbers, broadcast as numpy does.

    In float64 the product is exact. The sum is rounded to odd: where it is not exact and its last bit is 0, it becomes its neighbour
    on the exact sum's side. With 53 bits that is enough for the second rounding to give what one alone would (Boldo and Melquiond, 2008).
    """
    product, addend = np.broadcast_arrays(np.float64(a) * np.float64(b), np.float64(c))
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact (Knuth)
    towards = np.nextafter(total, np.copysign(np.inf, error))
    even = (total.view(np.int64) & 1) == 0
    return np.asarray(np.where((error != 0) & even, towards, total), np.float32)


def group_size(in_features: int, groups: int) -> int:
    """Inputs per group when `in_features` are cut into `groups` runs; a multiple of 16 unless there is one group."""
    if groups == 1:
        return in_features
    size = -(-in_features // groups)
    return -(-size // 16) * 16
