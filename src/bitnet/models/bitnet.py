"""BitNet b1.58 (BitNetForCausalLM): llama with sub-norms before o_proj and down_proj, and relu(gate)^2 * up."""

from __future__ import annotations

from typing import Any

from bitnet.models.config import ModelConfig, decoder_config, decoder_names


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    return decoder_config(
        hf,
        where,
        architecture="bitnet",
        activations={"relu2": "relu2", "silu": "silu"},
        sub_norms=True,
        default_theta=500_000.0,
        tied=False,
    )


def names(config: ModelConfig) -> dict[str, str]:
    return decoder_names(config)
