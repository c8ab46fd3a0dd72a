"""`bitnet bench`: speed of a model, or of a shape with random weights, against this machine's memory bandwidth."""

from __future__ import annotations

import json
import time
import warnings
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import EMBEDDED_MODEL, debug_option, json_option, threads_option

if TYPE_CHECKING:
    from bitnet.bench.speed import Speed
    from bitnet.engine import Engine

SHAPE_NAMES = ("bitnet-2b-4t", "bonsai-1.7b", "bonsai-8b", "llama3-8b", "article-12x512")  # bitnet.shapes.SHAPES


@click.command("bench", short_help="Measure speed against the memory bandwidth of this machine.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--shape", type=click.Choice(SHAPE_NAMES), help="Random weights of this shape, made in memory, instead of a model.")
@click.option(
    "--head",
    type=click.Choice(["stored", "f16", "int8", "ternary"]),
    help="A model's: stored (default) or int8. A shape's: int8 (default), f16 or ternary.",
)
@threads_option
@click.option("--prompt-tokens", type=int, metavar="N", help="Default: 512, or what the context leaves.")
@click.option("--new-tokens", type=int, default=64, show_default=True, metavar="N", help="Tokens to decode after each prompt.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--repetitions", type=int, default=5, show_default=True, metavar="N", help="The medians are printed.")
@json_option
@debug_option
def command(
    model: str | None, shape: str | None, head: str | None, threads: int | None, prompt_tokens: int | None, new_tokens: int, batch: int,
    repetitions: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure speed against the memory bandwidth of this machine.

    MODEL defaults to the embedded one. Decoding reads all weights for every token, so the bandwidth of plain reading, measured in the
    same run, limits it.
    """
    from bitnet import machine
    from bitnet.bench.speed import measure, read_bandwidth
    from bitnet.cli.progress import DelayedBar
    from bitnet.transformer import check_options

    if model is not None and shape is not None:
        raise click.UsageError("MODEL and --shape exclude each other")
    check_options(threads=threads)
    load, cores = machine.load_average(), machine.usable_cores()
    if load > max(0.7, 0.1 * cores):
        warnings.warn(f"load average {load:.1f} on {cores} cores: something else runs, and it slows this", stacklevel=1)
    head = head or ("stored" if shape is None else "int8")
    start = time.perf_counter()
    engine = build(model, shape, head, threads)
    load_s = time.perf_counter() - start
    if prompt_tokens is None:
        prompt_tokens = max(1, min(512, engine.config.max_context - new_tokens))
    check_cache(engine, (prompt_tokens + new_tokens) * batch)
    with DelayedBar("bench") as bar:
        speed = measure(engine, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repetitions=repetitions, progress=bar)
    peak_rss_bytes = machine.peak_rss_bytes()  # without the memory that the bandwidth is measured over
    roofline_gb_s = read_bandwidth(engine.threads)
    name = shape or model or EMBEDDED_MODEL
    bandwidth_gb_s = engine.weight_bytes_per_token * speed.decode_tok_s / batch / 1e9
    click.echo(table(name, engine, head, speed, prompt_tokens, new_tokens, batch, bandwidth_gb_s, roofline_gb_s))
    if as_json:
        result: dict[str, Any] = {
            "model": None if shape else name,
            "token_ids": speed.token_ids,
            "finish_reason": "length",
            "isa": engine.isa,
            "codec": engine.codec,
            "threads": engine.threads,
            "load_s": load_s,
            "prompt_tokens": prompt_tokens,
            "prefill_tok_s": speed.prefill_tok_s,
            "time_to_first_token_s": speed.time_to_first_token_s,
            "generated_tokens": new_tokens,
            "decode_tok_s": speed.decode_tok_s,
            "ms_per_token": 1000 / speed.decode_tok_s,
            "weight_bytes_per_token": engine.weight_bytes_per_token,
            "bandwidth_gb_s": bandwidth_gb_s,
            "peak_rss_bytes": peak_rss_bytes,
            "shape": shape,
            "head": head,
            "batch": batch,
            "roofline_gb_s": roofline_gb_s,
        }
        click.echo(json.dumps(result))


def build(model: str | None, shape: str | None, head: str, threads: int | None) -> Engine:
    """The model's engine, or one with random weights. Refuses, with numbers, what does not fit into memory."""
    from bitnet import machine
    from bitnet.models import open_checkpoint
    from bitnet.shapes import random_engine, shape_bytes

    if shape is not None:
        if head == "stored":
            raise click.UsageError("--head stored is for a MODEL; a --shape takes f16, int8 or ternary")
        machine.require_memory(f"shape {shape} with head {head}", shape_bytes(shape, head))
        return random_engine(shape, threads=threads, head=head, seed=1)
    if head in ("f16", "ternary"):
        raise click.UsageError(f"--head {head} is for a --shape; a MODEL takes stored or int8")
    from bitnet.transformer import resolve
    from bitnet.weights import load_engine

    checkpoint = open_checkpoint(resolve(EMBEDDED_MODEL if model is None else model))
    return load_engine(checkpoint, threads=threads, head=head)


def check_cache(engine: Engine, tokens: int) -> None:
    """Refuses a batch whose keys and values, with the memory that the bandwidth is measured over, do not fit."""
    from bitnet import machine
    from bitnet.bench.speed import ROOFLINE_BYTES, cache_bytes

    what = f"a KV cache of {tokens:,} tokens and {ROOFLINE_BYTES / 1e9:.1f} GB to measure the bandwidth"
    machine.require_memory(what, cache_bytes(engine.config, tokens) + ROOFLINE_BYTES)


def table(
    name: str,
    engine: Engine,
    head: str,
    speed: Speed,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    bandwidth_gb_s: float,
    roofline_gb_s: float,
) -> str:
    """What was measured, one row a line."""
    step_ms = 1000 * batch / speed.decode_tok_s
    share = bandwidth_gb_s / roofline_gb_s
    rows = [
        ("model", f"{name}, head {head}, {engine.weight_bytes_per_token / 1e6:,.1f} MB of weights a token"),
        ("engine", f"{engine.isa}, {engine.codec}, {engine.threads} threads, batch {batch}"),
        ("prefill", f"{speed.prefill_tok_s:,.1f} tokens/s ({prompt_tokens} tokens each)"),
        ("decode", f"{speed.decode_tok_s:,.1f} tokens/s ({new_tokens} tokens each, {step_ms:.2f} ms a step)"),
        ("bandwidth", f"{bandwidth_gb_s:.1f} GB/s of weights, {share:.0%} of the {roofline_gb_s:.1f} GB/s that reading alone reaches"),
    ]
    return "\n".join(f"{label:<10} {text}" for label, text in rows)
