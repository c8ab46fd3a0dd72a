"""What every adapter produces, and what the families share in their config.json and in the names of their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import shown
from bitnet.models.fields import integer, number
from bitnet.models.rope import Rope, read_rope

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
LONGEST_CONTEXT = 1 << 24  # tokens; float32 tells all positions apart
SILU = {"silu": "silu", "swish": "silu"}  # hidden_act -> ours


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
    rope: Rope
    activation: str  # "silu" | "relu2" | "gelu_tanh"
    tied: bool  # the head is the embedding
    attention_scale: float  # multiplies query . key
    embedding_scale: float = 1.0  # multiplies the embedding's rows
    biases: tuple[str, ...] = ()  # of LINEARS
    sub_norms: bool = False  # before o_proj and down_proj (BitNet)
    post_norms: bool = False  # after o_proj and down_proj (gemma)
    qk_norms: bool = False  # of every query and key head
    norm_offset: float = 0.0  # added to every stored norm weight (gemma keeps w, and computes with 1 + w)
    windowed: tuple[bool, ...] = ()  # [n_layers]: which see only `sliding_window` positions; empty: none
    sliding_window: int = 0  # positions, its own included
    rope_local: Rope | None = None  # of the windowed layers; None: as the others
    rope_interleaved: bool = False  # pairs are neighbours (2i, 2i+1), as GGUF orders llama's rows


def with_context(c: ModelConfig, tokens: int) -> ModelConfig:
    """The same model for a context of so many tokens, also of more than it was trained for. Raises `UsageError` for less than 1.

    More is warned of, unless the rope is "dynamic", which is made for it.
    """
    if not 1 <= tokens <= LONGEST_CONTEXT:
        raise UsageError(f"max_context is {tokens}; expected 1 to {LONGEST_CONTEXT} tokens")
    if tokens > c.max_context and c.rope.kind != "dynamic":
        warnings.warn(
            f"max_context is {tokens}; the model was made for {c.max_context} tokens, and beyond them its text may be noise", stacklevel=3
        )
    local = None if c.rope_local is None else replace(c.rope_local, reach=tokens)
    return replace(c, max_context=tokens, rope=replace(c.rope, reach=tokens), rope_local=local)


def decoder_config(
    hf: dict[str, Any], where: str, *, architecture: str, activations: dict[str, str], default_theta: float = 10_000.0,
    default_eps: float = 1e-6, tied: bool = False, **particulars: Any,
) -> ModelConfig:  # fmt: skip
    """The fields that llama-like families share; `activations` maps the accepted hidden_act names to ours.

    `particulars` are further fields of ModelConfig. What this forward pass does not compute is refused, never ignored.
    """
    act = hf.get("hidden_act") or hf.get("hidden_activation") or next(iter(activations))
    if not isinstance(act, str) or act not in activations:
        raise UnsupportedModelError(
            f"{where}: hidden_act is {shown(repr(act))}; for {architecture} this build runs {', '.join(activations)}"
        )
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
    fields: dict[str, Any] = {
        "rope": particulars.pop("rope", None) or read_rope(hf.get("rope_parameters") or hf.get("rope_scaling"), hf, where, default_theta),
        "attention_scale": head_dim**-0.5,
        "biases": flagged_biases(hf),
    }
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
        norm_eps=number(hf, "rms_norm_eps", where, default=default_eps),
        activation=activations[act],
        tied=bool(hf.get("tie_word_embeddings", tied)),
        **(fields | particulars),
    )


def flagged_biases(hf: dict[str, Any]) -> tuple[str, ...]:
    """The linear layers that config.json's flags give a bias."""
    attention, feed_forward = LINEARS[:4], LINEARS[4:]
    return (attention if hf.get("attention_bias") else ()) + (feed_forward if hf.get("mlp_bias") else ())


def window(hf: dict[str, Any], where: str, n_layers: int, default_types: Iterable[bool]) -> dict[str, Any]:
    """`sliding_window` and `windowed` as ModelConfig has them. `default_types`: which layers are windowed if layer_types says nothing."""
    types = hf.get("layer_types")
    if types is None:
        windowed = tuple(default_types)
    elif isinstance(types, list) and len(types) == n_layers and set(types) <= {"full_attention", "sliding_attention"}:
        windowed = tuple(kind == "sliding_attention" for kind in types)
    else:
        raise FormatError(
            f"{where}: layer_types is {shown(repr(types))}; expected full_attention or sliding_attention for each of {n_layers}"
        )
    return {"windowed": windowed, "sliding_window": integer(hf, "sliding_window", where)} if any(windowed) else {}


def decoder_names(config: ModelConfig, **renamed: str) -> dict[str, str]:
    """Canonical name -> Hugging Face name, for families that keep llama's names; `renamed`: canonical part -> what differs."""
    parts = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if config.sub_norms:
        parts |= {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
    if config.qk_norms:
        parts |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    stored = {ours: f"{theirs}.weight" for ours, theirs in (parts | renamed).items()}
    stored |= {f"{ours}_bias": f"{parts[ours]}.bias" for ours in config.biases}
    names = {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(config.n_layers) for ours, theirs in stored.items()}
    names |= {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    return names if config.tied else names | {"head": "lm_head.weight"}


def weight_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every kind of weight, by the last part of its canonical name."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices: dict[str, tuple[int, ...]] = {
        "embedding": (c.vocab_size, c.hidden_size),
        "head": (c.vocab_size, c.hidden_size),
        "q": (q, c.hidden_size),
        "k": (kv, c.hidden_size),
        "v": (kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate": (c.ffn_size, c.hidden_size),
        "up": (c.ffn_size, c.hidden_size),
        "down": (c.hidden_size, c.ffn_size),
    }
    hidden_norms = ("final_norm", "attn_norm", "ffn_norm", "post_attn_norm", "post_ffn_norm")
    vectors: dict[str, tuple[int, ...]] = dict.fromkeys(hidden_norms, (c.hidden_size,))
    vectors |= {"attn_sub_norm": (q,), "ffn_sub_norm": (c.ffn_size,), "q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    return matrices | vectors | {f"{part}_bias": matrices[part][:1] for part in LINEARS}
