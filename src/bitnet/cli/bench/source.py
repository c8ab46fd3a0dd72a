"""What `bitnet bench` measures: the engine of a model, or one with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.bench.choices import MODEL_HEADS, MODEL_WEIGHTS, SHAPE_HEADS, SHAPE_WEIGHTS
from bitnet.cli.options import EMBEDDED_MODEL

if TYPE_CHECKING:
    from bitnet.engine import Engine
    from bitnet.tuning import Settings


def build(
    model: str | None, shape: str | None, weights: str | None, head: str | None, codec: str, threads: int | None, max_context: int | None
) -> tuple[Engine, Settings | None]:
    """The model's engine, or one with random weights. Refuses, with numbers, what does not fit into memory."""
    from bitnet import machine
    from bitnet.models import canonical, open_checkpoint
    from bitnet.models.config import with_context
    from bitnet.shapes import random_engine, shape_bytes

    if shape is not None:
        head = head or "int8"
        if head not in SHAPE_HEADS:
            raise click.UsageError(f"--head {head} is for a MODEL; a --shape takes {', '.join(SHAPE_HEADS)}")
        weights = weights or "ternary"
        if weights not in SHAPE_WEIGHTS:
            raise click.UsageError(f"--weights {weights} is for a MODEL; a --shape takes {', '.join(SHAPE_WEIGHTS)}")
        machine.require_memory(f"shape {shape} with head {head}", shape_bytes(shape, head, weights))
        return random_engine(shape, threads=threads, head=head, weights=weights, codec=codec, seed=1, context=max_context), None
    if weights is not None and weights not in MODEL_WEIGHTS:
        raise click.UsageError(f"--weights {weights} is for a --shape; a MODEL takes {', '.join(MODEL_WEIGHTS)}")
    if head is not None and head not in MODEL_HEADS:
        raise click.UsageError(f"--head {head} is for a --shape; a MODEL takes {', '.join(MODEL_HEADS)}")
    from bitnet.source import resolve
    from bitnet.tuning import Settings, settle
    from bitnet.weights import as_stored_if_ternary, load_engine

    path = resolve(EMBEDDED_MODEL if model is None else model)
    checkpoint = open_checkpoint(path)
    found = canonical(checkpoint)
    weights = as_stored_if_ternary(weights or "stored", checkpoint, found)
    as_stored = weights == "stored"  # what tuning measured
    use = settle(path, codec, head, threads) if as_stored else Settings(codec, head or "stored", threads)
    if max_context is not None:
        found = replace(found, config=with_context(found.config, max_context))
    return load_engine(checkpoint, threads=use.threads, head=use.head, codec=use.codec, weights=weights, model=found), use


def sample_ids(checkpoint: Any) -> list[int]:
    """The built-in text's tokens."""
    from bitnet.models import canonical
    from bitnet.sample import text
    from bitnet.source import load_tokenizer

    return load_tokenizer(checkpoint, canonical(checkpoint).config.vocab_size).encode(text())
