"""Llama (LlamaForCausalLM), dense or with BitNet-quantized linear layers (Llama3-8B-1.58)."""

from __future__ import annotations

from typing import Any

from bitnet.models.config import ModelConfig, decoder_config, decoder_names


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    return decoder_config(
        hf, where, architecture="llama", activations={"silu": "silu", "swish": "silu"}, sub_norms=False, default_theta=10_000.0, tied=False
    )


def names(config: ModelConfig) -> dict[str, str]:
    return decoder_names(config)
