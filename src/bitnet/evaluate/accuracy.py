"""What integer arithmetic costs a model that was not trained with it: each way to run it, against its exact path.

The exact path has the file's weights in f16 (ternary ones exactly) and float32 activations. The others have the weights as they run by
default, or int8 where they would run dense, and int8 activations with one step per token, or one per group of inputs. All read the same
text, teacher-forced:

    kl     mean over positions of sum over the vocabulary of p ln(p / q), p the exact path's probabilities, in nats
    top1   share of positions at which both think the same token the likeliest

The cost of a quantized head is measured likewise, against the same model with its head as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet.engine import Engine
from bitnet.errors import UsageError
from bitnet.evaluate.perplexity import LARGEST_EXPONENT
from bitnet.models import Checkpoint, canonical
from bitnet.weights import load_engine

GROUPS = (0, 128, 64, 32)  # inputs that share a step; 0: one step per token
CHUNK = 32  # positions whose logits are held at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loss:
    """One way to run the model."""

    weights: str  # codec of the linear layers
    activations: str
    default: bool  # what `from_pretrained` runs
    weight_bytes_per_token: int
    perplexity: float
    kl: float  # nats per token
    top1: float


def losses(checkpoint: Checkpoint, ids: list[int], *, threads: int | None = None, progress: Progress | None = None) -> list[Loss]:
    """The exact path first, then int8 activations from coarse to fine. `ids`: a text's tokens, with BOS if the model wants one.

    Raises `UsageError` for a BitNet model, which runs as it was trained and has no other path, and for fewer than two tokens.
    """
    if canonical(checkpoint).quantization:
        raise UsageError("a BitNet model is trained with int8 activations per token and runs so: there is no other path to compare")
    if len(ids) < 2:
        raise UsageError("the text has fewer than two tokens; give a longer one")
    exact = load_engine(checkpoint, threads=threads, weights="f16")
    default = load_engine(checkpoint, threads=threads)
    default_group = default.activation_group
    ran_dense = default.codec == "dense"
    integer = default
    if ran_dense:
        integer = load_engine(checkpoint, threads=threads, weights="int8")
    elif default.codec == "b3":  # which has no groups of activations
        integer = load_engine(checkpoint, threads=threads, codec="t2")
    engines = [default if group == default_group and not ran_dense else integer for group in GROUPS]
    ids = ids[: exact.config.max_context]
    sums = np.zeros((1 + len(GROUPS), 3))  # of -ln p(next), KL, agreement
    sequences = [engine.sequence() for engine in (exact, *engines)]
    for at in range(0, len(ids) - 1, CHUNK):
        inputs = ids[at : min(at + CHUNK, len(ids) - 1)]
        targets = np.array(ids[at + 1 : at + 1 + len(inputs)])
        p = log_softmax(exact.forward([(sequences[0], inputs)], all_logits=True))
        sums[0] += compare(p, p, targets)
        for row, (group, engine) in enumerate(zip(GROUPS, engines, strict=True), 1):
            engine.activation_group = group
            sums[row] += compare(p, log_softmax(engine.forward([(sequences[row], inputs)], all_logits=True)), targets)
        if progress:
            progress(at + len(inputs), len(ids) - 1)
    means = sums / (len(ids) - 1)
    found = [_loss(exact, means[0], ran_dense)]
    for mean, group, engine in zip(means[1:], GROUPS, engines, strict=True):
        engine.activation_group = group
        found.append(_loss(engine, mean, engine is default and group == default_group))
    return found


@dataclass(frozen=True)
class HeadCost:
    """What a quantized head changes, against the stored one."""

    top1_agreement: float  # share of positions at which both think the same token the likeliest
    kl_nats: float  # per token
    tokens: int  # positions compared


def head_cost(stored: Engine, quantized: Engine, ids: list[int], progress: Progress | None = None) -> HeadCost:
    """Both engines, of one model, read `ids`: a text's tokens, as far as the context holds them."""
    ids = ids[: stored.config.max_context]
    first, second = stored.sequence(), quantized.sequence()
    sums = np.zeros(3)
    for at in range(0, len(ids), CHUNK):
        part = ids[at : at + CHUNK]
        p, q = (log_softmax(engine.forward([(to, part)], all_logits=True)) for engine, to in ((stored, first), (quantized, second)))
        sums += compare(p, q, np.array(part))
        if progress:
            progress(at + len(part), len(ids))
    return HeadCost(float(sums[2]) / len(ids), float(sums[1]) / len(ids), len(ids))


def _loss(engine: Engine, mean: NDArray[np.float64], default: bool) -> Loss:
    weights = "f16" if engine.codec == "dense" else engine.codec
    perplexity = math.exp(min(mean[0], LARGEST_EXPONENT))
    return Loss(weights, engine.activations, default, engine.weight_bytes_per_token, perplexity, float(mean[1]), float(mean[2]))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """ln of probabilities, [rows, vocab]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z


def compare(p: NDArray[np.float64], q: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """[-ln q(target), KL(p || q), agreement], summed over the rows; p, q: ln of probabilities, [rows, vocab]."""
    nll = -q[np.arange(len(targets)), targets].sum()
    return np.array([nll, (np.exp(p) * (p - q)).sum(), (p.argmax(axis=1) == q.argmax(axis=1)).sum()])
