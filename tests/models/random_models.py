"""Small random models made with `transformers`, saved to a folder, and its logits with the cache held in f16 as ours is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")

SIZES = {
    "vocab_size": 200,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _randomize(model: Any, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 else spread * noise)


def _dense(kind: str, seed: int, dtype: Any, changes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    _randomize(model, seed, 0.08)
    return model.to(dtype or torch.float32).eval()


def llama(seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    return _dense("Llama", seed, dtype, changes)


def qwen2(seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    return _dense("Qwen2", seed, dtype, changes)


def qwen3(seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    return _dense("Qwen3", seed, dtype, {"head_dim": 24} | changes)


def gemma3_text(seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    """Two layers of three see a window of 20 tokens; queries are scaled by another number than their length."""
    particulars = {"head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 20, "sliding_window_pattern": 3}
    model = _dense("Gemma3Text", seed, dtype, particulars | changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p -= 1  # kept as w, used as 1 + w
    return model


def bitnet(seed: int = 0, **changes: Any) -> Any:
    """A BitNet model with online quantization: float32 masters, ternarized by absmean in every forward."""
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    quant = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    config = transformers.BitNetConfig(**(SIZES | {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True} | changes))
    model = transformers.BitNetForCausalLM(config)
    replace_with_bitnet_linear(model, ["lm_head"], quant)
    model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(config)
    model.tie_weights()
    _randomize(model, seed, 0.08)
    model.config.quantization_config = quant.to_dict()
    return model.eval()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def reload(folder: Path) -> Any:
    """The saved model in float32 (converting a bf16 model in place would leave its rope frequencies rounded)."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab], computed in float32 with keys and values rounded to f16 where they enter the cache."""

    class HalfCache(transformers.DynamicCache):  # type: ignore[misc, name-defined]
        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys.half().float(), values.half().float(), layer, *args, **kwargs)

    with torch.no_grad():
        out = model(torch.tensor([ids]), past_key_values=HalfCache(), use_cache=True)
    return np.asarray(out.logits[0].numpy())
