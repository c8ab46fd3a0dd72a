"""`bitnet train` and the console script `bitnet-trainer`: a recipe, texts, and a folder for the run, which goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bitnet import __version__
from bitnet.cli.errors import Guarded
from bitnet.cli.options import output_options
from bitnet.errors import UsageError
from bitnet.machine import require_numpy

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--config", required=True, type=Path, metavar="FILE", help="The recipe, a YAML file."),
    click.option(
        "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of what the recipe says: scheme=binary. Repeatable."
    ),
    click.option(
        "--quantization",
        type=click.Choice(["ternary", "binary", "fp16"]),
        help="Instead of the recipe's scheme; of an adapter: its A and B.",
    ),
    click.option("--ternary", is_flag=True, help="The same as --quantization ternary."),
    click.option("--data", type=Path, metavar="PATH", help="What to train on: the folder of the recipe's files, or one file."),
    click.option("--out", type=Path, metavar="FOLDER", help="The run, which is resumed from here. Default: runs/ and the config's name."),
    click.option("--export", type=Path, metavar="FOLDER", help="Write the model (or adapter) here. Default: OUT/model (OUT/adapter)."),
    click.option(
        "--eval",
        "evaluation",
        multiple=True,
        type=Path,
        metavar="PATH",
        help="Held-out texts (a folder of *.txt, a file; a .tsv) to score it on. Repeatable.",
    ),
    click.option("--card", type=Path, metavar="FILE", help="Text of the model card, with {placeholders}. Default: a plain one."),
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu; or cuda, cuda:N, mps."),
    click.option("--parallel", "spread", type=click.Choice(["ddp", "fsdp"]), default="ddp", show_default=True, help="Under torchrun."),
)


def _options(function: F) -> F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command("train", short_help="Train a model by a recipe.")
@_options
@output_options
def command(**options: Any) -> None:
    """Train a model by a recipe. The same command again resumes where the run was, after whatever ended it.

    On several processes or machines: torchrun --nproc-per-node N -m bitnet train --config ...
    """
    train(**options)


@click.command("bitnet-trainer", cls=Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@_options
@output_options
@click.version_option(__version__, prog_name="bitnet-trainer")
def trainer(**options: Any) -> None:
    """Train a model by a recipe."""
    require_numpy()
    train(**options)


def trainer_main() -> None:
    """The console script `bitnet-trainer`."""
    trainer(prog_name="bitnet-trainer")


def train(
    config: Path, changes: tuple[str, ...], quantization: str | None, ternary: bool, data: Path | None, out: Path | None,
    export: Path | None, evaluation: tuple[Path, ...], card: Path | None, device: str, spread: str, as_json: bool,
) -> None:  # fmt: skip
    """Trains, and shows how it goes on stderr: a bar on a terminal, else a line for every tenth step."""
    import sys

    from bitnet.cli.progress import DelayedBar

    if ternary and quantization not in (None, "ternary"):
        raise click.UsageError(f"--ternary and --quantization {quantization} exclude each other")
    if config.is_dir():
        raise UsageError(f"{config}: is a folder; --config names a recipe, a YAML file in it")
    if not config.is_file():
        raise UsageError(f"{config}: not found; --config names a recipe, a YAML file (recipes/ has some)")
    for path in (*evaluation, card):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: not found")
    try:
        from bitnet.train.recipe import Recipe

        recipe = Recipe.load(config, changes, "ternary" if ternary else quantization)
        from bitnet.train.run import run
    except ImportError as error:
        raise UsageError(f"training needs {error.name}, which is not installed: pip install 'bitnet-ternary[train]'") from None
    if data is None:
        raise UsageError(f"nothing to train on: add --data, {_data_of(recipe.task)}")
    last: dict[str, Any] = {}
    with DelayedBar(recipe.name) as bar:

        def report(row: dict[str, Any]) -> None:
            last.update(row)
            if sys.stderr.isatty():
                bar(row["step"], recipe.training.steps)
            else:
                click.echo(" ".join(f"{k} {v}" for k, v in row.items()), err=True)

        target = run(recipe, data, out or Path("runs") / config.stem, export, evaluation, card, device, spread, report)
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks for all
        said = f"{target}: {recipe.task}, {recipe.trained}"
        if not last:
            click.echo(f"{said}, complete")
        else:
            share = f", {float(last['share_of_peak']):.1%} of the rate of a large matrix product here" if "share_of_peak" in last else ""
            click.echo(f"{said}, loss {last['loss']} after {last['step']} steps; {int(last['tokens_per_second']):,} tokens/s{share}")
        if as_json:
            click.echo(json.dumps({"model": str(target), "task": recipe.task, "scheme": recipe.trained, **last}))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # All is written. At an orderly exit a thread of torch that still runs can abort the process ("terminate called without an active
        # exception"), and torchrun then calls the whole run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _data_of(task: str) -> str:
    return {
        "lora": "a text file, or conversations in .jsonl",
        "instruct": "conversations in .jsonl",
        "classify": "a folder with train.tsv, or a .tsv",
    }.get(task, "a folder of text files, or one file")
