"""Our logits against transformers' on small random models of every family.

Tolerances. transformers' cache rounds to f16 here as ours does, so what remains is the order of float32 sums, about 1e-6 of a value.
Where that moves a key or value across a rounding boundary, the value changes by 2^-11 of itself; attention averages values and the norms
are scale-free, so logits stay within 2^-11 of their largest. Where it moves an activation across a boundary of int8 (BitNet), the
activation changes by one step. If every one did so at random, each product would be off by its quantization's noise:
activation changes by one step. If every one did so at random, each product would be off by its quantization noise:
three layers add to sqrt(12) * 1.4 % = 4.7 % of the logits' norm. A wrong activation or norm is off by far more, as the last test shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet import packing, ternary
from bitnet.engine import Engine, load_engine
from bitnet.files import safetensors
from bitnet.files.hf import open_checkpoint

random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")

IDS = np.random.default_rng(0).integers(0, 200, 100).tolist()
F16_FLIP = 2.0**-11
INT8_NOISE = 0.047


def load(folder: Path) -> Engine:
    return load_engine(open_checkpoint(folder), threads=2)


def our_logits(folder: Path) -> np.ndarray:
    engine = load(folder)
    return engine.forward([(engine.sequence(), IDS)], all_logits=True)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Norm of the difference by norm, per token."""
    return np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 6}, {"head_dim": 20, "rope_theta": 500.0}])
def test_llama(tmp_path: Path, dtype: str, changes: dict) -> None:
    folder = random_models.save(random_models.llama(seed=1, dtype=getattr(random_models.torch, dtype), **changes), tmp_path)
    ours, theirs = our_logits(folder), random_models.logits(random_models.reload(folder), IDS)
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bitnet_online(tmp_path: Path, seed: int) -> None:
    model = random_models.bitnet(seed)
    ours, theirs = our_logits(random_models.save(model, tmp_path)), random_models.logits(model, IDS)
    assert relative(ours, theirs).max() <= INT8_NOISE


def packed_copy(folder: Path, target: Path, linear_class: str) -> Path:
    """The folder of online masters as packed ternary weights with their scale."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    tensors: dict = {}
    for name, tensor in safetensors.read(folder / "model.safetensors").tensors.items():
        values = tensor.dense()
        if name.endswith("_proj.weight"):
            trits, scale = ternary.absmean(values)
            tensors[name] = packing.pack_hf(trits)
            tensors[f"{name}_scale"] = np.array([scale if linear_class == "autobitlinear" else 1 / scale], np.float32)
        else:
            tensors[name] = np.ascontiguousarray(values)
    target.mkdir()
    safetensors.write(target / "model.safetensors", tensors, {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_bitnet_packed_is_the_online_model(tmp_path: Path, linear_class: str) -> None:
    model = random_models.bitnet(3)
    online = random_models.save(model, tmp_path / "online")
    packed = packed_copy(online, tmp_path / "packed", linear_class)
    if linear_class == "autobitlinear":
        assert np.array_equal(our_logits(packed), our_logits(online))
    # 1 / (1 / scale) may differ from scale in its last bit, which int8 rounding can then amplify
    assert relative(our_logits(packed), random_models.logits(model, IDS)).max() <= INT8_NOISE


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_transformers_runs_the_packed_folder_alike(tmp_path: Path, linear_class: str) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed; transformers needs it for BitNet")
    online = random_models.save(random_models.bitnet(4), tmp_path / "online")
    packed = packed_copy(online, tmp_path / "packed", linear_class)
    theirs = random_models.reload(packed)
    assert relative(our_logits(packed), random_models.logits(theirs, IDS)).max() <= INT8_NOISE


def test_llama_with_ternary_layers(tmp_path: Path) -> None:
    """Llama's graph with BitNet's linear layers, as Llama3-8B-1.58 has it."""
    pytest.importorskip("accelerate", reason="accelerate is not installed; transformers needs it for BitNet")
    dense = random_models.save(random_models.llama(5, tie_word_embeddings=False), tmp_path / "dense")
    packed = packed_copy(dense, tmp_path / "packed", "bitlinear")
    theirs = random_models.reload(packed)
    assert relative(our_logits(packed), random_models.logits(theirs, IDS)).max() <= INT8_NOISE


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = random_models.llama(6)
    random_models.save(model, tmp_path / "one")
    random_models.save(model, tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert np.array_equal(our_logits(tmp_path / "one"), our_logits(tmp_path / "many"))


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_any_arrangement_gives_the_same_bits(tmp_path: Path, family: str) -> None:
    folder = random_models.save(getattr(random_models, family)(7), tmp_path)
    engine = load(folder)
    whole = engine.forward([(engine.sequence(), IDS)], all_logits=True)
    alone = engine.sequence()
    assert np.array_equal(whole, np.concatenate([engine.forward([(alone, [i])]) for i in IDS])), "token by token"
    one_thread = load_engine(open_checkpoint(folder), threads=1)
    assert np.array_equal(whole, one_thread.forward([(one_thread.sequence(), IDS)], all_logits=True)), "one thread"
    rng = np.random.default_rng(1)
    sequences, done, rows = [engine.sequence() for _ in range(4)], [0] * 4, [[] for _ in range(4)]
    while min(done) < len(IDS):  # ragged batches of four copies, each in chunks of its own
        parts = [int(min(rng.integers(1, 23), len(IDS) - d)) for d in done]
        live = [i for i in range(4) if parts[i]]
        out = engine.forward([(sequences[i], IDS[done[i] : done[i] + parts[i]]) for i in live], all_logits=True)
        for i in live:
            rows[i].append(out[: parts[i]])
            out, done[i] = out[parts[i] :], done[i] + parts[i]
    for r in rows:
        assert np.array_equal(whole, np.concatenate(r)), "ragged batches"


def test_the_wrong_activation_fails(tmp_path: Path) -> None:
    model = random_models.bitnet(0)
    random_models.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    assert relative(our_logits(tmp_path), random_models.logits(model, IDS)).min() > 2 * INT8_NOISE


def test_the_wrong_linear_class_fails(tmp_path: Path) -> None:
    model = random_models.llama(5)
    packed = packed_copy(random_models.save(model, tmp_path / "dense"), tmp_path / "packed", "autobitlinear")
    right = our_logits(packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    (packed / "config.json").write_text(json.dumps(config))
    assert relative(our_logits(packed), right).min() > 2 * INT8_NOISE
