"""Speed of prompt processing and of decoding, as medians over repetitions, and the memory bandwidth they are judged by.

The two are measured apart, as llama-bench does (pp512, tg64): prompts from an empty context; decoding after `depth` tokens, none by
default. Decoding one token reads every weight once, and the keys and values of the tokens before it, so tokens/s x these bytes is a read
bandwidth, and what plain reading reaches in the same run is its limit. Tokens are random ids (the work does not depend on them), decoding
is greedy, nothing is tokenized.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from bitnet.errors import UsageError
from bitnet.generation import PREFILL_CHUNK

if TYPE_CHECKING:
    from bitnet.engine import Adapter, Engine, Sequence

ROOFLINE_BYTES = 2 << 30  # far above any cache
ROOFLINE_PASSES = 5
TOKEN_SEED = 0


@dataclass(frozen=True)
class Speed:
    """Medians; token rates count all sequences of the batch."""

    prefill_tok_s: float
    decode_tok_s: float
    time_to_first_token_s: float  # of the whole batch's prompts
    outside_matmul_share: float  # of the decoding time: attention, norms, the loop around them
    attention_ms: float  # of a decoding step
    token_ids: list[int]  # decoded for the first sequence


def measure(
    engine: Engine, *, prompt_tokens: int, new_tokens: int, depth: int = 0, batch: int = 1, repetitions: int,
    progress: Callable[[int, int], None] | None = None, around: Callable[[], object] = lambda: None,
) -> Speed:  # fmt: skip
    """Times `repetitions` prompts of `prompt_tokens` for each of `batch` sequences, then as often `new_tokens` steps after `depth` tokens.

    `around` is called right before the decodings and right after them. Raises `UsageError` for counts below 1 (`depth`: 0) and for more
    tokens than the context holds.
    """
    for name, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("batch", batch), ("repetitions", repetitions)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected a whole number >= 1")
    if depth < 0:
        raise UsageError(f"depth is {depth}; expected a whole number >= 0")
    context = engine.config.max_context
    if prompt_tokens > context:
        raise UsageError(f"{prompt_tokens} prompt tokens; the model's context holds {context}")
    if depth + new_tokens > context:
        raise UsageError(
            f"a depth of {depth} tokens and {new_tokens} new ones are {depth + new_tokens}; the model's context holds {context}"
        )
    ids = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=(batch, max(prompt_tokens, depth) + 1))
    sequences = [engine.sequence() for _ in range(batch)]
    prefill_s, decode_s = [], []
    decoded: list[int] = []
    for done in range(repetitions):
        prefill_s.append(prefill(engine, sequences, ids[:, :prompt_tokens]))
        if progress:
            progress(done + 1, 2 * repetitions)
    if depth > prompt_tokens:
        prefill(engine, sequences, ids[:, :depth])
    around()
    decode(engine, sequences, ids[:, depth], depth, new_tokens)  # not counted: what was in the caches comes back
    engine.reset_profile()
    for done in range(repetitions):
        seconds, decoded = decode(engine, sequences, ids[:, depth], depth, new_tokens)
        decode_s.append(seconds)
        if progress:
            progress(repetitions + done + 1, 2 * repetitions)
    profile = engine.profile()
    around()
    outside, attention_ms = 1 - profile["matmul_s"] / sum(decode_s), 1000 * profile["attention_s"] / (repetitions * new_tokens)
    return Speed(
        batch * prompt_tokens / median(prefill_s), batch * new_tokens / median(decode_s), median(prefill_s), outside, attention_ms, decoded
    )


def prefill(engine: Engine, sequences: list[Sequence], prompts: np.ndarray) -> float:
    """Seconds that the empty `sequences` take to read `prompts`, int [batch, tokens], one sequence after the other."""
    for sequence in sequences:
        sequence.truncate(0)
    start = time.perf_counter()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for at in range(0, len(prompt), PREFILL_CHUNK):
            engine.forward([(sequence, prompt[at : at + PREFILL_CHUNK])])
    return time.perf_counter() - start


def decode(engine: Engine, sequences: list[Sequence], first: np.ndarray, depth: int, new_tokens: int) -> tuple[float, list[int]]:
    """(seconds of `new_tokens` greedy steps after `depth` tokens, what the first sequence got). `first`: int [batch], where they begin."""
    for sequence in sequences:
        sequence.truncate(depth)
    steps = [[int(token)] for token in first]
    decoded = []
    start = time.perf_counter()
    for _ in range(new_tokens):
        best = engine.forward(list(zip(sequences, steps, strict=True))).argmax(axis=1)
        steps = [[int(token)] for token in best]
        decoded.append(steps[0][0])
    return time.perf_counter() - start, decoded


def measure_adapter(
    engine: Engine, adapter: Adapter, *, new_tokens: int, depth: int = 0, batch: int = 1, repetitions: int
) -> tuple[float, float]:
    """Decoded tokens/s of the model alone and with an adapter in every sequence: medians of repetitions that take turns."""
    ids = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=(batch, depth + 1))
    turns = [[engine.sequence(which) for _ in range(batch)] for which in (None, adapter)]
    for sequences in turns:
        prefill(engine, sequences, ids[:, :depth])
        decode(engine, sequences, ids[:, depth], depth, new_tokens)  # not counted: memory is touched for the first time
    seconds = [[decode(engine, sequences, ids[:, depth], depth, new_tokens)[0] for sequences in turns] for _ in range(repetitions)]
    alone, adapted = (batch * new_tokens / median(column) for column in zip(*seconds, strict=True))
    return alone, adapted


def read_bandwidths(threads: int) -> list[float]:
    """GB/s (1e9) at which `threads` threads read 2 GiB of memory, in each of several passes."""
    from bitnet import _native

    return list(_native.read_bandwidths(ROOFLINE_BYTES, threads, ROOFLINE_PASSES))


def kv_bytes_per_token(engine: Engine, depth: int, new_tokens: int) -> float:
    """Bytes of keys and values that decoding one token reads, its own included: the mean over `new_tokens` after `depth`."""
    config = engine.config
    lengths = range(depth + 1, depth + new_tokens + 1)
    windowed = sum(config.windowed or ())
    whole, within = sum(lengths), sum(min(length, config.sliding_window) for length in lengths)
    layer = engine.kv_bytes_per_token / config.n_layers
    return layer * ((config.n_layers - windowed) * whole + windowed * within) / new_tokens
