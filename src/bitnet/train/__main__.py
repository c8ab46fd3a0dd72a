"""From text to a model that runs: `python -m bitnet.train RECIPE --data TEXTS --out RUN --export FOLDER --eval TEXTS`.

Learns the tokenizer, trains (resuming where RUN left off), and writes FOLDER in Hugging Face layout with packed ternary weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from bitnet.train.loop import train
from bitnet.train.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bitnet.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the recipe's text files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: tokenizer, log, checkpoint")
    parser.add_argument("--export", type=Path, help="write the trained model here")
    parser.add_argument("--eval", type=Path, help="folder of texts (*.txt) to score the exported model on")
    parser.add_argument("--card", type=Path, help="text of the model card, with {placeholders}")
    args = parser.parse_args()

    recipe = Recipe.load(args.recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    saved = args.out / "tokenizer.json"
    tokenizer, sources = recipe.sources(args.data, Tokenizer.from_file(str(saved)) if saved.exists() else None)
    tokenizer.save(str(saved), pretty=False)
    model = recipe.build_model()
    train(model, sources, recipe.schedule(), args.out)
    if args.export:
        from bitnet.train.export import export_run

        export_run(recipe, model, args.out, args.export, sorted(args.eval.glob("*.txt")) if args.eval else [], args.card)


if __name__ == "__main__":
    main()
