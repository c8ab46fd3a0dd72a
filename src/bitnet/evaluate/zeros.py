"""What of a model could be skipped because it is zero: gates and inputs of down_proj while it reads a text, and its ternary weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet.models import LINEARS, Checkpoint, canonical
from bitnet.weights import load_engine
from bitnet.zero_skip import zero_shares

TILES = ((4, 4), (16, 4), (16, 16), (32, 32))  # rows x inputs
MOST_TOKENS = 512


@dataclass(frozen=True)
class LayerZeros:
    """Of one layer, over a text."""

    layer: int
    gates: float  # share whose activation is exactly zero: rows of up_proj that need not be read
    inputs: float  # of down_proj, as it reads them (int8 where its weights are integers): columns that need not be read


@dataclass(frozen=True)
class WeightZeros:
    """Of all ternary matrices of one kind ("q", "up", ...); each a share."""

    part: str
    weights: float
    tiles: dict[str, float]  # "16x4" -> of whole tiles that are zero
    rows: float
    columns: float


def activation_zeros(checkpoint: Checkpoint, ids: Sequence[int], threads: int | None = None) -> list[LayerZeros]:
    """Counted over the first tokens of `ids` that the context holds, at most MOST_TOKENS."""
    engine = load_engine(checkpoint, threads=threads)
    shares = zero_shares(engine, list(ids[: min(MOST_TOKENS, engine.config.max_context)]))
    return [LayerZeros(layer, gates, inputs) for layer, (gates, inputs) in enumerate(shares)]


def weight_zeros(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> list[WeightZeros]:
    """Empty for a model without packed ternary weights."""
    names = canonical(checkpoint).names
    found: dict[str, list[NDArray[np.float64]]] = {}
    for done, (ours, theirs) in enumerate(names.items()):
        tensor, part = checkpoint.tensors[theirs], ours.rpartition(".")[2]
        if part in LINEARS and tensor.scheme == "ternary":
            found.setdefault(part, []).append(_counts(tensor.trits() != 0))
        if progress:
            progress(done + 1, len(names))
    out = []
    for part, counts in found.items():
        shares = [float(zero / of) if of else 0.0 for zero, of in np.sum(counts, axis=0)]
        tiles = {f"{rows}x{inputs}": share for (rows, inputs), share in zip(TILES, shares[3:], strict=True)}
        out.append(WeightZeros(part, shares[0], tiles, shares[1], shares[2]))
    return out


def _counts(used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[zero, of how many] of weights, rows, columns and each of TILES; used: bool [rows, inputs]."""
    rows, columns = used.any(1), used.any(0)
    pairs = [((~each).sum(), each.size) for each in (used, rows, columns)]
    for height, width in TILES:
        whole = used[: used.shape[0] // height * height, : used.shape[1] // width * width]
        tiles = whole.reshape(whole.shape[0] // height, height, -1, width).any((1, 3))
        pairs.append(((~tiles).sum(), tiles.size))
    return np.array(pairs, np.float64)
