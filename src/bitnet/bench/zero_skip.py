"""What skipping zeros brings: decoding with it and without, in turns, beside what the bytes that are not read predict.

A shape's random gates are zero as often as asked: a bias shifts each layer's gates until that share of their activations is zero. What
decides at run time are the computed gates, as in a model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from bitnet.bench.speed import TOKEN_SEED, prefill
from bitnet.errors import UsageError
from bitnet.zero_skip import zero_shares

if TYPE_CHECKING:
    from bitnet.engine import Engine, Sequence

SHIFTED_TOKENS = 64  # on which a shift is found
_HALVINGS = 14  # of a shift between -16 and 16, which is wider than any random gate


@dataclass(frozen=True)
class Skipping:
    """Medians of repetitions that take turns; shares are of both halves of up_proj and down_proj that decoding reads."""

    gate_zeros: float  # share of the gates whose activation is exactly zero
    input_zeros: float  # of down_proj's inputs that are zero as int8
    up_rows_read: float
    down_columns_read: float
    saved_bytes: float  # a step
    dense_tok_s: float
    skip_tok_s: float
    same_bits: bool  # of the last logits of both

    @property
    def speedup(self) -> float:
        return self.skip_tok_s / self.dense_tok_s

    def predicted(self, weight_bytes: int) -> float:
        """The speedup if time were bytes."""
        return weight_bytes / (weight_bytes - self.saved_bytes)

    def share_of_gain(self, weight_bytes: int) -> float:
        """How much of the time that the saved bytes take was saved."""
        saved = 1 - 1 / self.speedup
        return saved / (self.saved_bytes / weight_bytes) if self.saved_bytes else 0.0


def random_ids(engine: Engine) -> list[int]:
    """As many tokens as a shift is found on."""
    ids: list[int] = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=SHIFTED_TOKENS).tolist()
    return ids


def shift_gates(engine: Engine, zeros: float) -> None:
    """Biases of each layer's gate by which this share of its activations is zero. Raises `UsageError` for a share that none has."""
    if not 0 < zeros < 1:
        raise UsageError(f"gate-zeros is {zeros}; expected a share between 0 and 1")
    if engine.config.activation != "relu2":
        raise UsageError(
            f"gate-zeros is for shapes with relu^2 feed-forwards, such as bitnet-2b-4t; this one has {engine.config.activation}"
        )
    config = engine.config
    ids = random_ids(engine)
    low, high = np.full(config.n_layers, -16.0), np.full(config.n_layers, 16.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        for layer, shift in enumerate(middle):
            engine.set_gate_bias(layer, np.full(config.ffn_size, shift, np.float32))
        found = np.array([gates for gates, _ in zero_shares(engine, ids)])
        low, high = np.where(found < zeros, low, middle), np.where(found < zeros, middle, high)


def measure_skipping(engine: Engine, *, new_tokens: int, depth: int = 0, batch: int = 1, repetitions: int) -> Skipping:
    """Reads the same random tokens both ways, one by one, in turns; leaves the engine as it was. Raises `UsageError` where it cannot."""
    before = engine.zero_skip
    ids = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=(batch, depth + new_tokens))
    sequences = [engine.sequence() for _ in range(batch)]
    prefill(engine, sequences, ids[:, :depth])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    logits: dict[bool, np.ndarray] = {}
    lines = (0, 0, 0, 0)
    try:
        for _ in range(repetitions):
            for on in (False, True):
                engine.zero_skip = on
                _read(engine, sequences, ids[:, depth : depth + 1], depth)  # not counted: what was laid anew is touched
                engine.reset_profile()
                taken, logits[on] = _read(engine, sequences, ids[:, depth:], depth)
                seconds[on].append(taken)
                lines = engine.lines() if on else lines
        shares = zero_shares(engine, ids[0, depth:].tolist())
    finally:
        engine.zero_skip = before
    up, down = _read_shares(lines)
    gates, inputs = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    rates = {on: batch * new_tokens / median(taken) for on, taken in seconds.items()}
    return Skipping(gates, inputs, up, down, _saved(engine, lines), rates[False], rates[True], np.array_equal(logits[False], logits[True]))


def unread_bytes(engine: Engine) -> float:
    """Of weights, that a step of the passes since `reset_profile` did not read."""
    return _saved(engine, engine.lines()) if engine.zero_skip else 0.0


def _read_shares(lines: tuple[int, int, int, int]) -> tuple[float, float]:
    rows, rows_read, columns, columns_read = lines
    return (rows_read / rows, columns_read / columns) if rows and columns else (1.0, 1.0)


def _saved(engine: Engine, lines: tuple[int, int, int, int]) -> float:
    return engine.skippable_bytes / 2 * (2 - sum(_read_shares(lines)))


def _read(engine: Engine, sequences: list[Sequence], ids: np.ndarray, depth: int) -> tuple[float, np.ndarray]:
    """(seconds for the tokens `ids`, int [batch, steps], after `depth` others, one of each sequence at a time; the last logits)."""
    for sequence in sequences:
        sequence.truncate(depth)
    start = time.perf_counter()
    for step in ids.T:
        logits = engine.forward([(sequence, [int(token)]) for sequence, token in zip(sequences, step, strict=True)])
    return time.perf_counter() - start, logits
