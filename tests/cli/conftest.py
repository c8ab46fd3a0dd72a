"""A tiny random model on disk, and ways to call the commands on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from bitnet.files import safetensors
from bitnet.packing import pack_hf

WIDTH, FFN, LAYERS, HEADS, CONTEXT = 64, 128, 2, 2, 1 << 16
BOS = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, and a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={BOS: 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BitNet of random ternary weights in Hugging Face layout: 2 layers of width 64, 257 tokens, a context of 65,536."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    config = {
        "model_type": "bitnet", "vocab_size": 257, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "relu2", "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    }  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": (0.1 * rng.standard_normal((257, WIDTH))).astype(np.float16),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        square = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
        for name, shape in {**square, "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}.items():
            tensors[f"{at}{name}.weight"] = pack_hf(rng.integers(-1, 2, shape).astype(np.int8))
            tensors[f"{at}{name}.weight_scale"] = np.float32([0.1])
        for name, size in {
            "input_layernorm": WIDTH, "post_attention_layernorm": WIDTH, "self_attn.attn_sub_norm": WIDTH, "mlp.ffn_sub_norm": FFN,
        }.items():  # fmt: skip
            tensors[f"{at}{name}.weight"] = np.ones(size, np.float32)
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder
