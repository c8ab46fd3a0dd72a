"""`bitnet convert`: a model into another format; what was written, in one line, and what it cost."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import conversion_options, hub_options, model_argument, output_options
from bitnet.files import shown

if TYPE_CHECKING:
    from bitnet.convert import Report, Ternarization

REPORTED = (
    "source", "target", "format", "bytes", "notes", "means", "layers", "alphas", "quantization", "verdict", "evaluation",
)  # fmt: skip
MOST_BYTES = 32  # of a calibration text for a token: more of it is not read
FORMATS = """
\b
hf                        a folder for transformers, packed ternary (linear class autobitlinear)
safetensors               the same in one file, complete by itself; .bin, too
hf-bitlinear              packed, with the reciprocal of the scale (linear class bitlinear)
hf-dense-f32, -f16, -bf16 a folder of plain numbers; also safetensors-dense-...
hf-int8, -int4, -fp4      a folder for this program, in groups of 32, with --quantization int8, int4, fp4
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
    source: str, output: str, *, form: str | None, quantization: str | None, ternary: bool, alpha: str | None, alpha_config: str | None,
    keep: tuple[str, ...], method: str, scale: str, calibration: str | None, sequences: int | None, sequence_length: int | None,
    evaluate: str | None, evaluate_bytes: int | None, report_file: str | None, tokenizer: str | None, allow_requantize: bool, verify: bool,
    i2_s: str, merge_adapter: str | None, as_json: bool, revision: str | None = None, file: str | None = None,
) -> None:  # fmt: skip
    """Converts, and shows what was done."""
    from bitnet.cli.progress import DelayedBar
    from bitnet.convert import convert, weights_alone
    from bitnet.convert.formats import choose
    from bitnet.convert.quantize import check_asked
    from bitnet.convert.report import check_place, table
    from bitnet.convert.target import named
    from bitnet.errors import naming
    from bitnet.evaluate.perplexity import read_text
    from bitnet.machine import peak_rss_bytes
    from bitnet.source import resolve

    if ternary and quantization not in (None, "ternary"):
        raise click.UsageError(f"--ternary and --quantization {quantization} exclude each other")
    quantization = "ternary" if ternary else quantization
    if quantization is None and report_file is not None:
        raise click.UsageError("--report is of --quantization, and none was asked for; add --ternary, or leave it out")
    if evaluate_bytes is not None and evaluate is None:
        raise click.UsageError("--evaluate-bytes is of --evaluate, and no text was named; add it, or leave both out")
    if evaluate_bytes is not None and evaluate_bytes < 1:
        raise click.UsageError(f"--evaluate-bytes is {evaluate_bytes}; expected at least 1")
    how = _ternarization(quantization, alpha, alpha_config, keep, method, scale)
    check_asked(quantization, how, calibration is not None)
    target = named(output)
    report_path = report_file or f"{target}.report.json"
    if quantization is not None:
        check_place(Path(report_path), target, choose(form, target, quantization, 0).folder)
    path = resolve(source, revision, file)
    held_out = read_text(Path(evaluate), evaluate_bytes, "--evaluate") if evaluate is not None else None
    calibrated = calibration is not None or (how is not None and how.calibrated)
    if not calibrated and (sequences is not None or sequence_length is not None):
        name = "--sequences" if sequences is not None else "--sequence-length"
        raise click.UsageError(
            f"{name} is of the calibration text, which nothing here reads; add --alpha auto, --method gptq or --calibration"
        )
    if quantization is not None and merge_adapter is None and (alone := weights_alone.tensors_alone(path)) is not None:
        weights_alone.check(path, alone, quantization, calibrated, tokenizer, i2_s)
    text = _calibration(path, i2_s, tokenizer, calibration, _or(sequences, 128), _or(sequence_length, 512)) if calibrated else None
    before: dict[str, Any] | None = None
    start = time.perf_counter()

    def ready() -> None:
        nonlocal before, start
        if held_out is not None:
            with naming(f"--evaluate {evaluate}"):
                before = _perplexity(path, held_out, i2_s, tokenizer, "before", merge_adapter)
            start = time.perf_counter()

    with (
        DelayedBar("calibrating") as calibrating,
        DelayedBar("writing", in_bytes=True) as writing,
        DelayedBar("verifying", in_bytes=False) as verifying,
    ):
        bars = {"calibrating": calibrating, "writing": writing, "verifying": verifying}
        report = convert(
            path,
            target,
            format=form,
            quantization=quantization,
            ternarization=how,
            calibration=text,
            tokenizer_json=tokenizer,
            allow_requantize=allow_requantize,
            verify_written=verify,
            i2_s=i2_s,
            merge_adapter=merge_adapter,
            progress=lambda what, done, total: bars[what](done, total),
            ready=ready,
        )
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    if quantization is not None and not report.layers:
        report = replace(report, notes=[*report.notes, f"nothing was quantized, so there is nothing to report: no {shown(report_path)}"])

    def say(*said: str) -> None:
        for line in said:
            click.echo(line, err=as_json)

    found = record(report, seconds, peak)
    if calibrated and calibration is None:
        say("note: calibrated on a built-in sample of some 600 tokens; give a longer text with --calibration FILE")
    say(*lines(report, seconds, peak), *table(report.layers))
    after = _perplexity(target, held_out, "x86", None, "after") if held_out is not None else None
    scores = {"evaluation": {"before": before, "after": after}} if after is not None else {}
    if report.layers:
        found |= quality(report, before, after) | scores
        say(found["verdict"])
        say(*_write_report(report, found, report_path))
        found["report"] = report_path
    elif before is not None and after is not None:
        found |= scores
        say(f"perplexity {before['perplexity']:,.3f} -> {after['perplexity']:,.3f}")
    if as_json:
        click.echo(json.dumps(found))


def _ternarization(
    quantization: str | None, alpha: str | None, alpha_config: str | None, keep: tuple[str, ...], method: str, scale: str
) -> Ternarization | None:
    """What the options ask for, None where none of them was given."""
    from bitnet.convert import Ternarization
    from bitnet.convert.quantize import check_patterns, read_alphas

    digits = scale.removeprefix("group:")
    unit = int(digits) if digits.isdecimal() and len(digits) < 10 else scale
    if quantization != "ternary" and alpha is None and alpha_config is None and not keep and method == "threshold" and unit == "tensor":
        return None
    try:
        number = alpha if alpha in (None, "auto") else float(str(alpha))
    except ValueError:
        raise click.UsageError(f"--alpha is {alpha!r}; expected a number, such as 0.05, or auto") from None
    check_patterns(keep, "--keep")
    alphas = tuple((pattern, "keep") for pattern in keep)
    return Ternarization(method, number, unit, alphas + (read_alphas(alpha_config) if alpha_config is not None else ()))


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _calibration(path: Path, i2_s: str, tokenizer: str | None, file: str | None, count: int, length: int) -> Any:
    """int32 [sequences, tokens] of the file's text, or of the built-in sample."""
    from bitnet import sample
    from bitnet.convert.layerwise import sequences
    from bitnet.errors import naming
    from bitnet.evaluate.perplexity import read_text
    from bitnet.models import canonical, open_checkpoint
    from bitnet.source import load_tokenizer

    if count < 1 or length < 2:
        raise click.UsageError(f"--sequences is {count}, --sequence-length {length}; expected at least 1 of at least 2 tokens")
    checkpoint = open_checkpoint(path, i2_s)
    config = canonical(checkpoint).config
    loaded = load_tokenizer(checkpoint, config.vocab_size, tokenizer)
    text = sample.text() if file is None else read_text(Path(file), count * length * MOST_BYTES, "--calibration")
    with naming(file or "the built-in sample"):
        return sequences(loaded.encode(text, add_special=False), loaded.prefix_ids, count, length, config.max_context)


def _perplexity(path: Path, text: str, i2_s: str, tokenizer: str | None, when: str, adapter: str | None = None) -> dict[str, Any]:
    from dataclasses import asdict

    from bitnet.cli.progress import DelayedBar
    from bitnet.evaluate.perplexity import score_text
    from bitnet.transformer import TernaryTransformer

    model = TernaryTransformer.from_pretrained(path, i2_s=i2_s, tokenizer=tokenizer, head="stored", adapter=adapter)
    with DelayedBar(f"perplexity {when}") as bar:
        return asdict(score_text(model, text, bar))


def quality(report: Report, before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """What quantizing has done, as plain values, with a verdict; before, after: scores of perplexity.Score."""
    from bitnet.convert import report as reports

    scheme = str(report.quantization)
    one, other = (None if score is None else score["perplexity"] for score in (before, after))
    said = reports.verdict(report.layers, scheme, one, other, after["tokens"] if after else 0, report.vocab_size)
    return reports.record(report.layers) | {"quantization": scheme, "verdict": said}


def _write_report(report: Report, found: dict[str, Any], path: str) -> list[str]:
    """Writes both files of the report; where they are, for people."""
    from bitnet.convert.report import draw, refuse_others, write_json
    from bitnet.tokenizer import replace_surrogates

    refuse_others(Path(path))
    write_json(path, {key: value for key, value in found.items() if key in REPORTED})
    picture = str(Path(path).with_suffix(".png"))
    title = replace_surrogates(f"{Path(report.source).name} as {report.quantization}, {report.format}")
    missing = draw(report.layers, Path(picture), title)
    return [f"report: {shown(path)}" + (f", {shown(picture)}" if missing is None else ""), *([f"note: {missing}"] if missing else [])]


def record(report: Report, seconds: float, peak_bytes: int | None) -> dict[str, Any]:
    """The report as plain values."""
    from bitnet.convert import merging

    losses = [{"weight": loss.name, "relative_error": loss.relative} for loss in report.losses]
    plain = {key: getattr(report, key) for key in ("source", "target", "format", "bytes", "tensors", "verified", "notes")}
    return {**plain, "requantized": losses, "merged": merging.record(report.merged), "seconds": seconds, "peak_rss_bytes": peak_bytes}


def lines(report: Report, seconds: float, peak_bytes: int | None) -> list[str]:
    """The report for people."""
    from bitnet.convert import merging

    found = [f"note: {note}" for note in report.notes] + (merging.lines(report.merged) if report.merged else [])
    if report.losses:
        total = sum(loss.total for loss in report.losses)
        error = (sum(loss.error for loss in report.losses) / total) ** 0.5 if total else 0.0
        worst = max(report.losses, key=lambda loss: loss.relative)
        found.append(
            f"requantized {len(report.losses)} weights: off by {error:.2e} of their norm, the worst by {worst.relative:.2e} ({worst.name})"
        )
    checked = "every weight read back and compared" if report.verified else "not verified"
    found.append(
        f"{shown(report.target)}: {report.format}, {report.bytes:,} bytes, {report.tensors} tensors, {checked}; {seconds:.1f} s, "
        f"peak memory {f'{peak_bytes / 1e6:,.0f} MB' if peak_bytes else 'unknown'}"
    )
    return found
