"""What a quantized KV cache costs a model: every format against f16, on the same text, at several lengths of the context.

The text is cut into windows of one length, each beginning with BOS if the model wants one, and all are read teacher-forced:

    perplexity  over all positions
    kl          mean of sum over the vocabulary of p ln(p / q), p the probabilities with f16 keys and values, in nats
    top1        share of positions at which both think the same token the likeliest

The last two are also given for the second half of the windows' positions, which look back the farthest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitnet.errors import UsageError
from bitnet.evaluate.accuracy import CHUNK, compare, log_softmax
from bitnet.evaluate.perplexity import LARGEST_EXPONENT
from bitnet.kv import DEFAULT_GROUP, KvFormat
from bitnet.sample import center_keys

if TYPE_CHECKING:
    from bitnet.transformer import TernaryTransformer

LENGTHS = (512, 2048, 4096)  # tokens of a window
BITS = ((8, 8), (8, 4), (4, 4))  # of keys and values
TOKENS = 4096  # that are read at each length, at most, but always one window
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class KvLoss:
    """One format at one length."""

    length: int  # tokens of a window
    tokens: int  # predicted
    cache: str  # "f16", "8 bits", ...
    rotated: bool
    centered: bool
    bytes_per_token: int
    perplexity: float
    kl: float  # nats per token
    top1: float
    kl_second_half: float
    top1_second_half: float


def kv_losses(model: TernaryTransformer, text: str, *, group_size: int = DEFAULT_GROUP, progress: Progress | None = None) -> list[KvLoss]:
    """f16, 8 bits, K8V4 and 4 bits, each with and without rotation and center, at the lengths that the model's context and the text allow.

    Raises `UsageError` for a text shorter than the shortest window, and for a group that does not divide the model's heads.
    """
    from bitnet.transformer import DEFAULT_ADAPTER

    engine, bos, adapter = model.engine, model.tokenizer.prefix_ids, model.adapters.get(DEFAULT_ADAPTER)
    ids = model.tokenizer.encode(text)[len(bos) :]
    context = engine.config.max_context
    shortest = min(LENGTHS[0], context)
    if len(ids) + len(bos) < shortest:
        raise UsageError(f"the text has {len(ids)} tokens; expected at least {shortest - len(bos)}, one window")
    if context < 3:
        raise UsageError(f"a context of {context} tokens leaves nothing to compare")
    lengths = [n for n in LENGTHS if n <= context and n <= len(ids) + len(bos)] or [shortest]
    formats = [KvFormat(group_size=group_size)]
    formats += [KvFormat(k, v, group_size, rotate, center) for k, v in BITS for rotate in (True, False) for center in (True, False)]
    engine.sequence(kv=formats[1])  # refuses a group that does not fit, and devices without quantized caches
    center_keys(engine, model.tokenizer)
    windows = {n: _windows(ids, bos, n) for n in lengths}
    total, done = sum((n - 1) * len(found) for n, found in windows.items()), 0
    losses = []
    for n, found in windows.items():
        sums = np.zeros((len(formats), 2, 3))  # format, half of the window; -ln p(next), KL, agreement
        half = n // 2
        for window in found:
            sequences = [engine.sequence(adapter, kv) for kv in formats]
            for part, (first, end) in enumerate(((0, half), (half, n - 1))):
                for at in range(first, end, CHUNK):
                    inputs = window[at : min(at + CHUNK, end)]
                    targets = np.array(window[at + 1 : at + 1 + len(inputs)])
                    p = None
                    for row, sequence in enumerate(sequences):
                        q = log_softmax(engine.forward([(sequence, inputs)], all_logits=True))
                        p = q if p is None else p
                        sums[row, part] += compare(p, q, targets)
                    done += len(inputs)
                    if progress:
                        progress(done, total)
        tokens = len(found) * (n - 1)
        late = len(found) * (n - 1 - half)
        for kv, (early, later) in zip(formats, sums, strict=True):
            mean, last = (early + later) / tokens, later / late
            size = kv.bytes_per_token(engine.config.n_layers, engine.config.n_kv_heads, engine.config.head_dim)
            how = kv.quantized and kv.rotate, kv.quantized and kv.center
            found_of = float(mean[1]), float(mean[2]), float(last[1]), float(last[2])
            losses.append(KvLoss(n, tokens, kv.name, *how, size, math.exp(min(mean[0], LARGEST_EXPONENT)), *found_of))
    return losses


def _windows(ids: list[int], bos: list[int], length: int) -> list[list[int]]:
    """As many whole windows of `length` tokens as TOKENS allows and the text has."""
    width = length - len(bos)
    count = max(1, min(TOKENS // length, len(ids) // width))
    return [[*bos, *ids[at * width : (at + 1) * width]] for at in range(count)]


def left_out(losses: list[KvLoss], context: int) -> str:
    """Which of `LENGTHS` are not there, and why; empty if none."""
    missing = [n for n in LENGTHS if n not in {loss.length for loss in losses}]
    reasons = {
        "the text has fewer": [n for n in missing if n <= context],
        f"the model's context is {context:,}": [n for n in missing if n > context],
    }
    return "; ".join(f"no windows of {' and '.join(f'{n:,}' for n in which)} tokens: {why}" for why, which in reasons.items() if which)


def lines(losses: list[KvLoss]) -> list[str]:
    """The table."""
    found = ["tokens  cache    rotated  centered  bytes/token  perplexity  KL, nats  same top-1  second half: KL, top-1"]
    for loss in losses:
        rotated, centered = ("-" if loss.cache == "f16" else "yes" if done else "no" for done in (loss.rotated, loss.centered))
        found.append(
            f"{loss.length:>6}  {loss.cache:<7}  {rotated:<7}  {centered:<8}  {loss.bytes_per_token:>11,}  {loss.perplexity:>10.3f}  "
            f"{loss.kl:>8.5f}  {loss.top1:>10.2%}  {loss.kl_second_half:>15.5f}, {loss.top1_second_half:.2%}"
        )
    return found
