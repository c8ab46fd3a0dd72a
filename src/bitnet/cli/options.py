"""The options that several commands share, each spelled once. The ranges are checked where the values are used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])
EMBEDDED_MODEL = "tinyllm-ternary-v2"  # bitnet.source.EMBEDDED_MODEL, which would import numpy


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_argument = click.argument("model", metavar="[MODEL]", default=EMBEDDED_MODEL)
json_option = click.option("--json", "as_json", is_flag=True, help="End with one JSON object on the last line of stdout.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
threads_option = click.option("--threads", type=int, metavar="N", help="Threads. Default: as tuned, else one per core.")

_tokenizer = click.option("--tokenizer", metavar="FILE", help="A tokenizer.json. Default: the model's own.")
adapter_option = click.option(
    "--adapter", metavar="PATH", help="A low-rank adapter (LoRA) to run beside the weights: a folder of PEFT's, or llama.cpp's .gguf."
)

_prompt = click.option("--prompt", "-p", required=True, metavar="TEXT", help="The text to continue.")

max_context_option = click.option(
    "--max-context", type=int, metavar="N", help="Tokens that a context may hold. Default: as many as the model was made for."
)
kv_options = _all(  # kv_bits, kv_bits_k, kv_bits_v, kv_group_size
    click.option("--kv-bits", type=int, default=16, show_default=True, metavar="BITS", help="Bits per value of the KV cache: 16, 8 or 4."),
    click.option("--kv-bits-k", type=int, metavar="BITS", help="Of keys alone. Default: --kv-bits."),
    click.option("--kv-bits-v", type=int, metavar="BITS", help="Of values alone. Default: --kv-bits."),
    click.option("--kv-group-size", type=int, default=64, show_default=True, metavar="N", help="Values per scale in a quantized KV cache."),
)

_engine = [
    threads_option,
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu; or cuda, cuda:N or mps, with torch."),
    kv_options,
    click.option(
        "--max-context", type=int, metavar="N", help="Tokens that a context may hold. Default: as many as the model was made for."
    ),
    click.option("--zero-skip/--no-zero-skip", default=None, help="Do not read what zero gates make irrelevant. Default: if it pays."),
    click.option(
        "--head",
        type=click.Choice(["stored", "int8", "int4"]),
        help="The head: as stored, int8 or int4. Default: as `bitnet bench --tune` chose, else as stored.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["stored", "f16", "int8", "int4", "fp4", "binary", "ternary"]),
        default="stored",
        show_default=True,
        help="Linear layers: as stored (block formats become int8), f16 with float32 activations, or quantized while loading.",
    ),
    click.option(
        "--activation-group",
        type=int,
        metavar="N",
        help="Inputs that share an int8 step; 0: one step per token. Default: 0 for ternary and binary weights, else 32.",
    ),
    adapter_option,
    _tokenizer,
    click.option("--i2-s", type=click.Choice(["x86", "arm"]), default="x86", help="How a GGUF's I2_S tensors were written; arm is rare."),
]

_sampling = [
    click.option("--prefix-cache-bytes", type=int, metavar="N", help="Memory to keep the beginnings of earlier prompts in; 0: none."),
    click.option("--max-new-tokens", "-n", type=int, default=200, show_default=True, metavar="N", help="Tokens to generate at most."),
    click.option("--temperature", type=float, default=0.8, show_default=True, metavar="T", help="0 is greedy."),
    click.option(
        "--top-p", type=float, default=0.95, show_default=True, metavar="P", help="Keep the likeliest tokens up to this probability."
    ),
    click.option("--top-k", type=int, default=0, show_default=True, metavar="K", help="Keep the K likeliest tokens; 0 is off."),
    click.option(
        "--min-p", type=float, default=0.0, show_default=True, metavar="P", help="Keep tokens of P times the largest probability."
    ),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, metavar="R", help="Above 1: avoid seen tokens."),
    click.option("--seed", type=int, metavar="N", help="Same seed, same text. Default: a fresh one."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
    click.option(
        "--speculate/--no-speculate",
        default=None,
        callback=lambda _context, _option, given: "auto" if given is None else given,
        help="Guess tokens from the text so far and check several at once: the same text, sooner. Default: on the CPU, where it pays.",
    ),
]


def ternary_options(function: F) -> F:
    """The article's --quantization ternary and --ternary, of commands that have --weights: the same as --weights ternary."""

    @functools.wraps(function)
    def with_weights(*args: Any, quantization: str | None, ternary: bool, weights: str | None, **rest: Any) -> Any:
        if ternary or quantization:
            if weights not in (None, "stored", "ternary"):
                raise click.UsageError(f"--ternary and --weights {weights} exclude each other")
            weights = "ternary"
        return function(*args, weights=weights, **rest)

    return _all(
        click.option("--quantization", type=click.Choice(["ternary"]), help="The same as --weights ternary."),
        click.option("--ternary", is_flag=True, help="The same; what is ternary already stays what it is."),
    )(cast(F, with_weights))


def engine_options(function: F) -> F:
    """As keyword arguments: threads, device, those of kv_options, zero_skip, head, weights, activation_group, adapter, i2_s."""
    return _all(*_engine)(ternary_options(function))


hub_options = _all(  # revision, file
    click.option("--revision", metavar="REV", help="Of a model from the Hub: its branch, tag or commit. Default: main."),
    click.option("--file", metavar="FILE", help="Of a model from the Hub: this .gguf or .safetensors."),
)
conversion_options = _all(  # the keyword arguments of bitnet.cli.convert.convert_model
    click.option(
        "--format", "form", metavar="FORMAT", help="What to write. Default: by the target's name. `bitnet convert --help` lists them."
    ),
    click.option(
        "--quantization",
        type=click.Choice(["ternary", "binary", "int8", "int4", "fp4", "fp16"]),
        help="Bring the weights into this. Default: keep what is there.",
    ),
    click.option("--ternary", is_flag=True, help="The same as --quantization ternary."),
    click.option(
        "--alpha", metavar="A", help="Of ternary: weights up to A x mean|W| become 0; or auto. Default: the article's, by kind of layer."
    ),
    click.option("--alpha-config", metavar="FILE", help="Alphas by pattern of layers' names, in JSON or YAML; before --alpha."),
    click.option("--keep", multiple=True, metavar="PATTERN", help="Layers to leave as they are, such as embedding. Repeatable."),
    click.option(
        "--method", type=click.Choice(["threshold", "absmean", "gptq"]), default="threshold", show_default=True, help="Of ternary."
    ),
    click.option(
        "--scale", default="tensor", show_default=True, metavar="UNIT", help="Of ternary: what shares a scale: tensor, row, or group:N."
    ),
    click.option("--calibration", metavar="FILE", help="Text for --alpha auto and gptq, and for outputs' errors. Default: a short sample."),
    click.option("--sequences", type=int, metavar="N", help="Of the calibration text, at most. Default: 128."),
    click.option("--sequence-length", type=int, metavar="N", help="Tokens of each. Default: 512."),
    click.option("--evaluate", metavar="FILE", help="A text on which to measure perplexity before and after."),
    click.option("--evaluate-bytes", type=int, metavar="N", help="Only its first N bytes."),
    click.option("--report", "report_file", metavar="FILE", help="Where the report goes as JSON. Default: TARGET.report.json."),
    _tokenizer,
    click.option("--merge-adapter", metavar="PATH", help="Add a low-rank adapter to the weights, and print what survives of it."),
    click.option("--allow-requantize", is_flag=True, help="Accept what a format cannot hold exactly, and print the error."),
    click.option("--verify/--no-verify", default=True, show_default=True, help="Read what was written and compare every weight."),
    click.option("--i2-s", type=click.Choice(["x86", "arm"]), default="x86", help="How a GGUF's I2_S tensors were written; arm is rare."),
)
generation_options = _all(_prompt, *_sampling)  # prompt, and the keyword arguments of TernaryTransformer.stream
output_options = _all(json_option, debug_option)  # as_json


def zero_skip_argument(flag: bool | None) -> bool | str:
    """The command line's flag as the Python argument: "auto" where neither was given."""
    return "auto" if flag is None else flag
