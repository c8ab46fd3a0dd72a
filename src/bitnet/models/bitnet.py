"""BitNet b1.58 (arXiv:2402.17764, arXiv:2504.12285): llama with sub-norms before o_proj and down_proj, and relu(gate)^2 * up.

The first published models (BitnetForCausalLM, 1bitLLM's reproduction) use SiLU, call the sub-norms otherwise, and are master weights
that are ternarized by absmean at load.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bitnet.models.config import ModelConfig, decoder_config, decoder_names

OLDER_NAMES = {"attn_sub_norm": "self_attn.inner_attn_ln", "ffn_sub_norm": "mlp.ffn_layernorm"}


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    first = "BitnetForCausalLM" in (hf.get("architectures") or ())
    activations = {"silu": "silu"} if first else {"relu2": "relu2", "silu": "silu"}
    theta = 10_000.0 if first else 500_000.0
    return decoder_config(hf, where, architecture="bitnet", activations=activations, default_theta=theta, default_eps=1e-5, sub_norms=True)


def names(config: ModelConfig, present: Container[str]) -> dict[str, str]:
    older = "model.layers.0.self_attn.inner_attn_ln.weight" in present
    return decoder_names(config, **(OLDER_NAMES if older else {}))
