"""What decodes a model fastest on this machine: codec and head on every core, then the number of threads for the best of them.

A head that is not the stored one changes results, so it is only a candidate if it agrees with the stored one on at least
LEAST_AGREEMENT of the likeliest tokens of a short built-in text. Each candidate decodes greedily from an empty context.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet.engine import CODECS
from bitnet.evaluate.accuracy import HeadCost, head_cost
from bitnet.machine import usable_cores
from bitnet.tuning import Choice
from bitnet.weights import HEADS, load_engine

if TYPE_CHECKING:
    from bitnet.engine import Engine
    from bitnet.models import Checkpoint

LEAST_AGREEMENT = 0.99
RULE = f"the fastest decoding whose head agrees with the stored one on at least {LEAST_AGREEMENT:.0%} of the likeliest tokens"
TOKENS = 16  # decoded at a time
MEASURE_S = 1.0  # of each candidate, at least MIN_RUNS runs of TOKENS
MIN_RUNS = 3


@dataclass(frozen=True)
class Candidate:
    """One way to run the model, measured."""

    choice: Choice
    allowed: bool  # by its head's agreement


def candidates(checkpoint: Checkpoint, ids: list[int], progress: Callable[[int, int], None] | None = None) -> list[Candidate]:
    """All that were measured. `ids`: a text's tokens, to compare the heads on."""
    cores = usable_cores()
    counts = [count for count in thread_counts(cores) if count != cores]
    stored = load_engine(checkpoint, threads=cores)
    codecs = ["t2"] if stored.activation_group else list(CODECS)  # base-3 has no groups of activations
    codecs = codecs if stored.codec in CODECS else ["auto"]
    total, found = len(codecs) * len(HEADS) + len(counts), []

    def add(codec: str, head: str, threads: int, cost: HeadCost | None = None) -> HeadCost:
        engine = load_engine(checkpoint, threads=threads, head=head, codec=codec)
        cost = cost or head_cost(stored, engine, ids)
        choice = Choice(codec, head, threads, decode_rate(engine), cost.top1_agreement, cost.kl_nats)
        found.append(Candidate(choice, cost.top1_agreement >= LEAST_AGREEMENT))
        if progress:
            progress(len(found), total)
        return cost

    costs = {head: add(codecs[0], head, cores) for head in HEADS}
    for codec in codecs[1:]:
        for head in HEADS:
            add(codec, head, cores, costs[head])
    best = fastest(found)
    for count in counts:
        add(best.codec, best.head, count, costs[best.head])
    return found


def fastest(found: list[Candidate]) -> Choice:
    """The choice that RULE makes. The stored head is always allowed."""
    return max((candidate.choice for candidate in found if candidate.allowed), key=lambda choice: choice.decode_tok_s)


def thread_counts(cores: int) -> list[int]:
    """1 to `cores`; of many cores the powers of two and all."""
    return [count for count in range(1, cores + 1) if cores <= 8 or count == cores or count & (count - 1) == 0]


def decode_rate(engine: Engine) -> float:
    """Tokens/s of greedy decoding from an empty context: of the fastest run, for what else runs on the machine can only slow one."""
    sequence = engine.sequence()
    steps = min(TOKENS, engine.config.max_context)
    seconds: list[float] = []
    while len(seconds) < MIN_RUNS or sum(seconds) < MEASURE_S:
        sequence.truncate(0)
        token, start = 0, time.perf_counter()
        for _ in range(steps):
            token = int(engine.forward([(sequence, [token])])[0].argmax())
        seconds.append(time.perf_counter() - start)
    return steps / min(seconds)
