"""What conversion without training costs a model: perplexity and next-token accuracy after each scheme and method.

    python benchmarks/post_training.py MODEL --calibration TEXT --data TEXT --out RESULTS.jsonl [--only NAME ...]

A line of RESULTS is one variant; those that are there already are not run again. Ends with the table, in Markdown. Converted models are
written to a temporary folder and run as `bitnet run` runs them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitnet.convert import Ternarization, convert
from bitnet.convert.layerwise import sequences
from bitnet.convert.report import means
from bitnet.evaluate.perplexity import read_text, score_text
from bitnet.transformer import TernaryTransformer

TABLES = (("embedding", "keep"), ("head", "keep"))
LAYERS = {"alphas": TABLES}  # the linear layers only
# name -> (scheme, arguments of Ternarization, format)
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "int8": ("int8", {}, "hf-int8"),
    "int4": ("int4", {}, "hf-int4"),
    "fp4": ("fp4", {}, "hf-fp4"),
    "binary": ("binary", LAYERS, "gguf-q1_0"),
    "absmean, embedding too": ("ternary", {"method": "absmean"}, "hf"),
    "the article's alphas, embedding too": ("ternary", {}, "hf"),
    "absmean": ("ternary", {"method": "absmean", **LAYERS}, "hf"),
    "the article's alphas": ("ternary", LAYERS, "hf"),
    "alpha 0.7": ("ternary", {"alpha": 0.7, **LAYERS}, "hf"),
    "auto": ("ternary", {"alpha": "auto", **LAYERS}, "hf"),
    "gptq": ("ternary", {"method": "gptq", **LAYERS}, "hf"),
    "auto, a scale for 64": ("ternary", {"alpha": "auto", "scale": 64, **LAYERS}, "gguf-q2_0"),
    "gptq, a scale for 64": ("ternary", {"method": "gptq", "scale": 64, **LAYERS}, "gguf-q2_0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the text that is scored")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=40_000, help="of the scored text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    args = parser.parse_args()
    done = {line["variant"]: line for line in map(json.loads, args.out.read_text().splitlines())} if args.out.exists() else {}
    text = read_text(args.data, args.max_bytes)
    for name in ("as it is", *VARIANTS):
        if name not in done and (not args.only or name in args.only):
            done[name] = run(name, args, text)
            with args.out.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    print(table(done))


def run(name: str, args: argparse.Namespace, text: str) -> dict[str, Any]:
    """One variant: converted, and scored."""
    found: dict[str, Any] = {"variant": name, "model": args.model.name, "data": args.data.name, "data_bytes": args.max_bytes}
    if name == "as it is":
        return found | score(args.model, text)
    scheme, how, form = VARIANTS[name]
    ternarization = Ternarization(**how) if how else None
    calibration = None
    if scheme == "ternary" and "alphas" in how:  # of the linear layers, whose outputs' errors are then compared
        source = TernaryTransformer.from_pretrained(args.model)
        ids = source.tokenizer.encode(read_text(args.calibration, 1 << 21), add_special=False)
        calibration = sequences(ids, source.tokenizer.prefix_ids, args.sequences, args.sequence_length, source.engine.config.max_context)
        found |= {"calibration": args.calibration.name, "sequences": list(calibration.shape)}
        del source
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        target = Path(folder) / ("m.gguf" if form.startswith("gguf") else "m")
        report = convert(
            args.model, target, format=form, quantization=scheme, ternarization=ternarization,
            calibration=calibration, allow_requantize=True,
        )  # fmt: skip
        found |= {"format": report.format, "seconds": round(time.perf_counter() - start, 1), "means": means(report.layers)}
        return found | score(target, text)


def score(path: Path, text: str) -> dict[str, Any]:
    return asdict(score_text(TernaryTransformer.from_pretrained(path, head="stored"), text))


def table(done: dict[str, dict[str, Any]]) -> str:
    lines = ["| | bits/weight | zeros | weight error | output error | perplexity | next-token accuracy |", "|---|---|---|---|---|---|---|"]
    for name in ("as it is", *VARIANTS):
        if name not in done:
            continue
        row = done[name]
        quality = "| | | | "
        if "means" in row:
            layers = [kind for kind in row["means"] if kind["kind"] not in ("embedding", "head", "all")]  # the linear ones
            count = sum(kind["weights"] for kind in layers)

            def mean(key: str, layers: list[dict[str, Any]] = layers, count: int = count) -> float:
                return float(sum(kind[key] * kind["weights"] for kind in layers) / count)

            error = f"{row['means'][-1]['output_error']:.2f}" if row["means"][-1]["output_error"] is not None else ""
            quality = f"| {mean('bits_per_weight'):.2f} | {mean('zeros'):.1%} | {mean('weight_error'):.3f} | {error} "
        lines.append(f"| {name} {quality}| {row['perplexity']:,.2f} | {row['next_token_accuracy']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
