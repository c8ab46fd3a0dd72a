"""Qwen3 (arXiv:2505.09388) and the Bonsai models made of it: llama with an RMSNorm of every query and key head before rope."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bitnet.models.config import SILU, ModelConfig, decoder_config, decoder_names
from bitnet.models.qwen2 import windows


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    explicit = hf if hf.get("head_dim") is not None else hf | {"head_dim": 128}  # 128 whatever the width, as the family defines it
    return decoder_config(explicit, where, architecture="qwen3", activations=SILU, qk_norms=True, **windows(hf, where))


def names(config: ModelConfig, present: Container[str]) -> dict[str, str]:
    return decoder_names(config)
