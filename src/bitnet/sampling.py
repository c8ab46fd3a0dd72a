"""From logits to the next token.

Order: repetition penalty (CTRL, arXiv:1909.05858, section 4.1), temperature, top-k, top-p (nucleus, arXiv:1904.09751), min-p
(arXiv:2407.01082), then one draw from what is left. Temperature 0 takes the largest logit. Everything is float64 and ties go to the
smaller id, so that the same logits and seed give the same token for any number of threads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError, UsageError

F64 = NDArray[np.float64]
FIRST_CANDIDATES = 256  # sorted at first; the nucleus is rarely wider, and sorting 128,000 logits costs 10 ms


@dataclass(frozen=True)
class Sampling:
    """How to choose. Raises `UsageError` for a value outside its range."""

    temperature: float = 0.8  # >= 0; 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 0.95  # in (0, 1]; 1: off
    min_p: float = 0.0  # in [0, 1], of the largest probability; 0: off
    repetition_penalty: float = 1.0  # > 0; 1: off
    seed: int | None = None  # None: fresh entropy

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "a number >= 0 (0 is greedy)")
        _check("top_k", self.top_k, _integer(self.top_k) >= 0, "an integer >= 0 (0 is off)")
        _check("top_p", self.top_p, 0 < _number(self.top_p) <= 1, "a number above 0, at most 1 (1 is off)")
        _check("min_p", self.min_p, 0 <= _number(self.min_p) <= 1, "a number from 0 to 1 (0 is off)")
        penalty = _number(self.repetition_penalty)
        _check("repetition_penalty", self.repetition_penalty, 1e-6 <= penalty <= 1e6, "a number from 1e-6 to 1e6 (1 is off)")
        _check("seed", self.seed, self.seed is None or _integer(self.seed) >= 0, "an integer >= 0, or none for a fresh one")


class Sampler:
    """Picks tokens by a `Sampling`; owns the state of its random generator (PCG64), one draw a token."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def pick(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token's id. `logits` float32 [vocab]; `history`: ids of prompt and output so far, for the penalty.

        Raises `BitNetError` if a logit is not finite.
        """
        s = self.sampling
        if s.temperature == 0 and s.repetition_penalty == 1:
            return _greatest(logits)  # of float32: widening changes no order
        z = penalize(np.asarray(logits, dtype=np.float64), history, s.repetition_penalty)
        best = _greatest(z)
        if s.temperature == 0:
            return best
        with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) is the right 0
            weights = np.exp((z - z[best]) / s.temperature)  # unnormalized probabilities; the largest is 1
        order, draw = self._candidates(z, weights)
        mass = np.cumsum(weights[order])
        return int(order[min(int(np.searchsorted(mass, draw * mass[-1], side="right")), len(order) - 1)])

    def _candidates(self, z: F64, weights: F64) -> tuple[NDArray[np.intp], float]:
        """Ids left by top-k, top-p and min-p, by falling logit if any is on, and one uniform draw in [0, 1)."""
        s = self.sampling
        draw = self._random.random()
        limit = min(s.top_k or len(z), len(z))
        if limit == len(z) and s.top_p == 1 and s.min_p == 0:
            return np.arange(len(z)), draw
        whole = limit == len(z)
        total = float(weights.sum()) if whole else float(weights[largest(z, limit)].sum())
        width = min(FIRST_CANDIDATES, limit)
        while True:
            order = largest(z, width)
            mass = np.cumsum(weights[order])
            if width == limit or mass[-1] >= s.top_p * total or weights[order[-1]] < s.min_p:
                break
            width = min(width * 8, limit)
        if s.top_p < 1:
            order = order[: int(np.searchsorted(mass, s.top_p * total, side="left")) + 1]
        return order[weights[order] >= s.min_p], draw


def _greatest(logits: NDArray[np.floating[Any]]) -> int:
    """The id of the largest logit, the smallest of equals. Raises `BitNetError` if a logit is not finite."""
    best = int(logits.argmax())  # a NaN, if there is one
    if not (math.isfinite(logits[best]) and math.isfinite(np.minimum.reduce(logits))):
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise BitNetError(
            f"the model gave a logit that is not finite ({logits[bad]} for token {bad}); the weights are damaged or do not fit this model"
        )
    return best


def penalize(logits: F64, history: Sequence[int], penalty: float) -> F64:
    """Logits of tokens in `history` divided by `penalty` where positive, multiplied where negative; a copy if anything changes."""
    if penalty == 1 or len(history) == 0:
        return logits
    logits = logits.copy()
    seen = np.unique(np.asarray(history, dtype=np.intp))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def largest(logits: F64, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, falling, equal ones by rising id."""
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= threshold)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}; expected {expected}")


def _number(value: Any) -> float:
    """`value` as a float, NaN (outside every range) if it is none."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _integer(value: Any) -> int:
    """`value` as an int, -1 (outside every range) if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1
