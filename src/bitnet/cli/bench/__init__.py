"""`bitnet bench`: speed of a model, or of a shape with random weights, against this machine's memory bandwidth; comparison; tuning."""

from __future__ import annotations

import json
import warnings
from typing import Any

import click

from bitnet.cli.bench.choices import CODEC_NAMES, SHAPE_ALIASES, SHAPE_HEADS, SHAPE_NAMES, SHAPE_WEIGHTS, check_mode
from bitnet.cli.bench.modes import compared, speculated, tuned
from bitnet.cli.bench.single import benched
from bitnet.cli.options import (
    EMBEDDED_MODEL,
    adapter_option,
    debug_option,
    json_option,
    kv_options,
    max_context_option,
    ternary_options,
    threads_option,
)


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
@click.option("--lora", type=int, metavar="RANK", help="An adapter of this rank with random weights, to see what one costs.")
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
    from bitnet.kv import kv_format
    from bitnet.transformer import check_options

    if model is not None and shape is not None:
        raise click.UsageError("MODEL and --shape exclude each other")
    if gate_zeros is not None and shape is None:
        raise click.UsageError("--gate-zeros is for a --shape, whose gates are random; a MODEL has its own zeros")
    if lora is not None and adapter is not None:
        raise click.UsageError("--adapter and --lora exclude each other")
    check_mode(click.get_current_context())
    shape = SHAPE_ALIASES.get(shape or "", shape)
    if repetitions is None:
        repetitions = 3 if speculate else 5
    check_options(threads=threads)
    kv = kv_format(**cache)
    load, cores = machine.load_average(), machine.usable_cores()
    if load > max(0.7, 0.1 * cores):
        warnings.warn(f"load average {load:.1f} on {cores} cores: something else runs, and it slows this", stacklevel=1)
    if tune:
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
