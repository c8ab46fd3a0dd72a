"""`bitnet bench`: speed of a model, or of a shape with random weights, against this machine's memory bandwidth; comparison; tuning."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import (
    EMBEDDED_MODEL,
    adapter_option,
    debug_option,
    json_option,
    kv_options,
    max_context_option,
    ternary_options,
    threads_option,
    zero_skip_argument,
)

if TYPE_CHECKING:
    from bitnet.engine import Adapter, Engine
    from bitnet.evaluate.accuracy import HeadCost
    from bitnet.kv import KvFormat
    from bitnet.tuning import Settings

SHAPE_NAMES = ("bitnet-2b-4t", "bonsai-1.7b", "bonsai-8b", "llama3-8b", "article-12x512")  # bitnet.shapes.SHAPES
SHAPE_ALIASES = {"2b-4t": "bitnet-2b-4t"}
MODEL_WEIGHTS = ("stored", "f16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.weights.WEIGHTS
SHAPE_WEIGHTS = ("f16", "bf16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.shapes.WEIGHTS
MODEL_HEADS = ("stored", "int8", "int4")  # bitnet.weights.HEADS
SHAPE_HEADS = ("f16", "int8", "int4", "ternary")  # bitnet.shapes.HEADS
CODEC_NAMES = ("auto", "t2", "b3")  # bitnet.engine.CODECS


@click.command("bench", short_help="Measure speed against the memory bandwidth of this machine.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--shape", type=click.Choice([*SHAPE_NAMES, *SHAPE_ALIASES]), help="Random weights of this shape, made in memory, instead of a model."
)
@click.option(
    "--weights",
    type=click.Choice(["stored", *SHAPE_WEIGHTS]),
    help="The linear layers. A model's: stored (default), f16, int8, int4, fp4, binary, ternary. A shape's: ternary (default); bf16 too.",
)
@ternary_options
@click.option(
    "--head",
    type=click.Choice(["stored", *SHAPE_HEADS]),
    help="A model's: stored, int8 or int4; default: as tuned, else stored. A shape's: int8 (default), int4, f16 or ternary.",
)
@click.option("--codec", type=click.Choice(CODEC_NAMES), default="auto", help="Of ternary layers: two-bit or base-3. Default: as tuned.")
@threads_option
@click.option("--prompt-tokens", type=int, metavar="N", help="Of each prompt. Default: 512, or what the context holds.")
@click.option("--new-tokens", type=int, default=64, show_default=True, metavar="N", help="Tokens to decode.")
@click.option("--depth", type=int, default=0, show_default=True, metavar="N", help="Tokens in the context before the first decoded one.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--repetitions", type=int, metavar="N", help="The medians are printed. Default: 5; of --speculate 3.")
@click.option(
    "--compare",
    metavar="SCHEMES",
    help="Instead of one measurement of a --shape, a table of several, in turns: fp16,int8,int4,fp4,binary,ternary or some of them.",
)
@click.option("--picture", metavar="FILE", help="With --compare: draw it too (.png, .svg, .pdf; needs matplotlib).")
@kv_options
@max_context_option
@click.option(
    "--zero-skip/--no-zero-skip", default=None, help="Skip what zero gates make irrelevant, measured against dense. Default: if it pays."
)
@click.option("--gate-zeros", type=float, metavar="SHARE", help="Of a --shape with relu^2: shift its gates until this share is zero.")
@adapter_option
@click.option("--lora", type=int, metavar="RANK", help="An adapter of this rank with random weights in float32, to see what one costs.")
@click.option("--speculate", is_flag=True, help="Replay a summary, an edit and a story, with guesses from the text before and without.")
@click.option("--replay", multiple=True, metavar="FILE", help="With --speculate: instead, a prompt, a line =====, and a text. Repeatable.")
@click.option("--tune", is_flag=True, help="Find the codec, head and threads that decode MODEL fastest here, and save them for later runs.")
@json_option
@debug_option
def command(
    model: str | None, shape: str | None, weights: str | None, head: str | None, codec: str, threads: int | None,
    prompt_tokens: int | None, new_tokens: int, depth: int, batch: int, repetitions: int | None, adapter: str | None, lora: int | None,
    compare: str | None, picture: str | None, speculate: bool, replay: tuple[str, ...], tune: bool, as_json: bool,
    zero_skip: bool | None, gate_zeros: float | None, max_context: int | None, **cache: Any,
) -> None:  # fmt: skip
    """Measure speed against the memory bandwidth of this machine.

    MODEL defaults to the embedded one. Prompts and decoding are measured apart, each from an empty context (--depth: decoding after N
    tokens). Decoding reads all weights for every token, so the bandwidth of plain reading, measured in the same run, limits it.
    """
    from bitnet import machine
    from bitnet.kv import KvFormat, kv_format
    from bitnet.transformer import check_options

    if model is not None and shape is not None:
        raise click.UsageError("MODEL and --shape exclude each other")
    if gate_zeros is not None and shape is None:
        raise click.UsageError("--gate-zeros is for a --shape, whose gates are random; a MODEL has its own zeros")
    if lora is not None and adapter is not None:
        raise click.UsageError("--adapter and --lora exclude each other")
    beside = adapter is not None or lora is not None
    shape = SHAPE_ALIASES.get(shape or "", shape)
    if compare is None and picture is not None:
        raise click.UsageError("--picture draws what --compare measures; give --compare fp16,int8,int4,fp4,binary,ternary")
    if compare is not None and (shape is None or tune or weights is not None or codec != "auto" or depth or batch != 1 or beside):
        raise click.UsageError("--compare takes a --shape, and no MODEL, --weights, --codec, --depth, --batch, --adapter, --lora or --tune")
    if speculate and (tune or compare is not None or prompt_tokens is not None or new_tokens != 64 or depth or batch != 1 or beside):
        raise click.UsageError(
            "--speculate takes no --prompt-tokens, --new-tokens, --depth, --batch, --adapter, --lora, --compare or --tune"
        )
    if replay and not speculate:
        raise click.UsageError("--replay is for --speculate")
    if repetitions is None:
        repetitions = 3 if speculate else 5
    check_options(threads=threads)
    kv = kv_format(**cache)
    if kv != KvFormat() and (tune or compare is not None or speculate):
        raise click.UsageError(
            "--kv-bits and --kv-group-size are for one measurement; leave them out with --compare, --speculate and --tune"
        )
    load, cores = machine.load_average(), machine.usable_cores()
    if load > max(0.7, 0.1 * cores):
        warnings.warn(f"load average {load:.1f} on {cores} cores: something else runs, and it slows this", stacklevel=1)
    if tune:
        if shape is not None or weights is not None or head is not None or codec != "auto" or threads is not None or beside:
            raise click.UsageError(
                "--tune measures every codec, head and number of threads of a MODEL; leave out the options that set them"
            )
        found = tuned(model or EMBEDDED_MODEL)
    elif compare is not None and shape is not None:
        found = compared(shape, compare, head, threads, prompt_tokens, new_tokens, repetitions, picture)
    elif speculate:
        found = speculated(model, shape, weights, head, codec, threads, repetitions, replay)
    else:
        found = benched(
            model, shape, weights, head, codec, threads, prompt_tokens, new_tokens, depth, batch, repetitions, adapter, lora, kv,
            max_context, zero_skip, gate_zeros,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found))


def compared(
    shape: str,
    schemes: str,
    head: str | None,
    threads: int | None,
    prompt_tokens: int | None,
    new_tokens: int,
    rounds: int,
    picture: str | None,
) -> dict[str, Any]:
    """Measures the schemes in turns, prints the table, draws it on request, and gives the JSON object."""
    from bitnet.bench.compare import compare, draw, lines, parse
    from bitnet.cli.progress import DelayedBar

    if head is not None and head not in SHAPE_HEADS:
        raise click.UsageError(f"--head {head} is for a MODEL; a --shape takes {', '.join(SHAPE_HEADS)}")
    names = parse(schemes)
    with DelayedBar("compare") as bar:
        found = compare(
            shape, names, head=head, threads=threads, prompt_tokens=prompt_tokens or 512, new_tokens=new_tokens, rounds=rounds, progress=bar
        )
    click.echo("\n".join(lines(found)))
    if picture is not None:
        draw(found, Path(picture))
        click.echo(f"picture: {picture}")
    return asdict(found)


def speculated(
    model: str | None, shape: str | None, weights: str | None, head: str | None, codec: str, threads: int | None, rounds: int,
    files: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    """Measures what speculation gains, prints the table, and gives the JSON object."""
    from bitnet.bench.speculate import builtin, measure, read, row
    from bitnet.cli.progress import DelayedBar
    from bitnet.errors import UsageError
    from bitnet.models import canonical, open_checkpoint
    from bitnet.transformer import load_tokenizer, resolve

    replays = [read(file) for file in files] or builtin()
    engine, _ = build(model, shape, weights, head, codec, threads, None)
    source = EMBEDDED_MODEL if model is None else model  # whose tokens a shape takes
    checkpoint = open_checkpoint(resolve(source))
    tokenizer = load_tokenizer(checkpoint, canonical(checkpoint).config.vocab_size)
    click.echo(
        f"{shape or source}, head {engine.head}, {engine.isa}, {engine.codec}, {engine.threads} threads; tokens of {source}; "
        f"medians of {rounds} rounds, in turns\n{row()}"
    )
    found = []
    with DelayedBar("speculate") as bar:
        for number, replay in enumerate(replays):
            try:
                gain = measure(engine, tokenizer, replay, rounds)
            except UsageError as error:
                if files:
                    raise
                warnings.warn(f"left out: {error}", stacklevel=1)
                continue
            bar(number + 1, len(replays))
            click.echo(row(gain))
            found.append(asdict(gain))
    return {
        "model": None if shape else source, "shape": shape, "head": engine.head, "isa": engine.isa, "codec": engine.codec,
        "threads": engine.threads, "replays": found,
    }  # fmt: skip


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
        before = read_bandwidths(engine.threads)
        speed = measure(engine, **sizes, repetitions=repetitions, progress=bar)
        roofline_gb_s = median([*before, *read_bandwidths(engine.threads)])
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
        "roofline_gb_s": roofline_gb_s,
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
        result["head_cost"] = printed_head_cost(model, shape, engine)
    return result


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
    from bitnet.transformer import resolve
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


def skip_ids(model: str | None, shape: str | None, engine: Engine) -> list[int]:
    """Tokens on which zeros are counted: of the built-in text for a model, random ones for a shape, which knows none."""
    from bitnet.bench.zero_skip import random_ids
    from bitnet.models import open_checkpoint
    from bitnet.transformer import resolve

    if shape is not None or not engine.can_skip_zeros:
        return random_ids(engine)
    return sample_ids(open_checkpoint(resolve(EMBEDDED_MODEL if model is None else model)))


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


def adapter_of(engine: Engine, path: str | None, rank: int | None) -> Adapter | None:
    """The one that was asked for."""
    from bitnet.models.peft import read_adapter
    from bitnet.shapes import random_adapter

    if path is not None:
        return engine.adapter(read_adapter(path, engine.config).parts)
    return None if rank is None else random_adapter(engine, rank)


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


def check_cache(engine: Engine, tokens: int) -> None:
    """Refuses a batch whose keys and values, with the memory that the bandwidth is measured over, do not fit."""
    from bitnet import machine
    from bitnet.bench.speed import ROOFLINE_BYTES

    what = f"a KV cache of {tokens:,} tokens and {ROOFLINE_BYTES / 1e9:.1f} GB to measure the bandwidth"
    machine.require_memory(what, engine.kv_bytes_per_token * tokens + ROOFLINE_BYTES)


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


def printed_head_cost(model: str | None, shape: str | None, engine: Engine) -> dict[str, Any] | None:
    """What the quantized head costs the model, or of a shape, whose random weights cannot tell, the embedded model; None if unknown."""
    from bitnet.errors import BitNetError
    from bitnet.transformer import resolve

    name = EMBEDDED_MODEL if model is None else model
    try:
        cost = measured_head_cost(resolve(name), engine.head, engine if shape is None else None, engine.threads)
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


def sample_ids(checkpoint: Any) -> list[int]:
    """The built-in text's tokens."""
    from bitnet.evaluate.sample import text
    from bitnet.models import canonical
    from bitnet.transformer import load_tokenizer

    return load_tokenizer(checkpoint, canonical(checkpoint).config.vocab_size).encode(text())


def tuned(name: str) -> dict[str, Any]:
    """Measures all candidates, prints them, saves the choice, and gives the JSON object."""
    from bitnet.bench.tune import RULE, candidates, fastest
    from bitnet.cli.progress import DelayedBar
    from bitnet.models import open_checkpoint
    from bitnet.transformer import resolve
    from bitnet.tuning import machine_key, save

    path = resolve(name)
    checkpoint = open_checkpoint(path)
    with DelayedBar("tune") as bar:
        found = candidates(checkpoint, sample_ids(checkpoint), bar)
    choice = fastest(found)
    click.echo(
        f"{name} on {machine_key()}\n\n  {'codec':<6} {'head':<7} {'threads':>7} {'tokens/s':>10} {'same top-1':>11} {'KL, nats':>9}"
    )
    for candidate in found:
        c, mark = candidate.choice, "" if candidate.allowed else "  (not allowed)"
        click.echo(
            f"  {c.codec:<6} {c.head:<7} {c.threads:>7} {c.decode_tok_s:>10,.1f} {c.top1_agreement:>11.2%} {c.kl_nats:>9.5f}"
            f"{'  (chosen)' if c == choice else mark}"
        )
    file = save(path, choice)
    click.echo(f"\nrule:   {RULE}\nchoice: {choice.text()}\nsaved:  {file}, for later runs of this model on this machine")
    listed = [{**asdict(candidate.choice), "allowed": candidate.allowed} for candidate in found]
    return {"model": name, "machine": machine_key(), "rule": RULE, "candidates": listed, "choice": asdict(choice), "saved": str(file)}
