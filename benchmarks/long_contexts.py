"""What a long context costs: a decoding step by format of keys and values, and a prompt that begins like an earlier one.

    python benchmarks/long_contexts.py --out FILE.jsonl [--shape article-12x512 --shape bitnet-2b-4t] [--depth 8192] [--formats 16,8,K8V4,4]

Formats take turns on one model of random weights, each with a sequence of its own that holds `depth` tokens: medians over the rounds of the
mean step of some tokens, and of the attention in it. The prefix: a prompt of 4,096 tokens read afresh, then the same prompt through a
`PrefixCache` that holds the first one's pages; times to the logits, which must be the same bits. Prints Markdown; a JSON line a shape.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bitnet import machine
from bitnet.bench.speed import TOKEN_SEED, prefill, read_bandwidths
from bitnet.engine import Engine
from bitnet.generation import PREFILL_CHUNK
from bitnet.kv import KvFormat
from bitnet.prefix_cache import PrefixCache
from bitnet.shapes import SHAPES, random_engine

FORMATS = {"16": KvFormat(16, 16), "8": KvFormat(8, 8), "K8V4": KvFormat(8, 4), "4": KvFormat(4, 4)}
PREFIX = 4096


def steps(engine: Engine, names: list[str], depth: int, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    ids = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=(1, depth + tokens))
    sequences = {name: engine.sequence(kv=FORMATS[name]) for name in names}
    for name, sequence in sequences.items():
        prefill(engine, [sequence], ids[:, :depth])
        print(f"{name}: {depth} tokens read", flush=True)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, sequence in sequences.items():
            sequence.truncate(depth)
            engine.reset_profile()
            start = time.perf_counter()
            for token in ids[0, depth:]:
                engine.forward([(sequence, [int(token)])])
            taken[name].append((time.perf_counter() - start, engine.profile()["attention_s"]))
    found = {}
    for name, rows in taken.items():
        step, attention = (1000 * median(column) / tokens for column in zip(*rows, strict=True))
        size = FORMATS[name].bytes_per_token(engine.config.n_layers, engine.config.n_kv_heads, engine.config.head_dim)
        found[name] = {"step_ms": step, "attention_ms": attention, "bytes_per_token": size, "gb_s": size * depth / attention / 1e6}
    return found


def prefix(engine: Engine, rounds: int) -> dict[str, Any]:
    first, again = [], []
    for number in range(rounds):
        prompt = [int(t) for t in np.random.default_rng(number).integers(engine.config.vocab_size, size=PREFIX)]
        cache = PrefixCache(engine, 1 << 30)
        logits = []
        for times in (first, again):
            start = time.perf_counter()
            sequence = cache.begin(prompt)
            for at in range(len(sequence), PREFIX, PREFILL_CHUNK):
                last = engine.forward([(sequence, prompt[at : at + PREFILL_CHUNK])])
            logits.append(last)
            times.append(time.perf_counter() - start)
            cache.keep(prompt, sequence)
        assert np.array_equal(*logits)
    return {"tokens": PREFIX, "first_s": median(first), "again_s": median(again), "share": median(again) / median(first)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="append the figures here, a JSON line a shape")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: article-12x512")
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefix-rounds", type=int, default=3)
    args = parser.parse_args()
    names = args.formats.split(",")
    for shape in args.shape or ["article-12x512"]:
        engine = random_engine(shape, context=max(args.depth, PREFIX) + args.tokens)
        limit = median(read_bandwidths(engine.threads))
        print(f"{shape}, {engine.isa}, {engine.codec}, {engine.threads} threads; reading alone {limit:.1f} GB/s")
        found = steps(engine, names, args.depth, args.tokens, args.rounds)
        base = found[names[0]]
        print(f"| after {args.depth:,} tokens | step, ms | attention, ms | GB/s | step | attention |\n|---|---|---|---|---|---|")
        for name, row in found.items():
            ratios = [f"{base[key] / row[key]:.2f} x" for key in ("step_ms", "attention_ms")]
            print(f"| {name} | {row['step_ms']:.2f} | {row['attention_ms']:.2f} | {row['gb_s']:.1f} | " + " | ".join(ratios) + " |")
        shared = prefix(engine, args.prefix_rounds)
        print(f"the same {PREFIX} tokens again: {1e3 * shared['again_s']:.1f} ms of {1e3 * shared['first_s']:.0f}, {shared['share']:.2%}")
        row = {
            "shape": shape, "isa": engine.isa, "codec": engine.codec, "threads": engine.threads, "cpu": machine.cpu_model(),
            "load": machine.load_average(), "read_gb_s": limit, "depth": args.depth, "rounds": args.rounds, "formats": found,
            "prefix": shared, "kv": {name: asdict(FORMATS[name]) for name in names},
        }  # fmt: skip
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
