"""GGUF checkpoints in Hugging Face's terms: metadata -> the fields of config.json, so that the families' adapters read both.

What differs by format (llama.cpp's convert scripts): `llama` keeps the rows of q and k permuted for rope over neighbouring pairs, the
other families do not; gemma's norms are kept as 1 + w; llama3's rope scaling is a tensor of divisors. `bitnet` files do not say their
activation: relu(gate)^2 is what BitNet b1.58 2B-4T and later have; only the first reproductions (1bitLLM: vocabulary 32,002, rope base
10,000) use SiLU. Keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, gguf, shown
from bitnet.files.hf import Checkpoint
from bitnet.files.tensor import Tensor
from bitnet.models.config import LINEARS, ModelConfig

# general.architecture -> model_type
ARCHITECTURES = {
    "llama": "llama", "bitnet": "bitnet", "bitnet-b1.58": "bitnet", "bitnet-25": "bitnet", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}  # fmt: skip
FIRST_BITNET_VOCABULARY = 32_002
ROTATED = "prism.hadamard."

# metadata key after the architecture's name -> config.json's
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_PARTS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn_sub_norm": "attn_sub_norm", "ffn_sub_norm": "ffn_sub_norm",
    "post_attn_norm": "post_attention_norm", "post_ffn_norm": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
}  # fmt: skip


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open one GGUF file; no tensor's bytes are read but rope's. Raises FormatError and UnsupportedModelError, one line each."""
    return checkpoint_of(gguf.read(path), path)


def checkpoint_of(file: gguf.GgufFile, path: PathLike) -> Checkpoint:
    """What the file says of its model, in Hugging Face's terms."""
    where, metadata, tensors = shown(file.path), file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if metadata.get("general.type") == "adapter":
        raise UnsupportedModelError(f"{where}: is a low-rank adapter and no model; run its base, with --adapter and this file")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: architecture {shown(repr(architecture))}; this build runs {', '.join(ARCHITECTURES)}. Another would run as noise"
        )
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(f"{where}: is one of {parts} files of a split model; join them: llama-gguf-split --merge FIRST OUT")
    rotated = next((key for key in metadata if key.startswith(ROTATED)), None)
    if rotated is not None:
        raise UnsupportedModelError(
            f"{where}: its weights are in a rotated basis ({shown(rotated)}); activations would have to be rotated by the same "
            "Hadamard matrices, which no adapter here does. Use a file of the same model without the rotation"
        )
    template = metadata.get("tokenizer.chat_template")
    return Checkpoint(
        Path(path),
        _config(architecture, metadata, tensors, where),
        tensors,
        None,
        {},
        layout="gguf",
        chat_template=template if isinstance(template, str) else None,
        gguf_metadata=metadata,
    )


def as_written_on_arm(checkpoint: Checkpoint) -> Checkpoint:
    """The same file with its I2_S tensors read as a build of bitnet.cpp for Arm wrote them; nothing in the file tells which it was."""
    tensors = {name: replace(t, codec="i2_s_arm") if t.codec == "i2_s" else t for name, t in checkpoint.tensors.items()}
    if all(tensor is checkpoint.tensors[name] for name, tensor in tensors.items()):
        raise UsageError(f"{shown(checkpoint.path)}: has no I2_S tensors; i2_s='arm' is for files that a build of bitnet.cpp for Arm wrote")
    return replace(checkpoint, tensors=tensors)


def _config(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of config.json that the metadata give; their values are checked by the adapter."""

    def field(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()  # one number for each layer, all the same
        return value

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{where}: tensor 'token_embd.weight' not found as a matrix; expected a language model's embedding")
    config: dict[str, Any] = {theirs: field(ours) for ours, theirs in _FIELDS.items() if field(ours) is not None}
    config |= {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    required = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
    missing = [ours for ours, theirs in _FIELDS.items() if theirs in required and theirs not in config]
    if missing:
        raise FormatError(f"{where}: metadata {architecture}.{missing[0]} not found; expected a number")
    uneven = next((ours for ours, theirs in _FIELDS.items() if isinstance(config.get(theirs), np.ndarray)), None)
    if uneven:
        raise UnsupportedModelError(f"{where}: {architecture}.{uneven} differs from layer to layer; this build runs layers of one size")
    if field("expert_count"):
        raise UnsupportedModelError(f"{where}: has {shown(field('expert_count'))} experts; this build runs dense feed-forwards")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    plain = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    head_dim = config.setdefault("head_dim", plain)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key) not in (None, head_dim):
            raise UnsupportedModelError(
                f"{where}: {architecture}.{key} is {shown(field(key))} where heads are {head_dim} long; this build needs the two equal"
            )
    config.setdefault("rope_theta", 10_000.0)
    config["rope_scaling"] = _rope_scaling(field)
    if architecture == "gemma3":
        config |= _gemma3(field, config)
    elif architecture in ("qwen2", "qwen3"):
        config.pop("sliding_window", None)  # llama.cpp computes these with full attention
    elif architecture.startswith("bitnet"):
        first = architecture == "bitnet" and embedding.shape[0] == FIRST_BITNET_VOCABULARY and config["rope_theta"] == 10_000.0
        config["hidden_act"] = field("hidden_activation") or ("silu" if first else "relu2")
    return config


def _rope_scaling(field: Callable[[str], Any]) -> dict[str, Any] | None:
    kind = field("rope.scaling.type")
    factor = field("rope.scaling.factor") or (field("rope.scale_linear") if kind is None else None)
    if kind in (None, "none") and not factor:
        return None
    kind = "linear" if kind is None else kind
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": field("rope.scaling.original_context_length")}
    if kind == "yarn":
        scaling |= {"beta_fast": field("rope.scaling.yarn_beta_fast"), "beta_slow": field("rope.scaling.yarn_beta_slow")}
        scaling |= {"attention_factor": field("rope.scaling.yarn_attn_factor"), "attention_multiplier": field("rope.scaling.attn_factor")}
    return scaling


def _gemma3(field: Callable[[str], Any], config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of gemma 3 without the file's saying so: every sixth layer sees everything; 27B scales queries otherwise."""
    n_layers, heads, hidden = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
    largest = n_layers == 62 and isinstance(heads, int) and heads > 0
    pattern = field("attention.sliding_window_pattern")
    types: dict[str, Any]
    if "sliding_window" not in config:
        types = {"layer_types": ["full_attention"] * n_layers if isinstance(n_layers, int) else None}
    elif isinstance(pattern, np.ndarray):
        types = {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in pattern.tolist()]}
    else:
        types = {"sliding_window_pattern": pattern if isinstance(pattern, int) else 6}
    return types | {
        "query_pre_attn_scalar": hidden / heads if largest else config["head_dim"],
        "attn_logit_softcapping": field("attn_logit_softcapping"),
        "final_logit_softcapping": field("final_logit_softcapping"),
    }


def adjust(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """`config` as GGUF means it."""
    tensors, where = checkpoint.tensors, shown(checkpoint.path)
    rope = config.rope
    if (divisors := tensors.get("rope_freqs.weight")) is not None:
        values = divisors.dense().reshape(-1) if prod(divisors.shape) == config.head_dim // 2 else np.zeros(0)
        if values.size == 0 or not (np.isfinite(values).all() and (values > 0).all()):
            raise FormatError(f"{divisors.where}: expected {config.head_dim // 2} divisors of rope's frequencies, each above 0")
        rope = replace(rope, divisors=tuple(values.tolist()))
    biases = tuple(part for part in LINEARS if f"blk.0.{_PARTS[part]}.bias" in tensors)
    if config.architecture == "qwen2" and not set("qkv") <= set(biases):
        raise FormatError(
            f"{where}: tensor 'blk.0.attn_q.bias' (or attn_k, attn_v) not found; qwen2's queries, keys and values have biases"
        )
    interleaved = config.architecture == "llama"
    return replace(config, rope=rope, biases=biases, norm_offset=0.0, rope_interleaved=interleaved)


def names(config: ModelConfig) -> dict[str, str]:
    """Canonical name -> GGUF name, the same for every family."""
    parts = [*LINEARS, "attn_norm", "ffn_norm"]
    parts += ["attn_sub_norm", "ffn_sub_norm"] if config.sub_norms else []
    parts += ["post_attn_norm", "post_ffn_norm"] if config.post_norms else []
    parts += ["q_norm", "k_norm"] if config.qk_norms else []
    stored = {part: f"{_PARTS[part]}.weight" for part in parts} | {f"{part}_bias": f"{_PARTS[part]}.bias" for part in config.biases}
    found = {f"layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(config.n_layers) for ours, theirs in stored.items()}
    found |= {"embedding": "token_embd.weight", "final_norm": "output_norm.weight"}
    return found if config.tied else found | {"head": "output.weight"}
