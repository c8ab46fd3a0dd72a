"""Three twins and three conversions of the FP16 one, side by side: bits per byte, next-token accuracy, BLiMP, with intervals.

    python benchmarks/twins.py --runs RUNS --eval EVAL_TEXTS --out benchmarks/twins.json

RUNS holds twin-fp16, twin-binary and twin-ternary as recipes/twins.yaml makes them. All are measured by the engine. int8, int4 and fp4 are
what `bitnet convert` makes of the FP16 model (groups of 32). Intervals are 95 %: of a text by resampling its windows of the model's
context (1,000 draws, seed 0), of BLiMP by Wilson's formula for the share of right pairs. A pair is right where the good sentence has the
higher log-probability; sentences begin with the token that begins a text. EVAL_TEXTS holds *.txt and blimp/*.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert import convert
from bitnet.evaluate.perplexity import log_probabilities, read_text, score_window
from bitnet.transformer import TernaryTransformer

SCHEMES = ("fp16", "int8", "int4", "fp4", "ternary", "binary")
DRAWS = 1000


def text_score(model: TernaryTransformer, text: str) -> dict[str, Any]:
    """bits_per_byte and next_token_accuracy with their intervals; the bytes of a window are those its tokens stand for."""
    ids, ends = model.tokenizer.encode_with_ends(text)
    bos = model.tokenizer.prefix_ids
    width = model.engine.config.max_context - len(bos)
    rows = []
    for at in range(0, len(ids), width):
        window = ids[at : at + width]
        nll, right, _ = score_window(model, bos, window)
        begin, end = ends[at - 1] if at else 0, ends[at + len(window) - 1]
        rows.append((nll, right, len(window), len(text[begin:end].encode())))
    table = np.array(rows, np.float64)
    draws = table[np.random.default_rng(0).integers(0, len(table), (DRAWS, len(table)))].sum(axis=1)
    total = table.sum(axis=0)
    found: dict[str, Any] = {"bytes": int(total[3]), "tokens": int(total[2])}
    for name, value, drawn in (
        ("bits_per_byte", total[0] / math.log(2) / total[3], draws[:, 0] / math.log(2) / draws[:, 3]),
        ("next_token_accuracy", total[1] / total[2], draws[:, 1] / draws[:, 2]),
    ):
        found[name] = {"value": float(value), "interval": np.quantile(drawn, [0.025, 0.975]).tolist()}
    return found


def wilson(right: int, count: int) -> list[float]:
    z = 1.959964
    middle, half = right / count + z * z / 2 / count, z * math.sqrt(right * (count - right) / count + z * z / 4) / count
    return [(middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)]


def log_probability(model: TernaryTransformer, sentence: str) -> float:
    ids = [*model.tokenizer.prefix_ids, *model.tokenizer.encode(sentence, add_special=False)]
    return float(log_probabilities(model.logits(ids[:-1]), np.array(ids[1:])).sum())


def blimp(model: TernaryTransformer, folder: Path, pairs: int | None) -> dict[str, Any]:
    right, count, by_file = 0, 0, {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:pairs]
        good = sum(log_probability(model, row["good"]) > log_probability(model, row["bad"]) for row in rows)
        by_file[path.stem] = good / len(rows)
        right, count = right + good, count + len(rows)
    return {"value": right / count, "interval": wilson(right, count), "pairs": count, "by_file": by_file}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, a row a scheme."""
    texts = list(next(iter(results.values()))["texts"])
    lines = ["| model | MB | " + " | ".join(f"{t}: bits per byte | next token" for t in texts) + " | BLiMP |"]
    lines.append("|---|---|" + "---|---|" * len(texts) + "---|")
    for scheme, found in results.items():
        cells = []
        for text in texts:
            bits, share = (found["texts"][text][key] for key in ("bits_per_byte", "next_token_accuracy"))
            half = (bits["interval"][1] - bits["interval"][0]) / 2
            cells += [
                f"{bits['value']:.3f} ± {half:.3f}",
                f"{share['value']:.1%} ± {(share['interval'][1] - share['interval'][0]) / 2:.1%}",
            ]
        of = found["blimp"]
        score = f"{of['value']:.1%} ({of['interval'][0]:.1%} to {of['interval'][1]:.1%})" if of else "-"
        lines.append(f"| {scheme} | {found['bytes'] / 1e6:.2f} | " + " | ".join(cells) + f" | {score} |")
    return lines


def draw(runs: Path, path: Path) -> None:
    """The three runs' losses over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    for scheme in ("fp16", "ternary", "binary"):
        with (runs / f"twin-{scheme}" / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        axes.plot([int(r["tokens"]) / 1e6 for r in rows], [float(r["loss"]) for r in rows], label=scheme, linewidth=1)
    axes.set(xlabel="million tokens", ylabel="training loss, nats a token", title="Twins: one shape, one order of tokens")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of twin-fp16, twin-binary, twin-ternary")
    parser.add_argument("--eval", type=Path, required=True, help="folder of *.txt and blimp/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="write the figures here, JSON")
    parser.add_argument("--picture", type=Path, help="draw the three runs' losses here")
    parser.add_argument("--max-bytes", type=int, help="of each text")
    parser.add_argument("--pairs", type=int, help="of each BLiMP file")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        for scheme in args.schemes.split(","):
            trained = args.runs / f"twin-{scheme}" / "model"
            if scheme in ("int8", "int4", "fp4"):
                trained = Path(place) / scheme
                convert(args.runs / "twin-fp16" / "model", trained, quantization=scheme)
            model = TernaryTransformer.from_pretrained(trained)
            texts = {p.name: text_score(model, read_text(p, args.max_bytes)) for p in sorted(args.eval.glob("*.txt"))}
            pairs = blimp(model, args.eval / "blimp", args.pairs) if (args.eval / "blimp").is_dir() else None
            results[scheme] = {"bytes": (trained / "model.safetensors").stat().st_size, "texts": texts, "blimp": pairs}
            print(f"{scheme}: done", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    if args.picture:
        draw(args.runs, args.picture)


if __name__ == "__main__":
    main()
