"""A tiny recipe and its texts, for all tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

STORY = "Once upon a time, there was a {0} named {1}. {1} liked to {2} in the park. One day, {1} saw a big {0}. They were happy.\n"
MINI: dict[str, Any] = {
    "task": "pretrain", "name": "mini", "scheme": "ternary", "seed": 3, "vocab_size": 300, "context": 64,
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "training": {
        "steps": 6, "batch_tokens": 128, "context": 32, "warmup_steps": 2, "decay_steps": 3, "checkpoint_every": 2, "compile": False,
    },
}  # fmt: skip


def stories(n: int = 300) -> list[str]:
    rng = np.random.default_rng(0)
    words = [["cat", "dog", "bird", "fish"], ["Tim", "Lily", "Sam", "Mia"], ["play", "run", "sing", "jump"]]
    return [STORY.format(*(rng.choice(w) for w in words)) for _ in range(n)]


def mini(**changes: Any) -> Any:
    """The recipe with other values, of training or of its own."""
    from bitnet.train.recipe import Recipe

    training = {k: v for k, v in changes.items() if k in MINI["training"] or k in ("mixture", "divergence", "blend_steps", "matrix_lr")}
    rest = {k: v for k, v in changes.items() if k not in training}
    found = {**MINI, **rest, "training": {**MINI["training"], **training}}
    return Recipe.parse({k: v for k, v in found.items() if v is not None}, "mini")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
