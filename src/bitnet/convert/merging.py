"""One low-rank adapter merged into the weights, when it is asked for, and what of it remains.

Merging adds scale * B A to the weights. A ternary matrix returns to its own grid: T = clip(round(W / s), -1, 1) with the scales s that it
has. So a change of less than s / 2 leaves no trace there, which is why it is measured: of the delta D and the change R that remains,
<R, D> / |D|^2 is what survived (1: all, 0: nothing), |R - D| / |D| the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.quantize import rounded
from bitnet.convert.source import F32, I8, Model, Weight, from_codes
from bitnet.errors import UnsupportedModelError
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import read_adapter

_DENSE = ("f32", "f64", "f16", "bf16")


@dataclass(frozen=True)
class Merged:
    """What of a delta D = scale * B A has remained in one matrix, as the change R."""

    name: str
    delta: float  # |D|^2
    along: float  # <R, D>
    error: float  # |R - D|^2
    changed: int  # trits that are others
    trits: int  # weights that are ternary before and after

    @property
    def survived(self) -> float:
        return self.along / self.delta if self.delta else 1.0

    @property
    def trits_changed(self) -> float | None:
        return self.changed / self.trits if self.trits else None


def together(parts: list[Merged], name: str) -> Merged:
    """The sum over several matrices."""
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("delta", "along", "error", "changed", "trits")}
    return Merged(name, **sums)


def merged(model: Model, path: Path) -> tuple[Model, dict[str, LowRank]]:
    """The model with the adapter's deltas in its weights, each matrix stored as it was; and the deltas."""
    parts = read_adapter(path, model.config).parts
    return replace(model, weights={name: _merged(w, parts[name]) if name in parts else w for name, w in model.weights.items()}), parts


def _merged(weight: Weight, low: LowRank) -> Weight:
    def values(first: int, last: int) -> F32:
        return np.asarray(weight.values(first, last) + delta(low, first, last), np.float32)

    if weight.codes is None and weight.scheme in _DENSE:
        stored = weight.scheme if weight.scheme in ("f16", "bf16") else "f32"
        return replace(weight, scheme=stored, values=lambda a, b: rounded(values(a, b), stored), stored=None)
    if weight.scheme != "ternary" or weight.scales is None:
        raise UnsupportedModelError(
            f"{weight.where}: is {weight.scheme}; an adapter is merged into ternary or plain weights only, and runs unmerged beside others"
        )
    scales, before = weight.scales, weight.codes
    assert before is not None
    if any((before(first, last) > 1).any() for first, last in weight.spans()):
        raise UnsupportedModelError(
            f"{weight.where}: holds codes of 3, which stand for +2 scales, and merging keeps -1, 0 and +1 only; run the adapter unmerged"
        )

    def codes(first: int, last: int) -> I8:
        here = (scales if len(scales) == 1 else scales[first:last])[:, :, None]
        grouped = values(first, last).reshape(last - first, scales.shape[1], -1)
        steps = np.divide(grouped, here, out=np.zeros_like(grouped), where=here != 0)
        return np.asarray(np.clip(np.rint(steps), -1, 1).astype(np.int8).reshape(last - first, -1))

    return from_codes(weight.name, weight.shape, "ternary", weight.where, codes, scales)


def delta(low: LowRank, first: int, last: int) -> F32:
    """scale * B A of these rows, summed in the order of the rank: the same bits however the rows are cut."""
    a, b = low.dense()
    total = np.zeros((last - first, a.shape[1]), np.float32)
    for r in range(low.rank):
        total += b[first:last, r, None] * a[r]
    return total * np.float32(low.scale)


def survival(before: Mapping[str, Weight], after: Mapping[str, Weight], parts: Mapping[str, LowRank]) -> list[Merged]:
    """Matrix by matrix. `before`: the weights as they would be written without the adapter."""
    found = []
    for name, low in parts.items():
        one, other = before[name], after[name]
        sums, changed, trits = np.zeros(3), 0, 0
        for first, last in one.spans():
            d = delta(low, first, last).astype(np.float64)
            r = other.values(first, last).astype(np.float64) - one.values(first, last)
            sums += np.array([(d * d).sum(), (r * d).sum(), ((r - d) ** 2).sum()])
            if one.codes is not None and other.codes is not None and one.scheme == other.scheme == "ternary":
                different = one.codes(first, last) != other.codes(first, last)
                changed, trits = changed + int(different.sum()), trits + different.size
        found.append(Merged(name, float(sums[0]), float(sums[1]), float(sums[2]), changed, trits))
    return found


def lines(parts: list[Merged]) -> list[str]:
    """A table for people: layer by layer, and in all."""
    layers: dict[str, list[Merged]] = {}
    for part in parts:
        layers.setdefault(part.name.rsplit(".", 1)[0], []).append(part)
    rows = [together(found, name) for name, found in layers.items()] + [together(parts, "in all")]
    head = f"{'merged':<12} {'delta kept':>10} {'error':>8} {'trits changed':>14}"
    return [head] + [f"{row.name:<12} {row.survived:>10.1%} {_error(row):>8.1%} {_share(row.trits_changed):>14}" for row in rows]


def record(parts: list[Merged]) -> list[dict[str, Any]]:
    """The same as plain values, matrix by matrix."""
    return [{"weight": p.name, "delta_kept": p.survived, "error": _error(p), "trits_changed": p.trits_changed} for p in parts]


def _share(of: float | None) -> str:
    return "-" if of is None else f"{of:.3%}"


def _error(part: Merged) -> float:
    return float(np.sqrt(part.error / part.delta)) if part.delta else 0.0
