"""What training costs, and what clipping does to gradients. Three measurements, a JSON line each at the end:

python benchmarks/training.py speed --data TEXTS        # step time of the twins' shape: fp16, ternary, binary, in turns, compiled
python benchmarks/training.py clip --data TEXTS --picture clip.png      # variance of gradient norms, by estimator
python benchmarks/training.py lora --base MODEL --data TEXT --eval HELD_OUT     # memory, trained share, quality: ternary LoRA, LoRA, whole
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitnet.evaluate.perplexity import read_text, score_text
from bitnet.train import data, loop
from bitnet.train.layers import Quantization, TernarySTE, ternarize_model
from bitnet.train.models import new_model, quickest_attention
from bitnet.train.recipe import Recipe
from bitnet.train.run import run
from bitnet.transformer import TernaryTransformer

TWINS = Path(__file__).parents[1] / "recipes" / "twins.yaml"


def source(texts: Path, vocab_size: int, place: Path) -> data.Source:
    """A small corpus in the twins' vocabulary size."""
    file = next(iter(data.files_of(texts, ["fairytales.txt"])))
    tokenizer = data.train_tokenizer(data.whole_documents(file), vocab_size)
    return data.pack(file, tokenizer, [0], 0, place)


def speed(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """tokens/s of one whole step (batch, forward, backward, optimizers), medians of rounds in which the schemes take turns."""
    recipe = Recipe.load(TWINS)
    shape, found = recipe.model, {}
    assert shape is not None
    schedule = replace(recipe.training, mixture=None, decay_mixture=None, batch_tokens=args.batch_tokens)
    batches = loop.windows([source(args.data, recipe.vocab_size, place)], schedule, recipe.context, 0)
    steps = {}
    for scheme in ("fp16", "ternary", "binary"):
        model = new_model(shape, recipe.vocab_size, recipe.context, recipe.seed)
        quickest_attention(model, schedule.bf16, recipe.context)
        if scheme != "fp16":
            ternarize_model(model, quantization=recipe.quantization.quantization(scheme))
        steps[scheme] = (model, loop.optimizers(model, schedule), torch.compile(loop._loss, dynamic=False))
    times: dict[str, list[float]] = {scheme: [] for scheme in steps}
    for number in range(args.rounds + 2):
        for scheme, (model, optims, compiled) in steps.items():
            for inner in range(3):
                tokens, targets = (torch.from_numpy(a) for a in batches(number * 3 + inner))
                start = time.perf_counter()
                compiled(model, tokens, targets, tokens.numel()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for o in optims:
                    o.step()
                    o.zero_grad(set_to_none=True)
                if number >= 2:
                    times[scheme].append(time.perf_counter() - start)
    for scheme, seconds in times.items():
        middle = statistics.median(seconds)
        found[scheme] = {"tokens_per_s": args.batch_tokens / middle, "step_s": middle, "spread_s": [min(seconds), max(seconds)]}
        slower = middle / statistics.median(times["fp16"]) - 1
        print(f"{scheme}: {args.batch_tokens / middle:,.0f} tokens/s, {slower:+.1%} time a token against fp16")
    return {"speed": found, "context": recipe.context, "batch_tokens": args.batch_tokens, "threads": torch.get_num_threads()}


class ArticleLinear(nn.Linear):
    """The article's layer: TernarySTE on the weights themselves, times mean|W|; clip None is the plain estimator."""

    threshold, clip = 0.1, 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.detach().abs().mean()
        clip = float("inf") if self.clip is None else self.clip
        return nn.functional.linear(x, TernarySTE.apply(self.weight, self.threshold, clip) * scale, self.bias)


def clip(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Variance, over the last half of the steps, of the norm of all matrices' gradients, before any clipping of norms.

    `article`: TernarySTE with threshold 0.1 and the gradient where |w| <= 0.3, weights as they are and starting at std 0.2, so that the
    clip meets some. (At the usual std 0.02 all weights lie below the threshold: every branch is zero, and so is every gradient.)
    `absmean`: our layers, the clip at 3 mean|W| of the start.
    """
    recipe = Recipe.load(TWINS)
    assert recipe.model is not None
    shape = replace(recipe.model, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
    schedule = replace(
        recipe.training,
        mixture=None,
        decay_mixture=None,
        batch_tokens=2048,
        context=128,
        decay_context=None,
        steps=args.steps,
        decay_steps=1,
    )
    batches = loop.windows([source(args.data, 2048, place)], schedule, 128, 0)
    found: dict[str, Any] = {}
    for setting, std in (("article, std 0.2", 0.2), ("absmean, std 0.02", 0.02)):
        for name in ("plain", "clipped"):
            for seed in range(args.seeds):
                model = new_model(shape, 2048, 128, seed)
                layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
                for n in layers:
                    old = model.get_submodule(n)
                    with torch.no_grad():
                        old.weight.mul_(std / 0.02)
                    if setting.startswith("article"):
                        new = ArticleLinear(old.in_features, old.out_features, bias=False, device="meta")
                        new.weight, new.clip = old.weight, (0.3 if name == "clipped" else None)
                        model.set_submodule(n, new)
                if not setting.startswith("article"):
                    mean = float(model.get_submodule(layers[0]).weight.abs().mean())
                    ternarize_model(model, quantization=Quantization(clip=3 * mean if name == "clipped" else None))
                matrices = [model.get_submodule(n).weight for n in layers]
                optim = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
                norms, losses = [], []
                for step in range(args.steps):
                    tokens, targets = (torch.from_numpy(a) for a in batches(step + 10_000 * seed))
                    loss = loop._loss(model, tokens, targets, tokens.numel())
                    loss.backward()
                    norms.append(float(torch.stack([p.grad.norm() for p in matrices]).norm()))
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optim.step()
                    optim.zero_grad(set_to_none=True)
                    losses.append(loss.item())
                found.setdefault(setting, {}).setdefault(name, []).append({"norms": norms, "loss": float(np.mean(losses[-20:]))})
    print("| layers | variance of norms, plain | clipped | ratio | ratio of ln(norm)'s | loss, plain | clipped |")
    print("|---|---|---|---|---|---|---|")
    summary: dict[str, Any] = {}
    for setting, kinds in found.items():
        half = {k: np.array([r["norms"][args.steps // 2 :] for r in rows]) for k, rows in kinds.items()}
        variance = {k: float(v.var(axis=1).mean()) for k, v in half.items()}
        logs = {k: float(np.log(v).var(axis=1).mean()) for k, v in half.items()}
        loss = {k: float(np.mean([r["loss"] for r in rows])) for k, rows in kinds.items()}
        ratio, log_ratio = variance["plain"] / variance["clipped"], logs["plain"] / logs["clipped"]
        summary[setting] = {"variance": variance, "ratio": ratio, "log_ratio": log_ratio, "loss": loss}
        print(
            f"| {setting} | {variance['plain']:.4g} | {variance['clipped']:.4g} | {ratio:.2f} | {log_ratio:.2f} | {loss['plain']:.3f} "
            f"| {loss['clipped']:.3f} |"
        )
    if args.picture:
        _draw_norms(found, args.picture)
    return {"clip": summary, "steps": args.steps, "seeds": args.seeds}


def _draw_norms(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.4), dpi=100)
    for axes, (setting, kinds) in zip(every, found.items(), strict=True):
        for kind, rows in kinds.items():
            axes.plot(rows[0]["norms"], linewidth=0.8, label=kind)
        axes.set(title=setting, xlabel="step", ylabel="norm of the gradients", yscale="log")
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def lora(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Each in a process of its own: peak memory above the libraries, trained share, seconds, and bits per byte of a held-out text."""
    kinds = {
        "ternary LoRA": {"task": "lora", "rank": 8, "alpha": 16, "quantize": "ternary"},
        "LoRA": {"task": "lora", "rank": 8, "alpha": 16, "quantize": "none"},
        "whole model": {"task": "heal", "scheme": "ternary"},
    }
    found = {}
    for name, values in kinds.items():
        settings = {"steps": args.steps, "batch_tokens": 2048, "warmup_steps": 10, "decay_steps": max(1, args.steps // 2)}
        settings |= {"compile": False, "micro_batch": args.micro_batch}
        recipe = {**values, "base_model": args.base, "context": 256, "training": settings}
        words = [sys.executable, __file__, "one", "--data", str(args.data), "--recipe", json.dumps(recipe), "--out", str(place / name)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        made = place / name / ("adapter" if values["task"] == "lora" else "model")
        adapted = TernaryTransformer.from_pretrained(
            args.base if values["task"] == "lora" else made, adapter=made if "rank" in values else None
        )
        found[name]["bits_per_byte"] = score_text(adapted, read_text(args.eval, args.max_bytes)).bits_per_byte
    before = score_text(TernaryTransformer.from_pretrained(args.base), read_text(args.eval, args.max_bytes)).bits_per_byte
    gained = before - found["whole model"]["bits_per_byte"]
    print("| | peak memory, MB | trained | share | seconds of CPU | bits per byte | of the whole's gain |\n|---|---|---|---|---|---|---|")
    print(f"| the base | | | | | {before:.3f} | |")
    for name, f in found.items():
        print(
            f"| {name} | {f['peak_mb']:,.0f} | {f['trained']:,} | {f['trained'] / f['parameters']:.1%} | {f['cpu_seconds']:.0f} "
            f"| {f['bits_per_byte']:.3f} | {(before - f['bits_per_byte']) / gained:.0%} |"
        )
    return {"lora": found, "base": args.base, "bits_per_byte": before, "steps": args.steps}


def one(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One run of `lora`, in this process."""
    recipe, rows = Recipe.parse(json.loads(args.recipe), "recipe"), []
    import peft  # noqa: F401  so that the libraries are in memory before

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = time.process_time()
    run(recipe, args.data, args.out, report=rows.append)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    state = torch.load(args.out / f"checkpoint-{recipe.training.steps}.pt", weights_only=True)
    trained = sum(p.numel() for p in state["model"].values())
    from bitnet.train.models import Base

    base = Base(str(recipe.base_model))
    every = sum(b.numel() for n, b in base.model.state_dict().items() if not n.endswith("scales") and n != "lm_head.weight")
    return {
        "peak_mb": peak - before, "libraries_mb": before, "trained": trained,
        "parameters": every, "cpu_seconds": seconds, "first": float(rows[0]["loss"]), "last": float(rows[-1]["loss"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["speed", "clip", "lora", "one"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval", type=Path, help="lora: a held-out text")
    parser.add_argument("--max-bytes", type=int, help="lora: of it")
    parser.add_argument("--micro-batch", type=int, default=0, help="lora: windows at once; 0: all")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base", default="tinyllm-ternary-v2")
    parser.add_argument("--recipe")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({"speed": speed, "clip": clip, "lora": lora, "one": one}[args.what](args, Path(place))))


if __name__ == "__main__":
    main()
