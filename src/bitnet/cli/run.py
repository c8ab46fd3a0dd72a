"""`bitnet run`: continue a prompt, streaming the text to stdout; a summary to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.errors import INTERRUPTED
from bitnet.cli.options import engine_options, generation_options, hub_options, model_argument, output_options, zero_skip_argument

if TYPE_CHECKING:
    from bitnet.generation import GenerationStream, Timings
    from bitnet.transformer import TernaryTransformer

# C0 and C1 control characters but newline and tab: a model's text must not steer the terminal.
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@click.command("run", short_help="Continue a prompt.")
@model_argument
@hub_options
@generation_options
@click.option("--chat", is_flag=True, help="The prompt is a user's message: answer it, in the model's own chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message before it.")
@click.option("--chat-template", metavar="FILE", help="With --chat: a Jinja template instead of the model's own.")
@engine_options
@output_options
def command(model: str, **options: Any) -> None:
    """Continue a prompt.

    MODEL is the embedded model's name (the default), a folder in Hugging Face layout, one file, or org/name from the Hub.
    """
    continue_prompt(model, **options)


def continue_prompt(
    source: str, *, prompt: str, as_json: bool, threads: int | None, device: str, kv_bits: int, kv_group_size: int, zero_skip: bool | None,
    kv_bits_k: int | None = None, kv_bits_v: int | None = None, prefix_cache_bytes: int | None = None,
    max_context: int | None = None,
    head: str | None, weights: str, activation_group: int | None, i2_s: str, adapter: str | None = None, tokenizer: str | None = None,
    revision: str | None = None, file: str | None = None, chat: bool = False, system: str | None = None,
    chat_template: str | None = None, **sampling: Any,
) -> None:  # fmt: skip
    """Loads, generates, shows. `sampling`: the keyword arguments of `TernaryTransformer.stream`."""
    from bitnet.tokenizer import replace_surrogates
    from bitnet.transformer import TernaryTransformer

    if (system is not None or chat_template is not None) and not chat:
        raise click.UsageError("--system and --chat-template are for --chat; a plain prompt has neither")
    model = TernaryTransformer.from_pretrained(
        source,
        kv_bits=kv_bits,
        kv_bits_k=kv_bits_k,
        kv_bits_v=kv_bits_v,
        kv_group_size=kv_group_size,
        prefix_cache_bytes=prefix_cache_bytes,
        max_context=max_context,
        device=device,
        threads=threads,
        zero_skip=zero_skip_argument(zero_skip),
        head=head,
        weights=weights,
        activation_group=activation_group,
        i2_s=i2_s,
        tokenizer=tokenizer,
        revision=revision,
        file=file,
        adapter=adapter,
    )
    if chat_template is not None:
        model.chat_template = template_of(chat_template)
    stream = model.stream(conversation(prompt, system) if chat else prompt, **sampling)
    waited_s = time.perf_counter() - click.get_current_context().find_root().obj
    interrupted = False
    try:
        show(stream, None if as_json else replace_surrogates(prompt))
    except KeyboardInterrupt:
        interrupted = True
    timings = stream.generation.timings
    if timings["time_to_first_token_s"] is not None:
        timings["time_to_first_token_s"] += waited_s  # from the start of the process: what the user waited
    click.echo(summary(timings), err=True)
    if model.zero_skip is not None and model.engine.can_skip_zeros:
        click.echo(f"zero skipping {model.zero_skip.text()}", err=True)
    if (did := stream.generation.speculated) is not None and did.drafted:
        click.echo(
            f"speculation: {did.accepted} of {did.drafted} guesses right, {did.accepted / did.forwards + 1:.2f} tokens a forward", err=True
        )
    if model.head_tuned is not None:
        click.echo(model.head_tuned.notice(), err=True)
    if as_json:
        click.echo(json.dumps(record(source, model, stream, timings), allow_nan=False))
    if interrupted:
        sys.exit(INTERRUPTED)


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    """One turn: a system message, if there is one, and a user's."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def template_of(path: str) -> Any:
    from bitnet.chat import MAX_TEMPLATE_CHARACTERS, ChatTemplate
    from bitnet.files import read_file

    return ChatTemplate(read_file(path, 4 * MAX_TEMPLATE_CHARACTERS).decode(errors="replace"), where=path)


def show(stream: GenerationStream, prompt: str | None) -> None:
    """Writes prompt and text to stdout as they come, nothing if `prompt` is None. Leaves the cursor at the start of a line."""
    out = sys.stdout
    terminal = out.isatty()
    last = "\n"

    def write(text: str, dim: bool = False) -> None:
        nonlocal last
        shown = text.translate(_CONTROL) if terminal else text
        out.write(click.style(shown, dim=True) if dim else shown)
        out.flush()
        last = text[-1:] or last

    if prompt is None:
        for _ in stream:
            pass
        return
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")  # an ASCII terminal shows "?" for what it cannot
    try:
        write(prompt, dim=terminal and "NO_COLOR" not in os.environ)
        for piece in stream:
            write(piece)
    except BrokenPipeError:
        last = "\n"
        raise
    finally:
        if last != "\n":
            write("\n")


def summary(t: Timings) -> str:
    """Two lines for stderr."""

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f} tokens/s"

    first = t["time_to_first_token_s"]
    per_token = f" ({t['ms_per_token']:.2f} ms each)" if t["ms_per_token"] else ""
    return (
        f"prompt: {t['prompt_tokens']} tokens, {rate(t['prefill_tok_s'])}; "
        f"decode: {t['generated_tokens']} tokens, {rate(t['decode_tok_s'])}{per_token}\n"
        f"first token: {'-' if first is None else f'{first:.2f} s after the start'}; load: {t['load_s']:.2f} s"
    )


def zero_skip_record(model: TernaryTransformer) -> dict[str, Any] | None:
    """What was decided about skipping, and what share of the rows and columns was read since."""
    if model.zero_skip is None:
        return None
    rows, rows_read, columns, columns_read = model.engine.lines()
    read = {"up_rows_read": rows_read / rows if rows else None, "down_columns_read": columns_read / columns if columns else None}
    return {**model.zero_skip.record(), **read}


def record(source: str, model: TernaryTransformer, stream: GenerationStream, timings: Timings) -> dict[str, Any]:
    """The JSON object of `run --json`."""
    from bitnet import machine

    done, engine = stream.generation, model.engine
    return {
        "model": source,
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "isa": engine.isa,
        "codec": engine.codec,
        "head": engine.head,
        "threads": engine.threads,
        **timings,
        "weight_bytes_per_token": engine.weight_bytes_per_token,
        "bandwidth_gb_s": engine.weight_bytes_per_token * timings["decode_tok_s"] / 1e9 if timings["decode_tok_s"] else None,
        "kv": {"key_bits": engine.kv.key_bits, "value_bits": engine.kv.value_bits, "bytes_per_token": engine.kv_bytes_per_token},
        "reused_tokens": done.reused_tokens,
        "speculation": None if done.speculated is None else asdict(done.speculated),
        "zero_skip": zero_skip_record(model),
        "peak_rss_bytes": machine.peak_rss_bytes(),
    }
