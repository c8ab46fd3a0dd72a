"""What every adapter produces, and the checks on config.json that all families share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bitnet.errors import FormatError, UnsupportedModelError

LARGEST = {
    "num_hidden_layers": 1024,
    "vocab_size": 1 << 22,
    "hidden_size": 65536,
    "intermediate_size": 65536,
    "max_position_embeddings": 1 << 24,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; mirrors native/config.h, with the parts that only loading needs."""

    architecture: str  # Hugging Face model_type
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    max_context: int  # tokens
    norm_eps: float
    rope_theta: float
    activation: str  # "silu" | "relu2"
    sub_norms: bool
    tied: bool  # the head is the embedding
    rope_interleaved: bool = False


def integer(hf: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive integer of config.json, not above what any model has."""
    value = hf.get(key)
    if value is None:
        value = default
    largest = LARGEST.get(key, 65536)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise FormatError(f"{where}: {key} is {value!r}; expected an integer from 1 to {largest}")
    return value


def number(hf: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive finite number of config.json."""
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise FormatError(f"{where}: {key} is {value!r}; expected a number above 0")
    return float(value)


def decoder_config(
    hf: dict[str, Any], where: str, *, architecture: str, activations: dict[str, str], sub_norms: bool, default_theta: float, tied: bool
) -> ModelConfig:
    """The fields that llama-like families share; `activations` maps the accepted hidden_act names to ours.

    What this forward pass does not compute (biases, rope scaling, other activations) is refused, never ignored.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise UnsupportedModelError(f"{where}: {key} is set; this build runs models without biases")
    act = hf.get("hidden_act", next(iter(activations)))
    if not isinstance(act, str) or act not in activations:
        raise UnsupportedModelError(f"{where}: hidden_act is {act!r}; for {architecture} this build runs {', '.join(activations)}")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope parameters are {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope if rope.get("partial_rotary_factor") is not None else hf
    if kind != "default" or number(partial, "partial_rotary_factor", where, default=1.0) != 1.0:
        raise UnsupportedModelError(f"{where}: rope scaling {kind!r}; this build runs plain rope")
    heads = integer(hf, "num_attention_heads", where)
    kv_heads = integer(hf, "num_key_value_heads", where, default=heads)
    hidden = integer(hf, "hidden_size", where)
    if heads % kv_heads:
        raise FormatError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if hf.get("head_dim") is None and hidden % heads:
        raise FormatError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = integer(hf, "head_dim", where, default=hidden // heads)
    if head_dim % 2:
        raise FormatError(f"{where}: head_dim is {head_dim}; rope needs an even number")
    theta_in = rope if rope.get("rope_theta") is not None else hf
    return ModelConfig(
        architecture=architecture,
        vocab_size=integer(hf, "vocab_size", where),
        hidden_size=hidden,
        n_layers=integer(hf, "num_hidden_layers", where),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=integer(hf, "intermediate_size", where),
        max_context=integer(hf, "max_position_embeddings", where, default=2048),
        norm_eps=number(hf, "rms_norm_eps", where, default=1e-5),
        rope_theta=number(theta_in, "rope_theta", where, default=default_theta),
        activation=activations[act],
        sub_norms=sub_norms,
        tied=bool(hf.get("tie_word_embeddings", tied)),
    )


def decoder_names(config: ModelConfig) -> dict[str, str]:
    """Canonical name -> Hugging Face name, for families that keep llama's names."""
    parts = {
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "attn_norm": "input_layernorm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
    }
    if config.sub_norms:
        parts |= {"attn_sub_norm": "self_attn.attn_sub_norm.weight", "ffn_sub_norm": "mlp.ffn_sub_norm.weight"}
    names = {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(config.n_layers) for ours, theirs in parts.items()}
    names |= {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    if not config.tied:
        names["head"] = "lm_head.weight"
    return names
