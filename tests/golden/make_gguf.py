"""Write small random models as GGUF with llama.cpp's own quantizers, and llama.cpp's logits beside them.

    python tests/golden/make_gguf.py        # writes tests/golden/gguf/*.gguf and *.npz

A model of `random_models.py` becomes an F32 file as llama.cpp's convert scripts write it (rows of llama's q and k permuted, gemma's norms
as 1 + w, llama3's rope as a tensor of divisors, bitnet's masters ternarized), and llama.cpp quantizes that file, each tensor into a type of
its own. Needs llama-cpp-python (tried: 0.3.36), gguf, torch and transformers; the tests of the stored files need none of them.
`tokenizer.ggml.model` is "no_vocab": token ids are given, and the files stay small.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
import random_models

FOLDER = Path(__file__).resolve().parent / "gguf"
VOCABULARY = 128
TOKENS = 40
FTYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
BLOCKS_OF_32 = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCKS_OF_256 = ("Q4_K", "Q5_K", "Q6_K")
TERNARY = ("TQ1_0", "TQ2_0", "Q2_0")
BINARY = ("Q1_0",)
TYPES = ("F32", "F16", "BF16", *BLOCKS_OF_32, *BLOCKS_OF_256, *TERNARY, *BINARY)
# ids of ggml, where the gguf package does not know them yet
TYPE_IDS = {t.name: int(t) for t in gguf.GGMLQuantizationType} | {"Q2_0": 42}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "bitnet": "bitnet"}
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TABLES = ("token_embd", "output")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SMALL = SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
# gemma 3 in llama.cpp: every sixth layer sees everything. Width 128 keeps six layers small; only its ffn_down has blocks of 256.
GEMMA = SIZES | {"hidden_size": 128, "num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA |= {"sliding_window_pattern": 6}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Case:
    """One stored file."""

    family: str  # a function of random_models
    types: Sequence[str]  # of the linear layers in order, over and over
    changes: dict[str, Any]
    embedding: str
    head: str = ""  # untied only
    seed: int = 1


def rope(kind: str, factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "factor": factor, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", 4.0, original_max_position_embeddings=32)
CASES = {
    "llama": Case("llama", ("Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), SIZES | {"num_hidden_layers": 1}, "Q8_0", "Q6_K"),
    "llama-linear": Case("llama", ("F16",), SMALL | rope("linear", 2.5), "F16", "F16"),
    "llama-llama3": Case("llama", ("BF16",), SMALL | LLAMA3 | TIED, "BF16"),
    "llama-yarn": Case("llama", ("F32",), SMALL | YARN | TIED, "F32"),
    "qwen2": Case("qwen2", ("Q4_0", "Q8_0", "Q5_1", "Q4_1", "Q5_0", "Q4_0", "Q6_K"), SIZES | {"hidden_size": 128}, "F16", "Q8_0"),
    "qwen3": Case("qwen3", ("Q2_0", "TQ1_0", "TQ2_0", "Q1_0"), SIZES | {"head_dim": 64} | TIED, "Q2_0"),
    "qwen3-untied": Case("qwen3", ("Q5_0", "Q4_1"), SMALL | {"head_dim": 32}, "Q4_0", "Q5_1"),
    "gemma3": Case("gemma3_text", ("Q5_0", "Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q4_0", "Q4_K"), GEMMA, "Q8_0"),
    "bitnet": Case("bitnet", ("TQ2_0", "TQ1_0"), SIZES | TIED, "Q6_K"),
}


def token_ids(seed: int = 0, n: int = TOKENS) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist()


def ternarized(w: np.ndarray) -> np.ndarray:
    """By absmean, as float32 weights of three values (arXiv:2402.17764)."""
    scale = np.float32(max(np.abs(w).mean(), 1e-5))
    return np.clip(np.round(w / scale), -1, 1).astype(np.float32) * scale


def binarized(w: np.ndarray) -> np.ndarray:
    return np.where(w < 0, -1, 1).astype(np.float32) * np.float32(np.abs(w).mean())


def permuted(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows ordered so that rope's pairs are neighbours: row i of each head's first half, then row i of its second."""
    return np.ascontiguousarray(w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape))


def arrays(model: Any, type_of: dict[str, str]) -> dict[str, np.ndarray]:
    """The model's weights, float32, by GGUF name and in GGUF's order; those of a ternary or binary type have that type's values."""
    config = model.config
    family = config.model_type
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family].upper()], config.num_hidden_layers)
    found = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        older = name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm")  # as the first BitNets have it
        ours = names.get_name(older, try_suffixes=(".weight", ".bias"))
        assert ours, name
        w = parameter.detach().float().numpy()
        if (family == "bitnet" and name.endswith("_proj.weight")) or type_of.get(ours) in TERNARY:
            w = ternarized(w)
        elif type_of.get(ours) in BINARY:
            w = binarized(w)
        if family == "llama" and ".q_proj." in name:
            w = permuted(w, config.num_attention_heads)
        if family == "llama" and ".k_proj." in name:
            w = permuted(w, config.num_key_value_heads)
        if family == "gemma3_text" and name.endswith("norm.weight"):
            w = w + 1
        found[ours] = np.ascontiguousarray(w, np.float32)
    return found


def rope_divisors(scaling: dict[str, Any], head_dim: int) -> np.ndarray:
    """llama3's rope as the tensor rope_freqs.weight: 1 for fast pairs, `factor` for slow ones, smooth between."""
    wavelength = 2 * np.pi * scaling["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def write(model: Any, path: Path, type_of: dict[str, str]) -> None:
    """An F32 file with the metadata of llama.cpp's convert scripts."""
    c = model.config
    family = c.model_type
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    file = gguf.GGUFWriter(path, ARCHITECTURES[family])
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(c.vocab_size)
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_file_type(0)
    if family != "bitnet":
        file.add_key_length(head_dim)
        file.add_value_length(head_dim)
    if family in ("llama", "bitnet"):
        file.add_rope_dimension_count(head_dim)
    if family == "gemma3_text":
        file.add_sliding_window(c.sliding_window)
    by_kind = c.rope_parameters
    scaling = by_kind.get("full_attention", by_kind)
    file.add_rope_freq_base(scaling["rope_theta"])
    if "sliding_attention" in by_kind:
        file.add_rope_freq_base_swa(by_kind["sliding_attention"]["rope_theta"])
    kind = scaling["rope_type"]
    if kind in ("linear", "yarn"):
        file.add_rope_scaling_type(gguf.RopeScalingType(kind))
        file.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        file.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        optional = {
            "attention_factor": file.add_rope_scaling_yarn_attn_factor, "beta_fast": file.add_rope_scaling_yarn_beta_fast,
            "beta_slow": file.add_rope_scaling_yarn_beta_slow,
        }  # fmt: skip
        for key, add in optional.items():
            if scaling.get(key) is not None:
                add(scaling[key])
    if family == "bitnet":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(1.0)
    if kind == "llama3":
        file.add_tensor("rope_freqs.weight", rope_divisors(scaling, head_dim))
    for name, values in arrays(model, type_of).items():
        file.add_tensor(name, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def quantize(source: Path, target: Path, type_of: dict[str, str]) -> None:
    """By llama.cpp, each tensor into the type named, which is all matrices; vectors stay F32."""
    _quiet()
    overrides = (llama_cpp.llama_model_tensor_override * (len(type_of) + 1))()
    for slot, (name, kind) in zip(overrides, type_of.items(), strict=False):
        slot.pattern, slot.type = f"^{name.replace('.', '[.]')}$".encode(), TYPE_IDS[kind]
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.allow_requantize = 1, True
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0  # has no effect, as every matrix is named
    params.token_embedding_type = TYPE_IDS[type_of["token_embd.weight"]]
    params.output_tensor_type = TYPE_IDS[type_of.get("output.weight", type_of["token_embd.weight"])]
    params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp would not quantize {source}")
    stored = {t.name: t.tensor_type for t in gguf.GGUFReader(target).tensors} if "Q2_0" not in type_of.values() else {}
    wrong = {name: t.name for name, t in stored.items() if name in type_of and t.name != type_of[name]}
    assert not wrong, f"llama.cpp chose other types: {wrong}"


def types_of(model: Any, types: Sequence[str], embedding: str, head: str) -> dict[str, str]:
    """Tensor name -> type."""
    c = model.config
    layers = [f"blk.{i}.{part}.weight" for i in range(c.num_hidden_layers) for part in LINEARS]
    chosen = {name: types[i % len(types)] for i, name in enumerate(layers)} | {"token_embd.weight": embedding}
    return chosen if c.tie_word_embeddings else chosen | {"output.weight": head}


def logits(path: Path, ids: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """llama.cpp's, float32 [tokens, vocab]: one thread, one batch, weights not repacked, no flash attention. adapter: a GGUF of LoRA."""
    _quiet()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp would not load {path}")
    context_options = llama_cpp.llama_context_default_params()
    context_options.n_ctx = context_options.n_batch = context_options.n_ubatch = max(len(ids), 64)
    context_options.n_threads = context_options.n_threads_batch = 1
    context_options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, context_options)
    if adapter is not None:
        low_rank = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        if not low_rank:
            raise RuntimeError(f"llama.cpp would not load {adapter}")
        one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(low_rank), (ctypes.c_float * 1)(1.0)
        llama_cpp.llama_set_adapters_lora(context, one[0], 1, one[1])
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError(f"llama.cpp failed on {path}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def make(case: Case, path: Path, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Write the case's GGUF; returns `ids`, `logits` and `exact`, float32 [tokens, vocab].

    `logits`: llama.cpp's. `exact`: llama.cpp's after it has turned the same weights back into F32, so that no activation is quantized;
    of bitnet, transformers', because llama.cpp computes architecture `bitnet` with SiLU where these models have relu(gate)^2.
    """
    model = getattr(random_models, case.family)(case.seed, **case.changes)
    type_of = types_of(model, case.types, case.embedding, case.head)
    plain = path.with_suffix(".f32.gguf")
    write(model, plain, type_of)
    quantize(plain, path, type_of)
    quantize(path, plain, dict.fromkeys(type_of, "F32"))
    if case.family == "bitnet":
        embedding = next(t.data for t in gguf.GGUFReader(plain).tensors if t.name == "token_embd.weight")
        model.model.embed_tokens.weight.data = random_models.torch.tensor(np.array(embedding))
        model.tie_weights()
        exact = random_models.logits(model, list(ids))
    else:
        exact = logits(plain, ids)
    plain.unlink()
    return {"ids": np.array(ids, np.int32), "logits": logits(path, ids), "exact": exact}


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Errors reach the caller as such."""


def _quiet() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, case in CASES.items():
        path = FOLDER / f"{name}.gguf"
        np.savez_compressed(path.with_suffix(".npz"), **make(case, path, token_ids()))
        print(f"{name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
