"""Llama (LlamaForCausalLM), dense or with BitNet-quantized linear layers (Llama3-8B-1.58)."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bitnet.models.config import SILU, ModelConfig, decoder_config, decoder_names


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    return decoder_config(hf, where, architecture="llama", activations=SILU)


def names(config: ModelConfig, present: Container[str]) -> dict[str, str]:
    return decoder_names(config)
