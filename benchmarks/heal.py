"""Quality against tokens of healing: a model whose layers become ternary, then 0, 0.1, 0.3, 1 and 3 million tokens of training.

    python benchmarks/heal.py --base runs/twin-fp16/model --data TEXTS --eval EVAL_TEXTS --out RUNS --picture heal.png

Every budget is a run of its own (recipes/heal.yaml, the rate decaying to zero), in RUNS/heal-TOKENS; one that was stopped goes on. 0 tokens
is `bitnet convert` with the same rule. The line is what the base itself scores. All are measured by the engine.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitnet.convert import Ternarization, convert
from bitnet.evaluate.perplexity import read_text, score_text
from bitnet.train.recipe import Recipe
from bitnet.train.run import run
from bitnet.transformer import TernaryTransformer


def budget(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe for so many tokens; of small budgets steps are smaller, so that there are at least 24 of them."""
    schedule = recipe.training
    batch = min(schedule.batch_tokens, max(recipe.context, 1 << int(math.log2(max(1, tokens / 24)))))
    steps = max(1, round(tokens / batch))
    changed = replace(
        schedule, steps=steps, batch_tokens=batch, warmup_steps=max(1, steps // 20), decay_steps=max(1, steps // 2), blend_steps=steps // 4
    )
    return replace(recipe, training=changed)


def scores(model: Path, texts: list[Path], max_bytes: int | None) -> dict[str, float]:
    loaded = TernaryTransformer.from_pretrained(model)
    return {p.name: score_text(loaded, read_text(p, max_bytes)).bits_per_byte for p in texts}


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    places = {int(t): max(float(t), 3e4) for t in results["healed"]}
    for i, (text, base) in enumerate(results["base"].items()):
        points = sorted((places[int(t)], s[text]) for t, s in results["healed"].items())
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=text)
        axes.axhline(base, color=f"C{i}", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="tokens of training", ylabel="bits per byte", title="Healing; dashed: the base")
    axes.set_xticks(list(places.values()), [f"{t / 1e6:g} M" if t else "none" for t in places])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, help="a model with float weights")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "heal.yaml")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--max-bytes", type=int, help="of each text")
    parser.add_argument("--tokens", default="100000,300000,1000000,3000000")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; heal.json goes there, too")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    recipe = Recipe.load(args.recipe, [f"base_model={args.base}", *args.set])
    texts = sorted(args.eval.glob("*.txt"))
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"base": scores(Path(args.base), texts, args.max_bytes), "healed": {}}
    bare = args.out / "heal-0"
    convert(
        args.base, bare, quantization="ternary", ternarization=Ternarization("absmean", alphas=(("embedding", "keep"), ("head", "keep")))
    )
    results["healed"]["0"] = scores(bare, texts, args.max_bytes)
    for tokens in map(int, args.tokens.split(",")):
        model = run(budget(recipe, tokens), args.data, args.out / f"heal-{tokens}", report=lambda row: print(row, flush=True))
        results["healed"][str(tokens)] = scores(model, texts, args.max_bytes)
        (args.out / "heal.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(results, args.picture)
    print("| tokens | " + " | ".join(p.name for p in texts) + " |\n|---|" + "---|" * len(texts))
    for name, row in [*results["healed"].items(), ("the base", results["base"])]:
        print(f"| {name} | " + " | ".join(f"{row[p.name]:.3f}" for p in texts) + " |")


if __name__ == "__main__":
    main()
