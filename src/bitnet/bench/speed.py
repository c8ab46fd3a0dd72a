"""Speed of prompt processing and of decoding, as medians over repetitions, and the memory bandwidth they are judged by.

Decoding one token reads every weight once, so tokens/s x bytes of weights per token is a read bandwidth, and what plain reading reaches
in the same run is its limit. Prompts are random token ids (the work does not depend on them); decoding is greedy; nothing is tokenized.
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
    from bitnet.engine import Engine, Sequence
    from bitnet.models import ModelConfig

ROOFLINE_BYTES = 2 << 30  # far above any cache
ROOFLINE_REPETITIONS = 5
PROMPT_SEED = 0


@dataclass(frozen=True)
class Speed:
    """Medians; token rates count all sequences of the batch."""

    prefill_tok_s: float
    decode_tok_s: float
    time_to_first_token_s: float  # of the whole batch's prompts
    token_ids: list[int]  # decoded for the first sequence


def measure(
    engine: Engine, *, prompt_tokens: int, new_tokens: int, batch: int, repetitions: int, progress: Callable[[int, int], None] | None = None
) -> Speed:
    """Runs `repetitions` times: a prompt of `prompt_tokens` for each of `batch` sequences, then `new_tokens` greedy steps of the batch.

    Raises `UsageError` for counts below 1 and for more tokens than the context holds.
    """
    for name, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("batch", batch), ("repetitions", repetitions)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected a whole number >= 1")
    if prompt_tokens + new_tokens > engine.config.max_context:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are {prompt_tokens + new_tokens}; "
            f"the model's context holds {engine.config.max_context}"
        )
    prompts = np.random.default_rng(PROMPT_SEED).integers(engine.config.vocab_size, size=(batch, prompt_tokens))
    sequences = [engine.sequence() for _ in range(batch)]
    prefill_s, decode_s, ids = [], [], []
    for done in range(repetitions):
        for sequence in sequences:
            sequence.truncate(0)
        start = time.perf_counter()
        tokens = prefill(engine, sequences, prompts)
        prefill_s.append(time.perf_counter() - start)
        ids = [int(tokens[0])]
        start = time.perf_counter()
        for _ in range(new_tokens):
            tokens = engine.forward([(s, [int(t)]) for s, t in zip(sequences, tokens, strict=True)]).argmax(axis=1)
            ids.append(int(tokens[0]))
        decode_s.append(time.perf_counter() - start)
        if progress:
            progress(done + 1, repetitions)
    return Speed(batch * prompt_tokens / median(prefill_s), batch * new_tokens / median(decode_s), median(prefill_s), ids[:new_tokens])


def prefill(engine: Engine, sequences: list[Sequence], prompts: np.ndarray) -> np.ndarray:
    """Feeds `prompts` int [batch, tokens], sequence after sequence; the greedy next tokens, int [batch]."""
    last = []
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for at in range(0, len(prompt), PREFILL_CHUNK):
            logits = engine.forward([(sequence, prompt[at : at + PREFILL_CHUNK])])
        last.append(logits[0].argmax())
    return np.asarray(last)


def read_bandwidth(threads: int) -> float:
    """GB/s (1e9) at which `threads` threads read 2 GiB of memory: the median of several passes."""
    from bitnet import _native

    return float(_native.read_bandwidth(ROOFLINE_BYTES, threads, ROOFLINE_REPETITIONS))


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """Memory of f16 keys and values for `tokens` tokens."""
    return 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * tokens
