"""Qwen2 and Qwen2.5 (arXiv:2407.10671): llama with biases on queries, keys and values; some layers may see a window only."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bitnet.models.config import SILU, ModelConfig, decoder_config, decoder_names, window
from bitnet.models.fields import LARGEST, integer

MAX_WINDOW_LAYERS = 28  # the first layers, which see everything, if config.json does not say


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    return decoder_config(hf, where, architecture="qwen2", activations=SILU, biases=("q", "k", "v"), **windows(hf, where))


def windows(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The window of qwen's layers, off unless use_sliding_window."""
    if not hf.get("use_sliding_window"):
        return {}
    n_layers = integer(hf, "num_hidden_layers", where)
    full = LARGEST["num_hidden_layers"] if hf.get("sliding_window") is None else hf.get("max_window_layers", MAX_WINDOW_LAYERS)
    return window(hf, where, n_layers, (isinstance(full, int) and i >= full for i in range(n_layers)))


def names(config: ModelConfig, present: Container[str]) -> dict[str, str]:
    return decoder_names(config)
