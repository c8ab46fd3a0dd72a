"""One run of a recipe, from texts to a model that runs; started again with the same folder it goes on where it was."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from bitnet.files.replacing import write_text
from bitnet.train.loop import train
from bitnet.train.recipe import Recipe


def run(recipe: Recipe, data: Path, out: Path, export: Path | None, evaluation: Path | None = None, card: Path | None = None) -> None:
    """Learn the tokenizer, train, and write `export`.

    `data`: folder of the recipe's texts. `out`: tokenizer, log and checkpoints. `evaluation`: folder of texts (*.txt) on which the exported
    model is scored. `card`: text of the model card, with {placeholders}.
    """
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "tokenizer.json"
    tokenizer, sources = recipe.sources(data, Tokenizer.from_file(str(saved)) if saved.exists() else None)
    write_text(saved, tokenizer.to_str())
    model = recipe.build_model()
    train(model, sources, recipe.schedule(), out)
    if export:
        from bitnet.train.export import export_run

        export_run(recipe, model, out, export, sorted(evaluation.glob("*.txt")) if evaluation else [], card)
