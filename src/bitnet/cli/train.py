"""`bitnet train`: a recipe, texts, and a folder for the run, which goes on where it was when it is started again."""

from __future__ import annotations

from pathlib import Path

import click

from bitnet.cli.options import debug_option
from bitnet.errors import UsageError


@click.command("train", short_help="Train a model by a recipe.")
@click.option("--config", required=True, type=Path, metavar="FILE", help="The recipe, a YAML file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of what the recipe says: scheme=binary. Repeatable.")
@click.option("--data", type=Path, required=True, metavar="FOLDER", help="Folder of the recipe's text files.")
@click.option("--out", type=Path, required=True, metavar="FOLDER", help="The run: tokenizer, log, checkpoints. It is resumed from here.")
@click.option("--export", type=Path, metavar="FOLDER", help="Write the trained model here. Default: OUT/model.")
@click.option("--eval", "evaluation", type=Path, metavar="FOLDER", help="Texts (*.txt) on which the exported model is scored.")
@click.option("--card", type=Path, metavar="FILE", help="Text of the model card, with {placeholders}.")
@debug_option
def command(
    config: Path, changes: tuple[str, ...], data: Path, out: Path, export: Path | None, evaluation: Path | None, card: Path | None
) -> None:
    """Train a model by a recipe. The same command again resumes where the run was, after whatever ended it."""
    try:
        from bitnet.train.recipe import Recipe
        from bitnet.train.run import run
    except ImportError as error:
        raise UsageError(f"training needs {error.name}: pip install 'bitnet-ternary[train]'") from None
    run(Recipe.load(config, changes), data, out, export or out / "model", evaluation, card)
