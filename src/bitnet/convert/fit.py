"""What a format holds of a weight: exactly, or with an error that is asked for and measured, or not at all.

Nothing is written before every weight has been fitted, so a refusal costs no file. Between groups of scales: 128 -> 64 is exact (the scale
twice), 64 -> 128 or 128 -> 256 only where neighbours are equal, and so into one scale for the tensor. A scale in f16 is exact where f16
holds it; one scale for a whole tensor can stand beside it instead, in f32, where the format knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.formats import Format
from bitnet.convert.quantize import GROUP, TABLES, rounded
from bitnet.convert.source import F32, Weight, from_codes, simplest
from bitnet.errors import BitNetError, UnsupportedModelError, UsageError
from bitnet.models import LINEARS
from bitnet.packing import INTEGERS

_MIXED = (256, 128, 64)  # inputs that may share a scale where dense weights are looked through for three values


class InexactError(BitNetError):
    """A conversion that would change the model, and was not asked to."""


@dataclass(frozen=True)
class Loss:
    """What requantizing has changed of a weight."""

    name: str
    error: float  # sum of squared differences
    total: float  # sum of squared weights

    @property
    def relative(self) -> float:
        """Norm of the difference by the norm."""
        return float(np.sqrt(self.error / self.total)) if self.total else 0.0


def fit(weight: Weight, form: Format, requantize: bool, dtypes: Sequence[str], beside: bool, plain: bool) -> tuple[Weight, Loss | None]:
    """`weight` as `form` holds it, and what that has cost, None where nothing.

    dtypes: of safetensors' dense tensors, the first that is exact is taken; beside: whether a GGUF may keep a tensor's scale apart from its
    blocks; plain: of a model that has ternary layers, so that this one is meant to be dense.
    Raises InexactError where it would not be exact and `requantize` does not allow that, UsageError for shapes that do not fit.
    """
    matrix = weight.kind in (*LINEARS, *TABLES)
    if not matrix:
        return _vector(weight, form, dtypes)
    if form.dense:
        return _dense(weight, (form.weights,), requantize)
    coded = weight.codes is not None
    if weight.kind in TABLES and not coded:
        return _table(weight, form, dtypes, beside)
    if plain and not coded:
        return _as_stored(weight, form, dtypes)
    if form.integer and coded and weight.scheme == form.integer:
        return _integers(weight, form), None
    if weight.kind in TABLES and (form.container in ("hf", "safetensors") or form.weights == "i2_s"):
        return _dense(weight, dtypes, requantize)
    if not coded and weight.scheme == form.weights:
        return weight, None  # the same blocks
    if form.integer:
        if weight.scheme != form.integer:
            ternary = coded and weight.scheme not in INTEGERS
            todo = "choose a ternary format, which keeps it as it is" if ternary else f"add --quantization {form.integer}"
            raise UsageError(f"{weight.where}: is {weight.scheme}; {form.name} holds {form.integer}: {todo}")
        return weight, None
    if not coded:
        weight = three_valued(weight)
    if weight.scheme in INTEGERS:
        raise UsageError(
            f"{weight.where}: is {weight.scheme}, and {form.name} holds ternary weights, not {weight.scheme}; choose --format "
            f"hf-{weight.scheme}, or to make it ternary add --quantization ternary"
        )
    return _packed(weight, form, requantize, beside)


def rebased(weight: Weight, offset: float) -> Weight:
    """A norm's weights for a format that adds `offset` where they are used: what is computed with stays the same to the bit."""
    if weight.offset == offset:
        return weight
    used = weight.values(0, weight.shape[0]) + np.float32(weight.offset)
    values = used - np.float32(offset)
    if not np.array_equal(values + np.float32(offset), used):
        raise InexactError(
            f"{weight.where}: is {1 + weight.offset:g}-based, and float32 does not hold all of it less {offset:g}; choose a gguf format"
        )
    return replace(weight, scheme="f32", values=lambda a, b: values[a:b], offset=offset, stored=None)


def _packed(weight: Weight, form: Format, requantize: bool, beside: bool) -> tuple[Weight, Loss | None]:
    scales, codes, block, inputs = weight.scales, weight.codes, form.block, weight.shape[1]
    assert scales is not None and codes is not None
    if block and inputs % block:
        others = "gguf-q2_0 takes multiples of 64" if inputs % 64 == 0 else "safetensors takes any"
        raise UsageError(f"{weight.where}: has {inputs} inputs a row; {form.name} needs a multiple of {block} ({others})")
    if form.weights == "i2_s" and (weight.shape[0] * inputs) % 128:
        raise UsageError(
            f"{weight.where}: has {weight.shape[0] * inputs:,} weights; gguf-i2_s needs a multiple of 128 (safetensors takes any)"
        )
    if form.container == "hf" and weight.shape[0] % 4:
        raise UsageError(
            f"{weight.where}: has {weight.shape[0]} rows, and transformers loads packed layers of a multiple of 4 only; choose "
            "--format safetensors for this program, or hf-dense-f32"
        )
    if form.weights == "q1_0":
        zeros = sum(int((codes(first, last) == 0).sum()) for first, last in weight.spans())
        if zeros:
            raise UnsupportedModelError(f"{weight.where}: has {zeros:,} zeros among its weights; gguf-q1_0 is binary and holds none")
    merged, exact = _merged(scales, block, inputs)
    if not exact and (scales == 0).any():  # of groups that are nothing but zeros a scale says nothing
        scales = _without_idle(weight, scales)
        weight = from_codes(weight.name, weight.shape, weight.scheme, weight.where, codes, scales)
        merged, exact = _merged(scales, block, inputs)
    if exact:
        if holds(merged, form, beside):
            return from_codes(weight.name, weight.shape, weight.scheme, weight.where, codes, merged), None
        worst = float(np.abs(stored_scales(merged, form) - merged).max() / np.abs(merged).max())
        problem = f"has scales that {form.name} cannot hold ({_example(merged, form)}; off by {worst:.1e} at most)"
    else:
        width = f"the {block} inputs of a block" if block else "the whole tensor"
        problem = f"has a scale for {_extent(weight)}, and they differ; {form.name} has one for {width}"
    if not requantize:
        raise InexactError(
            f"{weight.where}: {problem}. Choose a format that is exact (hf-dense-f32 always is), or accept it with --allow-requantize"
        )
    return _requantized(weight, scales, form, block)


def _integers(weight: Weight, form: Format) -> Weight:
    """int8, int4 or fp4 in a format that has an f16 scale for 32 inputs: coarser ones are repeated."""
    scales, codes, (rows, inputs) = weight.scales, weight.codes, weight.shape
    assert scales is not None and codes is not None
    groups = inputs // GROUP
    if inputs % GROUP or groups % scales.shape[1] or not np.array_equal(rounded(scales, "f16"), scales):
        raise InexactError(
            f"{weight.where}: has scales that {form.name} cannot hold (f16, one for {GROUP} inputs). Choose a dense format, or round it "
            f"anew: convert to hf-dense-f32, then that with --quantization {weight.scheme}"
        )
    fine = np.repeat(np.broadcast_to(scales, (rows, scales.shape[1])), groups // scales.shape[1], axis=1)
    return from_codes(weight.name, weight.shape, weight.scheme, weight.where, codes, fine)


def _merged(scales: F32, block: int, inputs: int) -> tuple[F32, bool]:
    """(scales of whole blocks, or of finer groups that blocks divide; whether they are still the same)."""
    if scales.shape == (1, 1):
        return scales, True
    if block == 0:
        return simplest(scales)[:1, :1], simplest(scales).size == 1
    group = inputs // scales.shape[1]
    if scales.shape[1] == 1 or group % block == 0:
        return scales, True
    if block % group == 0:
        parts = scales.reshape(len(scales), inputs // block, block // group)
        return np.ascontiguousarray(parts[:, :, 0]), bool((parts == parts[:, :, :1]).all())
    return scales, False


def _without_idle(weight: Weight, scales: F32) -> F32:
    """Scales of 0 replaced by the largest of their row (else of the tensor) where all codes they stand for are 0."""
    assert weight.codes is not None
    out = np.broadcast_to(scales, (weight.shape[0], scales.shape[1])).copy()
    for first, last in weight.spans():
        idle = (weight.codes(first, last).reshape(last - first, scales.shape[1], -1) == 0).all(axis=2) & (out[first:last] == 0)
        rows = np.broadcast_to(out[first:last].max(axis=1, keepdims=True), idle.shape)
        out[first:last] = np.where(idle, np.where(rows > 0, rows, scales.max()), out[first:last])
    return simplest(out)


def holds(scales: F32, form: Format, beside: bool) -> bool:
    """Whether the format has these very numbers."""
    return bool(np.array_equal(stored_scales(scales, form), scales)) or (beside and scales.size == 1)


def stored_scales(scales: F32, form: Format) -> F32:
    """The scales that are read back when these are written into their places."""
    return rounded(scales, "reciprocal" if form.weights == "bitlinear" else form.scale)


def _requantized(weight: Weight, scales: F32, form: Format, block: int) -> tuple[Weight, Loss]:
    """The same trits, and the scales of least squared error that the format holds: the mean over the weights that are not 0."""
    assert weight.codes is not None
    rows, inputs = weight.shape
    group = np.gcd(inputs // scales.shape[1], block) if block else inputs // scales.shape[1]  # over which old and new are both constant
    fine = np.repeat(np.broadcast_to(scales, (rows, scales.shape[1])), inputs // scales.shape[1] // group, axis=1).astype(np.float64)
    counts = np.zeros(fine.shape)
    for first, last in weight.spans():
        counts[first:last] = (weight.codes(first, last).reshape(last - first, fine.shape[1], -1) != 0).sum(axis=2)
    if block:
        part = (rows, inputs // block, block // int(group))
        new = _mean(fine.reshape(part), counts.reshape(part), 2)
    else:
        new = _mean(fine.reshape(1, 1, -1), counts.reshape(1, 1, -1), 2)
    stored = stored_scales(new.astype(np.float32), form)
    difference = np.repeat(stored, fine.shape[1] // stored.shape[1], axis=1) - fine
    loss = Loss(weight.name, float((counts * difference**2).sum()), float((counts * fine**2).sum()))
    return from_codes(weight.name, weight.shape, weight.scheme, weight.where, weight.codes, simplest(stored)), loss


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    total = weights.sum(axis=axis)
    return np.asarray(np.where(total > 0, (values * weights).sum(axis=axis) / np.maximum(total, 1), values.mean(axis=axis)))


def _extent(weight: Weight) -> str:
    return f"every {weight.group} inputs" if weight.group else "every row"


def _example(scales: F32, form: Format) -> str:
    off = stored_scales(scales, form) != scales
    return f"{scales[off][0]:.9g} would become {stored_scales(scales, form)[off][0]:.9g}"


def _vector(weight: Weight, form: Format, dtypes: Sequence[str]) -> tuple[Weight, Loss | None]:
    """Norms and biases, of which GGUF has float32 and the others the first dtype that is exact."""
    if form.container == "gguf":
        return replace(weight, scheme="f32", stored=None), None
    order = (form.weights, *dtypes) if form.dense else tuple(dtypes)
    return _dense(weight, (*order, "f32"), False)


def _table(weight: Weight, form: Format, dtypes: Sequence[str], beside: bool) -> tuple[Weight, Loss | None]:
    """An embedding or head of plain numbers: packed where they are three values, as another format that cannot pack it left them."""
    if form.container in ("gguf", "mlx") and not form.integer and form.weights != "i2_s":
        with suppress(InexactError, UsageError, UnsupportedModelError):
            return _packed(three_valued(weight), form, False, beside)
    return _as_stored(weight, form, dtypes)


def _as_stored(weight: Weight, form: Format, dtypes: Sequence[str]) -> tuple[Weight, Loss | None]:
    """A dense matrix among packed ones: GGUF takes any type as it is, safetensors plain numbers."""
    if weight.scheme in ("f32", "f16", "bf16") or (form.container == "gguf" and weight.scheme != "f64"):
        return weight, None
    return _dense(weight, (*dtypes, "f32"), False)


def _dense(weight: Weight, dtypes: Sequence[str], requantize: bool) -> tuple[Weight, Loss | None]:
    """In the first of `dtypes` that is exact; of one only, with an error where that is allowed."""
    for dtype in dtypes:
        if dtype == weight.scheme or dtype == "f32":
            return replace(weight, scheme=dtype, codes=None, scales=None, stored=weight.stored if dtype == weight.scheme else None), None
        if weight.scales is not None and weight.scheme in ("ternary", "binary"):  # -s, 0 and s, and with a code of 3 twice s
            exact = np.array_equal(rounded(weight.scales, dtype), weight.scales)
        else:
            exact = all(np.array_equal(rounded(v, dtype), v) for v in (weight.values(a, b) for a, b in weight.spans()))
        if exact:
            return replace(weight, scheme=dtype, codes=None, scales=None, stored=None), None
    dtype, error, total, most = dtypes[-1], 0.0, 0.0, 0.0
    for first, last in weight.spans():
        values = weight.values(first, last)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            off = rounded(values, dtype).astype(np.float64) - values
        if not np.isfinite(off).all():
            raise UnsupportedModelError(
                f"{weight.where}: holds values that {dtype} cannot ({np.abs(values).max():g}); expected a scheme that can"
            )
        error, total, most = (
            error + float((off**2).sum()),
            total + float((values.astype(np.float64) ** 2).sum()),
            max(most, np.abs(off).max()),
        )
    if not requantize:
        raise InexactError(
            f"{weight.where}: is {weight.scheme}, which {dtype} does not hold exactly (off by up to {most:.1e}). Choose a format that does"
            " (hf-dense-f32 always does), or accept the error with --allow-requantize"
        )
    old = weight.values
    return replace(weight, scheme=dtype, codes=None, scales=None, stored=None, values=lambda a, b: rounded(old(a, b), dtype)), Loss(
        weight.name, error, total
    )


def three_valued(weight: Weight) -> Weight:
    """Dense weights that are ternary all the same: -s, 0 and s over the tensor, a row, or a group of 256, 128 or 64 of its inputs.

    Raises InexactError for others.
    """
    rows, inputs = weight.shape
    finest = 64 if inputs % 64 == 0 else inputs
    scales = np.empty((rows, inputs // finest), np.float32)
    for first, last in weight.spans():
        parts = np.abs(weight.values(first, last)).reshape(last - first, -1, finest)
        scales[first:last] = parts.max(axis=2)
        other = (parts != 0) & (parts != scales[first:last, :, None])
        if other.any() or not np.isfinite(scales[first:last]).all():
            row, group, _ = np.argwhere(other)[0] if other.any() else (0, 0, 0)
            found = np.unique(parts[row, group])
            raise InexactError(
                f"{weight.where}: is {weight.scheme} and not ternary ({len(found)} magnitudes in {finest} inputs of row {first + row}). "
                "To make it ternary add --quantization ternary; to keep it, choose a dense format, such as hf-dense-f16 or gguf-f16"
            )
    filled = _filled(scales)
    for group in (g for g in _MIXED if g > finest and inputs % g == 0 and filled.shape[1] > 1):
        parts = scales.reshape(rows, inputs // group, group // finest)
        most = parts.max(axis=2)
        if ((parts == 0) | (parts == most[:, :, None])).all():
            filled = _filled(most)
            break

    def codes(first: int, last: int) -> NDArray[np.int8]:
        return np.sign(weight.values(first, last)).astype(np.int8)

    return from_codes(weight.name, weight.shape, "ternary", weight.where, codes, filled)


def shared(weight: Weight) -> int:
    """Inputs that share a scale in a weight of three values, of a dense one by its first rows; 0 where a row does, and of others."""
    if weight.scheme in INTEGERS:
        return 0
    try:
        found = weight if weight.codes is not None else three_valued(replace(weight, shape=(min(16, weight.shape[0]), weight.shape[1])))
    except InexactError:
        return 0
    return found.group


def _filled(scales: F32) -> F32:
    """Scales, with those of groups of zeros (0) replaced so that as few as possible differ."""
    most = scales.max()
    if ((scales == 0) | (scales == most)).all():
        return np.full((1, 1), most if most > 0 else 1, np.float32)
    rows = scales.max(axis=1, keepdims=True)
    if ((scales == 0) | (scales == rows)).all():
        return np.asarray(np.where(rows > 0, rows, most), np.float32)
    return np.asarray(np.where(scales > 0, scales, np.where(rows > 0, rows, most)), np.float32)
