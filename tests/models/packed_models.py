"""Small random models of packed ternary weights, written to a folder with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from bitnet.files import safetensors
from bitnet.models import adapter_for
from bitnet.models.config import weight_shapes
from bitnet.packing import bf16_bits, pack_hf

VOCABULARY = 262
WIDTH = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
CONFIG = WIDTH | {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
PARTICULARS: dict[str, dict[str, Any]] = {
    "bitnet": {"hidden_act": "relu2", "rope_theta": 10000.0, "tie_word_embeddings": True},
    "llama": {"rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen2": {"rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen3": {"rope_theta": 10000.0, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 16, "num_hidden_layers": 6, "hidden_activation": "gelu_pytorch_tanh"},
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
IDS = np.random.default_rng(9).integers(0, VOCABULARY, 24).tolist()


def tokenizer() -> Tokenizer:
    """Byte-level, with a BOS, an end of text and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("t", "h"), ("th", "e")]
    texts = ["<|begin|>", "<|end|>", *alphabet, *map("".join, merges)]
    made = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return made


def write(
    folder: Path, family: str = "bitnet", *, seed: int = 0, scale: str = "f16", linear_class: str = "autobitlinear", texts: bool = True,
    trits: bool = True, zeros: bool = True, **changes: Any,
) -> Path:  # fmt: skip
    """A model in Hugging Face layout: packed layers (or, without `trits`, Gaussian ones), tables and norms in bf16.

    scale: "f16" for scales that f16 holds, "f32" for others; zeros: False for binary weights.
    """
    rng = np.random.default_rng(seed)
    config = CONFIG | PARTICULARS[family] | changes | {"model_type": family, "eos_token_id": 1, "bos_token_id": 0}
    if trits:
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    adapter = adapter_for(config, "test")
    model = adapter.config(config, "test")
    shapes, tensors = weight_shapes(model), {}
    for ours, name in adapter.names(model, ()).items():
        kind = ours.rsplit(".", 1)[-1]
        shape = shapes[kind]
        if kind in ("embedding", "head") or len(shape) == 1:
            around = 1 - model.norm_offset if kind.endswith("norm") else 0
            values = around + np.round(25.6 * rng.standard_normal(shape)) / 256  # which f16 holds as well
            tensors[name] = ("BF16", bf16_bits(values.astype(np.float32)))
        elif trits:
            tensors[name] = pack_hf(rng.choice([-1, 0, 1] if zeros else [-1, 1], shape).astype(np.int8))
            value = np.float32(0.05 + 0.05 * rng.random())
            value = np.float32(np.float16(value)) if scale == "f16" else value
            tensors[f"{name}_scale"] = np.array([value if linear_class == "autobitlinear" else 1 / value], np.float32)
        else:
            tensors[name] = ("BF16", bf16_bits((0.05 * rng.standard_normal(shape)).astype(np.float32)))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if texts:
        (folder / "tokenizer.json").write_text(tokenizer().to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>"}))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def logits(path: Path, **options: Any) -> np.ndarray:
    """float32 [tokens, vocabulary], by the engine."""
    from bitnet.models import open_checkpoint
    from bitnet.weights import load_engine

    engine = load_engine(open_checkpoint(path), threads=2, **options)
    return engine.forward([(engine.sequence(), IDS)], all_logits=True)
