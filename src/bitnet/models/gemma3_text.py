"""Gemma 3, text only (arXiv:2503.19786).

Norms before and after attention and feed-forward, with weights kept as w and used as 1 + w; queries and keys normed by head; GeGLU; the
embedding scaled by sqrt(hidden_size); five layers of six see a sliding window and rotate by a base of their own.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from bitnet.errors import UnsupportedModelError
from bitnet.models.config import ModelConfig, decoder_config, decoder_names, window
from bitnet.models.fields import integer, number
from bitnet.models.rope import read_rope

GELU = {"gelu_pytorch_tanh": "gelu_tanh"}
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 131_072, "sliding_window": 4096}


def config(hf: dict[str, Any], where: str) -> ModelConfig:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if hf.get(key):
            raise UnsupportedModelError(f"{where}: {key} is set; this build runs gemma 3 without it")
    hf = DEFAULTS | {key: value for key, value in hf.items() if value is not None}
    n_layers, period = integer(hf, "num_hidden_layers", where), integer(hf, "sliding_window_pattern", where, default=6)
    by_kind = hf.get("rope_parameters")
    by_kind = by_kind if isinstance(by_kind, dict) else {}
    local_theta = number(hf, "rope_local_base_freq", where, default=10_000.0)
    return decoder_config(
        hf,
        where,
        architecture="gemma3_text",
        activations=GELU,
        tied=True,
        rope=read_rope(by_kind.get("full_attention", hf.get("rope_scaling")), hf, where, default_theta=1_000_000.0),
        rope_local=read_rope(by_kind.get("sliding_attention"), {"rope_theta": local_theta}, where, default_theta=local_theta),
        attention_scale=number(hf, "query_pre_attn_scalar", where, default=256.0) ** -0.5,
        embedding_scale=math.sqrt(integer(hf, "hidden_size", where)),
        qk_norms=True,
        post_norms=True,
        norm_offset=1.0,
        **window(hf, where, n_layers, ((i + 1) % period != 0 for i in range(n_layers))),
    )


def names(config: ModelConfig, present: Container[str]) -> dict[str, str]:
    return decoder_names(
        config,
        post_attn_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        post_ffn_norm="post_feedforward_layernorm",
    )
