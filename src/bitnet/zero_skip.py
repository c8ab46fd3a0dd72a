"""Whether a model skips zeros: the rows of up_proj and columns of down_proj that meet one are then never read, with the same bits.

It pays where relu^2 leaves most gates at zero and the feed-forward is large enough to wait for memory. "auto" counts the zeros of a short
text, then times a few tokens both ways on this machine, and says what it found (docs/zero-skip.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.engine import Engine

TEXT = "Once upon a time there was a small town by the sea. Every morning the boats went out, and every evening they came home with fish."
COUNTED_TOKENS = 32  # of the text, whose zeros are counted
TIMED_TOKENS = 5  # decoded each way
LEAST_BYTES = 8 << 20  # of up_proj and down_proj together: less is read from the cache, where nothing is saved
LEAST_ZEROS = 0.6  # of the gates: below, scattered reads lose what they save
LEAST_GAIN = 1.02  # of the time for a token


@dataclass(frozen=True)
class ZeroSkip:
    """What was decided. Shares and times are None where nothing was measured."""

    on: bool
    why: str  # in words
    gate_zeros: float | None = None  # share of the gates whose activation is exactly zero
    input_zeros: float | None = None  # share of down_proj's inputs that are, rounded to int8
    dense_ms: float | None = None  # for a token
    skip_ms: float | None = None

    def text(self) -> str:
        """One line."""
        return f"{'on' if self.on else 'off'}: {self.why}"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def decide(engine: Engine, wanted: bool | str, ids: ListLike[int]) -> ZeroSkip:
    """Turns skipping on or off as `wanted` says (True, False, "auto"). `ids`: tokens of a text whose zeros "auto" counts."""
    if wanted is False:
        return _set(engine, ZeroSkip(False, "as asked"))
    if not engine.can_skip_zeros:
        return ZeroSkip(False, "no relu^2 feed-forward with ternary weights, one scale a row and one step per token")
    if wanted is True:
        return _set(engine, ZeroSkip(True, "as asked"))
    config = engine.config
    size = engine.skippable_bytes
    if size < LEAST_BYTES:
        return _set(engine, ZeroSkip(False, f"{size / 1e6:.1f} MB of feed-forward weights stay in the cache"))
    counted = min(COUNTED_TOKENS, config.max_context - TIMED_TOKENS)
    if counted < 1:
        return _set(engine, ZeroSkip(False, f"a context of {config.max_context} tokens leaves nothing to measure"))
    ids = [int(token) for token in ids][:counted] or [0]
    engine.zero_skip = False
    gates, inputs = (sum(column) / config.n_layers for column in zip(*zero_shares(engine, ids), strict=True))
    if gates < LEAST_ZEROS:
        return ZeroSkip(False, f"{gates:.0%} of the gates are zero; it takes {LEAST_ZEROS:.0%}", gates, inputs)
    dense_ms = _token_ms(engine, ids)
    engine.zero_skip = True
    skip_ms = _token_ms(engine, ids)
    found = f"{gates:.0%} of the gates and {inputs:.0%} of down_proj's inputs are zero; {skip_ms:.2f} ms a token, {dense_ms:.2f} without"
    return _set(engine, ZeroSkip(dense_ms >= LEAST_GAIN * skip_ms, found, gates, inputs, dense_ms, skip_ms))


def zero_shares(engine: Engine, ids: ListLike[int]) -> list[tuple[float, float]]:
    """For each layer, over these tokens: the share of gates whose activation is exactly zero, and of down_proj's inputs."""
    engine.count_zeros(True)
    try:
        engine.forward([(engine.sequence(), ids)])
        return [(gates / values, inputs / values) for gates, inputs, values in engine.zeros()]
    finally:
        engine.count_zeros(False)


def _set(engine: Engine, found: ZeroSkip) -> ZeroSkip:
    if engine.can_skip_zeros:
        engine.zero_skip = found.on
    return found


def _token_ms(engine: Engine, ids: ListLike[int]) -> float:
    sequence = engine.sequence()
    engine.forward([(sequence, ids)])
    times = []
    for i in range(TIMED_TOKENS):
        start = time.perf_counter()
        engine.forward([(sequence, [ids[i % len(ids)]])])
        times.append(time.perf_counter() - start)
    return 1000 * median(times)
