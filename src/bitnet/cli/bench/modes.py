"""What `bitnet bench` measures instead of one thing: --compare, --speculate, --tune."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bitnet.cli.bench.choices import SHAPE_HEADS
from bitnet.cli.bench.source import build, sample_ids
from bitnet.cli.options import EMBEDDED_MODEL


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
            shape,
            names,
            head=head,
            threads=threads,
            prompt_tokens=512 if prompt_tokens is None else prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            progress=bar,
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
    from bitnet.source import load_tokenizer, resolve

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


def tuned(name: str) -> dict[str, Any]:
    """Measures all candidates, prints them, saves the choice, and gives the JSON object."""
    from bitnet.bench.tune import RULE, candidates, fastest
    from bitnet.cli.progress import DelayedBar
    from bitnet.models import open_checkpoint
    from bitnet.source import resolve
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
