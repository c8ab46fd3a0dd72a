"""One measurement of `bitnet bench`: prompts and decoding against the bandwidth, and what was asked for beside."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.bench.choices import MODEL_HEADS
from bitnet.cli.bench.source import build, sample_ids
from bitnet.cli.options import EMBEDDED_MODEL, zero_skip_argument

if TYPE_CHECKING:
    from bitnet.engine import Adapter, Engine
    from bitnet.evaluate.accuracy import HeadCost
    from bitnet.kv import KvFormat
    from bitnet.tuning import Settings


def benched(
    model: str | None, shape: str | None, weights: str | None, head: str | None, codec: str, threads: int | None,
    prompt_tokens: int | None, new_tokens: int, depth: int, batch: int, repetitions: int, adapter: str | None, lora: int | None,
    kv: KvFormat, max_context: int | None, zero_skip: bool | None, gate_zeros: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Measures, prints the table, and gives the JSON object."""
    from bitnet import machine
    from bitnet.bench.speed import kv_bytes_per_token, measure, read_bandwidths
    from bitnet.bench.zero_skip import shift_gates, unread_bytes
    from bitnet.cli.progress import DelayedBar
    from bitnet.zero_skip import decide

    start = time.perf_counter()
    engine, use = build(model, shape, weights, head, codec, threads, max_context)
    engine.kv = kv
    if gate_zeros is not None:
        shift_gates(engine, gate_zeros)
    if shape is not None and zero_skip is None and gate_zeros is None:
        zero_skip = False  # the zeros of random weights tell nothing
    skip = decide(engine, zero_skip_argument(zero_skip), skip_ids(model, shape, engine))
    load_s = time.perf_counter() - start
    beside = adapter_of(engine, adapter, lora)
    if prompt_tokens is None:
        prompt_tokens = max(1, min(512, engine.config.max_context))
    check_cache(engine, max(prompt_tokens, depth + new_tokens) * batch)
    sizes: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "depth": depth, "batch": batch}
    with DelayedBar("bench") as bar:
        measure(engine, **sizes, repetitions=1)  # not counted: memory is touched for the first time
        peak_rss_bytes = machine.peak_rss_bytes()  # without the memory that the bandwidth is measured over
        limits: list[float] = []  # a machine's memory is not the same in every minute
        speed = measure(
            engine, **sizes, repetitions=repetitions, progress=bar, around=lambda: limits.extend(read_bandwidths(engine.threads))
        )
    steps_per_s = speed.decode_tok_s / batch
    read_bytes = engine.weight_bytes_per_token - unread_bytes(engine)
    result: dict[str, Any] = {
        "model": None if shape else model or EMBEDDED_MODEL,
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
        "bandwidth_gb_s": read_bytes * steps_per_s / 1e9,
        "peak_rss_bytes": peak_rss_bytes,
        "shape": shape,
        "weights": weights or ("ternary" if shape else "stored"),
        "head": engine.head,
        "batch": batch,
        "roofline_gb_s": median(limits),
        "depth": depth,
        "kv_bytes_per_token": kv_bytes_per_token(engine, depth, new_tokens),
        "kv_cache": kv.name,
        "kv_memory_bytes_per_token": engine.kv_bytes_per_token,
        "attention_ms": speed.attention_ms,
        "outside_matmul_share": speed.outside_matmul_share,
        "head_cost": None,
        "adapter": None,
        "zero_skip": skip.record(),
    }
    click.echo("\n".join(rows(result, use)))
    click.echo(f"{'zero skip':<10} {skip.text()}")
    if engine.can_skip_zeros and (zero_skip or gate_zeros is not None):
        result["zero_skip"] |= printed_skipping(engine, sizes, repetitions)
    if beside is not None:
        result["adapter"] = printed_adapter_cost(engine, beside, adapter or f"random, rank {lora}", sizes, repetitions)
    if engine.head in MODEL_HEADS and engine.head != "stored":
        result["head_cost"] = printed_head_cost(
            model, shape, engine, plain=shape is None and weights in (None, "stored") and not kv.quantized and max_context is None
        )
    return result


def rows(found: dict[str, Any], use: Settings | None) -> list[str]:
    """What was measured, one row a line."""
    batch, limit = found["batch"], found["roofline_gb_s"]
    steps_per_s = found["decode_tok_s"] / batch
    kv_bytes = found["kv_bytes_per_token"] * batch
    with_kv = (found["weight_bytes_per_token"] + kv_bytes) * steps_per_s / 1e9
    tuned_head = use is not None and use.head_tuned and use.head != "stored"
    head = f"head {found['head']}{' (as tuned)' if tuned_head else ''}"
    choice = ", as tuned" if use is not None and use.tuned is not None else ""
    after = f" after {found['depth']} tokens" if found["depth"] else ""
    share = f"{found['bandwidth_gb_s']:.1f} GB/s of weights, {found['bandwidth_gb_s'] / limit:.0%} of the {limit:.1f} GB/s"
    lines = [
        ("model", f"{found['model'] or found['shape']}, {head}, {found['weight_bytes_per_token'] / 1e6:,.1f} MB of weights a token"),
        ("engine", f"{found['isa']}, {found['codec']}, {found['threads']} threads{choice}, batch {batch}"),
        ("prefill", f"{found['prefill_tok_s']:,.1f} tokens/s ({found['prompt_tokens']} tokens each)"),
        (
            "decode",
            f"{found['decode_tok_s']:,.1f} tokens/s ({found['generated_tokens']} tokens each{after}, {1000 / steps_per_s:.2f} ms a step)",
        ),
        ("bandwidth", f"{share} that reading alone reaches"),
    ]
    if found["depth"]:
        cached = ", for caches hold a part" if with_kv > limit else ""
        lines.append(("with KV", f"{with_kv:.1f} GB/s, {with_kv / limit:.0%}{cached}; {kv_bytes / 1e6:,.1f} MB of keys and values a step"))
        lines.append(("attention", f"{found['attention_ms']:.2f} ms a step"))
    if found["kv_cache"] != "f16" or found["depth"]:
        lines.append(("KV cache", f"{found['kv_cache']}, {found['kv_memory_bytes_per_token']:,} bytes a token"))
    lines.append(("outside", f"{found['outside_matmul_share']:.0%} of the decoding time is outside the matrix products"))
    return [f"{label:<10} {text}" for label, text in lines]


def skip_ids(model: str | None, shape: str | None, engine: Engine) -> list[int]:
    """Tokens on which zeros are counted: of the built-in text for a model, random ones for a shape, which knows none."""
    from bitnet.bench.zero_skip import random_ids
    from bitnet.models import open_checkpoint
    from bitnet.source import resolve

    if shape is not None or not engine.can_skip_zeros:
        return random_ids(engine)
    return sample_ids(open_checkpoint(resolve(EMBEDDED_MODEL if model is None else model)))


def check_cache(engine: Engine, tokens: int) -> None:
    """Refuses a batch whose keys and values, with the memory that the bandwidth is measured over, do not fit."""
    from bitnet import machine
    from bitnet.bench.speed import ROOFLINE_BYTES

    what = f"a KV cache of {tokens:,} tokens and {ROOFLINE_BYTES / 1e9:.1f} GB to measure the bandwidth"
    machine.require_memory(what, engine.kv_bytes_per_token * tokens + ROOFLINE_BYTES)


def adapter_of(engine: Engine, path: str | None, rank: int | None) -> Adapter | None:
    """The one that was asked for."""
    from bitnet.models.peft import read_adapter
    from bitnet.shapes import random_adapter

    if path is not None:
        return engine.adapter(read_adapter(path, engine.config).parts)
    return None if rank is None else random_adapter(engine, rank)


def printed_skipping(engine: Engine, sizes: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Decoding with skipping and without, in turns, and what of the saved bytes became saved time."""
    from bitnet.bench.zero_skip import measure_skipping

    found = measure_skipping(engine, **{key: value for key, value in sizes.items() if key != "prompt_tokens"}, repetitions=repetitions)
    size = engine.weight_bytes_per_token
    predicted, share = found.predicted(size), found.share_of_gain(size)
    lines = [
        f"{found.gate_zeros:.1%} of the gates zero, {found.input_zeros:.1%} of down_proj's inputs; read: {found.up_rows_read:.1%} of the "
        f"rows, {found.down_columns_read:.1%} of the columns, {found.saved_bytes / 1e6:,.1f} MB less",
        f"in turns: {found.skip_tok_s:,.1f} tokens/s, {found.speedup:.3f} x the {found.dense_tok_s:,.1f} without; the bytes predict "
        f"{predicted:.3f} x: {share:.0%} of their time is saved; {'the same bits' if found.same_bits else 'OTHER BITS'}",
    ]
    click.echo("\n".join(f"{'':<10} {line}" for line in lines))
    return {**asdict(found), "speedup": found.speedup, "predicted_speedup": predicted, "share_of_gain": share}


def printed_adapter_cost(engine: Engine, adapter: Adapter, name: str, sizes: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """What decoding with the adapter costs, against the model alone in turns."""
    from bitnet.bench.speed import measure_adapter

    sizes = {key: value for key, value in sizes.items() if key != "prompt_tokens"}
    alone, adapted = measure_adapter(engine, adapter, **sizes, repetitions=repetitions)
    click.echo(
        f"{'adapter':<10} {name}: {adapted:,.1f} tokens/s, {adapted / alone:.1%} of the {alone:,.1f} without it, in turns; "
        f"{adapter.nbytes / 1e6:,.1f} MB more a token"
    )
    return {"name": name, "bytes_per_token": adapter.nbytes, "decode_tok_s": adapted, "decode_tok_s_alone": alone, "share": adapted / alone}


def printed_head_cost(model: str | None, shape: str | None, engine: Engine, plain: bool) -> dict[str, Any] | None:
    """What the quantized head costs the model, or of a shape, whose random weights cannot tell, the embedded model; None if unknown.

    `plain`: whether only the head makes the engine another one than what is stored.
    """
    from bitnet.errors import BitNetError
    from bitnet.source import resolve

    name = EMBEDDED_MODEL if model is None else model
    try:
        cost = measured_head_cost(resolve(name), engine.head, engine if plain else None, engine.threads)
    except BitNetError as error:
        warnings.warn(f"what head {engine.head} costs is not measured: {error}", stacklevel=1)
        return None
    measured_on = f"{name}, as random weights cannot tell, " if shape else ""
    click.echo(
        f"{'head cost':<10} {measured_on}{engine.head} against stored: same top-1 {cost.top1_agreement:.2%}, "
        f"KL {cost.kl_nats:.5f} nats ({cost.tokens} tokens)"
    )
    return {"model": name, "head": engine.head, **asdict(cost)}


def measured_head_cost(path: Path, head: str, quantized: Engine | None, threads: int) -> HeadCost:
    """`quantized`: the model's engine with that head, where there is one already."""
    from bitnet.cli.progress import DelayedBar
    from bitnet.evaluate.accuracy import head_cost
    from bitnet.models import open_checkpoint
    from bitnet.weights import load_engine

    checkpoint = open_checkpoint(path)
    ids = sample_ids(checkpoint)
    with DelayedBar("head cost") as bar:
        stored = load_engine(checkpoint, threads=threads)
        return head_cost(stored, quantized or load_engine(checkpoint, threads=threads, head=head), ids, bar)
