"""Our logits against transformers' on small random models of every family.

Tolerances. transformers' cache rounds to f16 here as ours does, so what remains is the order of float32 sums, about 1e-6 of a value.
Where that moves a key or value across a rounding boundary, the value changes by 2^-11 of itself; attention averages values and the norms
are scale-free, so logits stay within 2^-11 of their largest. Where it moves an activation across a boundary of int8 (BitNet), the
activation changes by one step. If every one did so at random, each product would be off by its quantization noise: three layers add to
sqrt(12) * 1.4 % = 4.7 % of the logits' norm. A wrong activation or norm is off by far more, as the last test shows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet import packing, ternary
from bitnet.engine import Engine
from bitnet.errors import UnsupportedModelError, UsageError
from bitnet.files import safetensors
from bitnet.models import canonical, open_checkpoint
from bitnet.models.config import with_context
from bitnet.weights import load_engine

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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 1e4,
    },
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn, attention factor": YARN | {"attention_factor": 1.3},
}  # fmt: skip
FAMILIES: dict[str, list[dict]] = {
    "llama": [
        {}, {"tie_word_embeddings": True, "num_key_value_heads": 6}, {"head_dim": 20, "rope_theta": 500.0},
        {"attention_bias": True, "mlp_bias": True},
    ],
    "qwen2": [
        {}, {"tie_word_embeddings": True}, {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
        {"rope_parameters": YARN},
    ],
    "qwen3": [{}, {"tie_word_embeddings": True, "head_dim": 16}, {"attention_bias": True}],
    "gemma3_text": [
        {}, {"query_pre_attn_scalar": 24, "sliding_window": 1}, {"sliding_window": 64, "num_key_value_heads": 6},
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "changes"), [(family, changes) for family, cases in FAMILIES.items() for changes in cases])
def test_dense_families(tmp_path: Path, family: str, changes: dict, dtype: str) -> None:
    model = getattr(random_models, family)(seed=1, dtype=getattr(random_models.torch, dtype), **changes)
    folder = random_models.save(model, tmp_path)
    ours, theirs = our_logits(folder), random_models.logits(random_models.reload(folder), IDS)
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling(tmp_path: Path, kind: str) -> None:
    folder = random_models.save(random_models.llama(seed=2, rope_parameters=ROPES[kind]), tmp_path)
    ours, theirs = our_logits(folder), random_models.logits(random_models.reload(folder), IDS)
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_dynamic_rope_beyond_the_trained_context(tmp_path: Path, factor: float) -> None:
    """transformers stretches by the length of the one forward, here 300; we by the context that was asked for."""
    rope = {"rope_type": "dynamic", "factor": factor, "rope_theta": 1e4}
    folder = random_models.save(random_models.llama(seed=2, rope_parameters=rope), tmp_path)
    ids = np.random.default_rng(1).integers(0, 200, 300).tolist()
    theirs = random_models.logits(random_models.reload(folder), ids)
    checkpoint = open_checkpoint(folder)
    model = canonical(checkpoint)
    assert model.config.max_context == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = replace(model, config=with_context(model.config, 300))
    engine = load_engine(checkpoint, model=longer, threads=2)
    ours = engine.forward([(engine.sequence(), ids)], all_logits=True)
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()
    plain = load(folder)
    with pytest.raises(UsageError, match="300 tokens; the model's context is 128"):
        plain.forward([(plain.sequence(), ids)])


@pytest.mark.parametrize("kind", [None, "linear", "llama3", "yarn"])
def test_a_longer_context_is_computed_as_asked(tmp_path: Path, kind: str | None) -> None:
    changes = {"rope_parameters": ROPES[kind]} if kind else {}
    folder = random_models.save(random_models.llama(seed=2, **changes), tmp_path)
    ids = np.random.default_rng(1).integers(0, 200, 300).tolist()
    checkpoint = open_checkpoint(folder)
    with pytest.warns(UserWarning, match="max_context is 300; the model was made for 128 tokens, and beyond them its text may be noise"):
        longer = replace(canonical(checkpoint), config=with_context(canonical(checkpoint).config, 300))
    engine = load_engine(checkpoint, model=longer, threads=2)
    ours, theirs = engine.forward([(engine.sequence(), ids)], all_logits=True), random_models.logits(random_models.reload(folder), ids)
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_windows_over_several_pages(tmp_path: Path, family: str) -> None:
    changes = {"max_position_embeddings": 1024, "sliding_window": 270}
    changes |= {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    folder = random_models.save(getattr(random_models, family)(**changes), tmp_path)
    ids = np.random.default_rng(1).integers(0, 200, 700).tolist()
    engine, theirs = load(folder), random_models.logits(random_models.reload(folder), ids)
    sequence = engine.sequence()
    ours = np.concatenate([engine.forward([(sequence, ids[at : at + 150])], all_logits=True) for at in range(0, 700, 150)])
    assert np.abs(ours - theirs).max() <= F16_FLIP * np.abs(theirs).max()


# What makes fluent noise of each family when it goes wrong: a change to config.json that must be seen in the logits.
WRONG = [
    ("qwen2", {}, {"rope_parameters": None, "rope_theta": 5e5}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
        {"use_sliding_window": False, "layer_types": None},
    ),
    ("qwen3", {}, {"rms_norm_eps": 0.5}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ("llama", {"rope_parameters": ROPES["llama3"]}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("gemma3_text", {}, {"query_pre_attn_scalar": 24}),
    ("gemma3_text", {}, {"sliding_window": 21}),
    ("gemma3_text", {}, {"layer_types": ["full_attention"] * 3}),
    ("gemma3_text", {}, {"rope_parameters": None, "rope_local_base_freq": 1e6}),
]


@pytest.mark.parametrize(("family", "changes", "wrong"), WRONG)
def test_a_wrong_setting_fails(tmp_path: Path, family: str, changes: dict, wrong: dict) -> None:
    model = getattr(random_models, family)(seed=3, **changes)
    theirs = random_models.logits(model, IDS)
    random_models.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    assert np.abs(our_logits(tmp_path) - theirs).max() > 4 * F16_FLIP * np.abs(theirs).max()


# The same for weights: which vectors or matrices go missing in meaning, not in name.
@pytest.mark.parametrize(
    ("family", "name", "spoil"),
    [
        ("gemma3_text", "norm.weight", lambda w: w + 1),  # GGUF's norms taken for Hugging Face's
        ("gemma3_text", "post_feedforward_layernorm.weight", lambda w: w * 0),
        ("qwen3", "k_norm.weight", lambda w: w * 0 + 1),
        ("qwen2", "v_proj.bias", lambda w: w * 0),
        ("llama", "q_proj.weight", lambda w: w.reshape(6, 2, 8, 96).transpose(0, 2, 1, 3).reshape(96, 96)),  # rows of the other rope
    ],
)
def test_a_spoilt_weight_fails(tmp_path: Path, family: str, name: str, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    model = getattr(random_models, family)(seed=4)
    theirs = random_models.logits(model, IDS)
    folder = random_models.save(model, tmp_path)
    tensors = {n: t.dense() for n, t in safetensors.read(folder / "model.safetensors").tensors.items()}
    spoilt = {n: np.ascontiguousarray(spoil(w) if n.endswith(name) else w, np.float32) for n, w in tensors.items()}
    safetensors.write(folder / "model.safetensors", spoilt, {"format": "pt"})
    assert np.abs(our_logits(folder) - theirs).max() > 4 * F16_FLIP * np.abs(theirs).max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bitnet_online(tmp_path: Path, seed: int) -> None:
    model = random_models.bitnet(seed)
    ours, theirs = our_logits(random_models.save(model, tmp_path)), random_models.logits(model, IDS)
    assert relative(ours, theirs).max() <= INT8_NOISE


def test_the_first_bitnet_models_by_their_own_names(tmp_path: Path) -> None:
    """1bitLLM's: a config of llama, SiLU, sub-norms of other names, masters without a quantization_config."""
    model = random_models.bitnet(8, hidden_act="silu")
    expected = random_models.logits(model, IDS)
    folder = random_models.save(model, tmp_path)
    older = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    tensors = {}
    for name, tensor in safetensors.read(folder / "model.safetensors").tensors.items():
        for ours, theirs in older.items():
            name = name.replace(ours, theirs)
        tensors[name] = np.ascontiguousarray(tensor.dense())
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    config |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    assert relative(our_logits(folder), expected).max() <= INT8_NOISE
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="has tensors that such a model does not have"):
        load(folder)


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


@pytest.mark.parametrize("family", ["llama", "bitnet", "qwen2", "qwen3", "gemma3_text"])
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
