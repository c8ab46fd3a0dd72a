"""`bitnet convert`: a model into another format; what was written, in one line, and what it cost."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import conversion_options, hub_options, model_argument, output_options

if TYPE_CHECKING:
    from bitnet.convert import Report

FORMATS = """
\b
hf                        a folder for transformers, packed ternary (linear class autobitlinear)
safetensors               the same in one file, complete by itself; .bin, too
hf-bitlinear              packed, with the reciprocal of the scale (linear class bitlinear)
hf-dense-f32, -f16, -bf16 a folder of plain numbers; also safetensors-dense-...
mlx                       a folder of 2-bit weights in groups of 128
gguf-tq1_0, gguf-tq2_0    llama.cpp, one scale for 256 weights
gguf-q2_0, gguf-q1_0      llama.cpp, one scale for 64, or 128 binary, weights
gguf-i2_s                 bitnet.cpp, one scale for the tensor
gguf-pq2_0, gguf-ptq1_0   the Bonsai models', one scale for 128 weights
gguf-q8_0, gguf-q4_0      llama.cpp, with --quantization int8, int4
gguf-f32, -f16, -bf16     llama.cpp, plain numbers
"""


@click.command("convert", short_help="Write a model in another format, exactly or not at all.", epilog="Formats:\n" + FORMATS)
@model_argument
@click.option("--output-model", "-o", "target", required=True, metavar="TARGET", help="The folder or file to write.")
@hub_options
@conversion_options
@output_options
def command(model: str, target: str, **options: Any) -> None:
    """Write a model in another format: every trit and scale as it was, or not at all.

    MODEL is the embedded model's name (the default), a folder in Hugging Face layout, one file, or org/name from the Hub.
    """
    convert_model(model, target, **options)


def convert_model(
    source: str, target: str, *, form: str | None, quantization: str | None, ternary: bool, alpha: float | None, method: str, scale: str,
    tokenizer: str | None, allow_requantize: bool, verify: bool, i2_s: str, merge_adapter: str | None, as_json: bool,
    revision: str | None = None, file: str | None = None,
) -> None:  # fmt: skip
    """Converts, and shows what was done."""
    from bitnet.cli.progress import DelayedBar
    from bitnet.convert import Ternarization, convert
    from bitnet.machine import peak_rss_bytes
    from bitnet.transformer import resolve

    if ternary and quantization not in (None, "ternary"):
        raise click.UsageError(f"--ternary and --quantization {quantization} exclude each other")
    quantization = "ternary" if ternary else quantization
    unit = int(scale) if scale.isdecimal() else scale
    asked = quantization == "ternary" or alpha is not None or method != "threshold" or unit != "tensor"
    start = time.perf_counter()
    with DelayedBar("writing", in_bytes=True) as writing, DelayedBar("verifying", in_bytes=False) as verifying:
        bars = {"writing": writing, "verifying": verifying}
        report = convert(
            resolve(source, revision, file),
            target,
            format=form,
            quantization=quantization,
            ternarization=Ternarization(method, alpha, unit) if asked else None,
            tokenizer_json=tokenizer,
            allow_requantize=allow_requantize,
            verify_written=verify,
            i2_s=i2_s,
            merge_adapter=merge_adapter,
            progress=lambda what, done, total: bars[what](done, total),
        )
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    for line in lines(report, seconds, peak):
        click.echo(line, err=as_json)
    if as_json:
        click.echo(json.dumps(record(report, seconds, peak)))


def record(report: Report, seconds: float, peak_bytes: int) -> dict[str, Any]:
    """The report as plain values."""
    from bitnet.convert import adapters

    losses = [{"weight": loss.name, "relative_error": loss.relative} for loss in report.losses]
    plain = {key: getattr(report, key) for key in ("source", "target", "format", "bytes", "tensors", "verified", "notes")}
    return {**plain, "requantized": losses, "merged": adapters.record(report.merged), "seconds": seconds, "peak_rss_bytes": peak_bytes}


def lines(report: Report, seconds: float, peak_bytes: int) -> list[str]:
    """The report for people."""
    from bitnet.convert import adapters

    found = [f"note: {note}" for note in report.notes] + (adapters.lines(report.merged) if report.merged else [])
    if report.losses:
        total = sum(loss.total for loss in report.losses)
        error = (sum(loss.error for loss in report.losses) / total) ** 0.5 if total else 0.0
        worst = max(report.losses, key=lambda loss: loss.relative)
        found.append(
            f"requantized {len(report.losses)} weights: off by {error:.2e} of their norm, the worst by {worst.relative:.2e} ({worst.name})"
        )
    checked = "every weight read back and compared" if report.verified else "not verified"
    found.append(
        f"{report.target}: {report.format}, {report.bytes:,} bytes, {report.tensors} tensors, {checked}; {seconds:.1f} s, "
        f"peak memory {peak_bytes / 1e6:,.0f} MB"
    )
    return found
