"""`bitnet eval`: perplexity, bits per byte and next-token accuracy on text files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bitnet.cli.options import engine_options, hub_options, model_argument, output_options, zero_skip_argument


class ManyFiles(click.Command):
    """Lets `--data` take several files: `--data A B C` is `--data A --data B --data C`, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_option(args, "--data"))


def repeat_option(args: list[str], name: str) -> list[str]:
    """`args` with `name` repeated before each of its values but the first."""
    spread: list[str] = []
    values = -1  # values of `name` seen since it was; -1 outside of it
    for word in args:
        if word.startswith("-"):
            values = 0 if word == name else -1
        elif values >= 0:
            if values:
                spread.append(name)
            values += 1
        spread.append(word)
    return spread


@click.command("eval", cls=ManyFiles, short_help="Measure perplexity and bits per byte on text files.")
@model_argument
@click.option("--data", multiple=True, metavar="FILE...", help="UTF-8 text files.")
@click.option(
    "--kv-report", metavar="FILE", help="Instead: what KV caches of 16, 8, K8V4 and 4 bits cost on this text, centered and rotated or not."
)
@click.option("--max-bytes", type=int, metavar="N", help="Only the first N bytes of each file.")
@hub_options
@engine_options
@output_options
def command(
    model: str, data: tuple[str, ...], kv_report: str | None, max_bytes: int | None, zero_skip: bool | None, as_json: bool, **engine: Any
) -> None:  # fmt: skip
    """Measure perplexity and bits per byte on text files.

    MODEL comes before --data. Each text is cut into windows of the model's context, and every token is predicted once.
    """
    from bitnet.cli.progress import DelayedBar
    from bitnet.errors import naming
    from bitnet.evaluate.perplexity import read_text, score_text
    from bitnet.transformer import TernaryTransformer

    if data and kv_report:
        raise click.UsageError("--data and --kv-report exclude each other")
    if not data and not kv_report:
        raise click.UsageError("Missing option '--data'.")
    if kv_report:
        if engine["kv_bits"] != 16 or engine["kv_bits_k"] is not None or engine["kv_bits_v"] is not None:
            raise click.UsageError("--kv-report measures 16, 8, K8V4 and 4 bits; leave --kv-bits, --kv-bits-k and --kv-bits-v out")
        return report_kv(model, kv_report, max_bytes, as_json, zero_skip=zero_skip_argument(zero_skip), **engine)
    texts = [(name, read_text(Path(name), max_bytes)) for name in data]
    loaded = TernaryTransformer.from_pretrained(model, zero_skip=zero_skip_argument(zero_skip), **engine)
    if loaded.head_tuned is not None:
        click.echo(loaded.head_tuned.notice(), err=True)
    results = []
    for name, text in texts:
        with DelayedBar(Path(name).name) as bar, naming(name):
            score = score_text(loaded, text, bar)
        results.append({"model": model, "data": name, **{key: value for key, value in asdict(score).items() if key != "mean_probability"}})
        click.echo(
            f"{name}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f}, next-token accuracy "
            f"{score.next_token_accuracy:.1%} ({score.tokens:,} tokens, {score.bytes:,} bytes)"
        )
    if as_json:
        click.echo(json.dumps({"results": results}))


def report_kv(model: str, name: str, max_bytes: int | None, as_json: bool, **engine: Any) -> None:
    """Prints the table of `bitnet.evaluate.kv`."""
    from bitnet.cli.progress import DelayedBar
    from bitnet.errors import naming
    from bitnet.evaluate.kv import kv_losses, left_out, lines
    from bitnet.evaluate.perplexity import read_text
    from bitnet.transformer import TernaryTransformer

    text = read_text(Path(name), max_bytes)
    loaded = TernaryTransformer.from_pretrained(model, **engine)
    with DelayedBar(Path(name).name) as bar, naming(name):
        losses = kv_losses(loaded, text, group_size=engine["kv_group_size"], progress=bar)
    click.echo("\n".join(lines(losses)))
    if missing := left_out(losses, loaded.engine.config.max_context):
        click.echo(missing, err=True)
    if as_json:
        click.echo(json.dumps({"model": model, "data": name, "results": [asdict(loss) for loss in losses]}))
