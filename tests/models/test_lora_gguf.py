"""llama.cpp's file of an adapter: what is read, and what is refused in one line. That llama.cpp reads ours: convert/test_peers.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest

from bitnet.errors import BitNetError
from bitnet.files import gguf_write
from bitnet.models import canonical, open_checkpoint
from bitnet.models.config import ModelConfig
from bitnet.models.peft import read_adapter

KEYS = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return canonical(open_checkpoint(packed_models.write(tmp_path_factory.mktemp("base"), "llama"))).config


def arrays(base: ModelConfig) -> Arrays:
    rng, width, kv = np.random.default_rng(0), base.hidden_size, base.n_kv_heads * base.head_dim
    shapes = {"attn_k": (kv, width), "ffn_down": (width, base.ffn_size)}
    found: Arrays = {}
    for part, (rows, cols) in shapes.items():
        found[f"blk.0.{part}.weight.lora_a"] = rng.normal(size=(4, cols)).astype(np.float32)
        found[f"blk.0.{part}.weight.lora_b"] = rng.normal(size=(rows, 4)).astype(np.float32)
    return found


def write(path: Path, tensors: Arrays, keys: dict[str, Any]) -> Path:
    kinds = {"float32": "f32", "float16": "f16", "float64": "f64"}
    items = [gguf_write.Item(n, kinds[str(v.dtype)], v.shape, lambda v=v: [v]) for n, v in tensors.items()]  # type: ignore[misc]
    head, order = gguf_write.layout(items, keys)
    path.write_bytes(head + b"".join(chunk.tobytes() + bytes(fill) for item, fill in order for chunk in item.chunks()))
    return path


@pytest.mark.parametrize(("alpha", "scale"), [(16.0, 4.0), (0.0, 1.0), (None, 1.0)])
def test_what_is_read(tmp_path: Path, base: ModelConfig, alpha: float | None, scale: float) -> None:
    """Names, the scale, and rows of llama's keys: pair by pair in the file, halves apart in memory."""
    tensors = arrays(base)
    keys = {key: value for key, value in KEYS.items() if key != "adapter.lora.alpha"} | (
        {} if alpha is None else {"adapter.lora.alpha": alpha}
    )
    parts = read_adapter(write(tmp_path / "a.gguf", tensors, keys), base).parts
    assert list(parts) == ["layers.0.k", "layers.0.down"] and {low.scale for low in parts.values()} == {scale}
    assert np.array_equal(parts["layers.0.down"].b, tensors["blk.0.ffn_down.weight.lora_b"])
    stored, found, half = tensors["blk.0.attn_k.weight.lora_b"], parts["layers.0.k"].b, base.head_dim // 2
    for row in range(len(stored)):
        head, place = divmod(row, base.head_dim)
        assert np.array_equal(found[head * base.head_dim + place % 2 * half + place // 2], stored[row])


def without(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda t: {n: v for n, v in t.items() if not n.endswith(names)}


REFUSED: list[tuple[dict[str, Any], Callable[[Arrays], Arrays] | None, str]] = [
    ({"general.type": "model"}, None, "general.type is 'model'; expected an adapter, this may be a model"),
    ({"adapter.type": "cvec"}, None, "adapter.type is 'cvec'; this build runs lora"),
    ({"general.architecture": "qwen3"}, None, "is for architecture 'qwen3'; the base is a llama model"),
    ({"adapter.alora.invocation_tokens": np.array([1], np.uint32)}, None, "adapter.alora.invocation_tokens makes it work from certain"),
    ({"adapter.lora.alpha": -1.0}, None, "adapter.lora.alpha is -1.0; expected a number above 0"),
    ({"adapter.lora.alpha": float("nan")}, None, "adapter.lora.alpha is nan; expected a number above 0"),
    ({}, lambda t: {n.replace("blk.0", "blk.9"): v for n, v in t.items()}, "'blk.9.attn_k.weight.lora_a' belongs to no linear layer"),
    ({}, lambda t: t | {"output_norm.weight": np.ones(4, np.float32)}, "'output_norm.weight' belongs to no linear layer"),
    ({}, without("ffn_down.weight.lora_b"), "'blk.0.ffn_down.weight.lora_a': stands alone"),
    ({}, without("lora_a", "lora_b"), "holds no tensor"),
    ({}, lambda t: {n: v[:, :64].copy() if n.endswith("a") else v for n, v in t.items()}, r"layers.0.k has A \[4, 64\]"),
    ({}, lambda t: {n: v.astype(np.float64) for n, v in t.items()}, "is stored as F64; expected F32, F16 or BF16"),
    ({}, lambda t: {n: v * np.float32(np.nan) for n, v in t.items()}, "holds NaN or infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "damage", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_is_refused(
    tmp_path: Path, base: ModelConfig, keys: dict[str, Any], damage: Callable[[Arrays], Arrays] | None, message: str
) -> None:
    path = write(tmp_path / "a.gguf", damage(arrays(base)) if damage else arrays(base), KEYS | keys)
    with pytest.raises(BitNetError, match=message) as error:
        read_adapter(path, base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_another_file_is_refused(tmp_path: Path, base: ModelConfig) -> None:
    with pytest.raises(BitNetError, match="is a low-rank adapter and no model; run its base, with --adapter"):
        open_checkpoint(write(tmp_path / "lora.gguf", arrays(base), KEYS))
    (tmp_path / "a.gguf").write_text("hello")
    with pytest.raises(BitNetError, match=r"a\.gguf: is a file, and no GGUF; expected llama\.cpp's adapter"):
        read_adapter(tmp_path / "a.gguf", base)
