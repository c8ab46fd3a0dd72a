"""Adapters of PEFT's layout: what is read, what is refused, and the logits of base + adapter against transformers'.

Tolerances are those of the base alone (test_against_transformers.py): the adapter adds float32 sums of another order, and nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft_adapters as made
import pytest

from bitnet import ternary
from bitnet.convert import convert
from bitnet.engine import Adapter, Engine
from bitnet.errors import BitNetError
from bitnet.models import canonical, open_checkpoint
from bitnet.models.config import ModelConfig
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import read_adapter
from bitnet.weights import load_engine

random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")

IDS = np.random.default_rng(0).integers(0, 200, 60).tolist()
F16_FLIP = 2.0**-11
INT8_NOISE = 0.047


def config(folder: Path) -> ModelConfig:
    return canonical(open_checkpoint(folder)).config


def engine_of(folder: Path, threads: int = 2) -> Engine:
    return load_engine(open_checkpoint(folder), threads=threads)


def adapter_of(engine: Engine, folder: Path) -> Adapter:
    return engine.adapter(read_adapter(folder, engine.config).parts)


def logits(engine: Engine, adapter: Adapter | None, ids: list[int] = IDS) -> np.ndarray:
    return engine.forward([(engine.sequence(adapter), ids)], all_logits=True)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)


SHAPES: list[tuple[str, int, list[str], dict[str, Any]]] = [
    ("llama", 8, made.TARGETS, {}),
    ("llama", 3, ["q_proj", "v_proj"], {"attention_bias": True, "mlp_bias": True}),
    ("llama", 5, ["k_proj", "o_proj", "down_proj"], {"head_dim": 20}),
    ("qwen3", 4, ["q_proj", "k_proj", "up_proj"], {}),
    ("gemma3_text", 6, made.TARGETS, {}),
]


@pytest.mark.parametrize(("family", "rank", "targets", "changes"), SHAPES)
def test_dense_families_with_an_adapter(tmp_path: Path, family: str, rank: int, targets: list[str], changes: dict[str, Any]) -> None:
    folder = random_models.save(getattr(random_models, family)(seed=3, **changes), tmp_path / "base")
    engine, theirs = engine_of(folder), random_models.reload(folder)
    tensors = made.matrices(engine.config, rank, targets)
    adapter = adapter_of(engine, made.write(tmp_path / "adapter", made.config_of(rank, targets), tensors))
    base = random_models.logits(theirs, IDS)
    made.attach(theirs, tensors, 2.0)  # alpha / r
    expected = random_models.logits(theirs, IDS)
    assert np.abs(logits(engine, adapter) - expected).max() <= F16_FLIP * np.abs(expected).max()
    assert np.abs(logits(engine, None) - base).max() <= F16_FLIP * np.abs(base).max()
    assert relative(base, expected).min() > 16 * F16_FLIP  # the adapter is far from nothing


@pytest.mark.parametrize("ternary", [False, True])
def test_bitnet_with_an_adapter(tmp_path: Path, ternary: bool) -> None:
    """The base meets int8 activations, as it was trained; the adapter, which PEFT puts beside the whole layer, meets the floats."""
    model = random_models.bitnet(seed=4)
    folder = random_models.save(model, tmp_path / "base")
    engine = engine_of(folder)
    tensors = made.matrices(engine.config, 8, ternary=ternary)
    adapter = adapter_of(engine, made.write(tmp_path / "adapter", made.config_of(8, lora_alpha=128), tensors))
    base = random_models.logits(model, IDS)
    made.attach(model, tensors, 16.0)
    expected = random_models.logits(model, IDS)
    assert relative(logits(engine, adapter), expected).max() <= INT8_NOISE
    assert np.median(relative(base, expected)) > 4 * INT8_NOISE


def test_a_wrong_scale_is_seen(tmp_path: Path) -> None:
    folder = random_models.save(random_models.llama(seed=3), tmp_path / "base")
    engine, theirs = engine_of(folder), random_models.reload(folder)
    tensors = made.matrices(engine.config, 8)
    made.attach(theirs, tensors, 2.0)
    expected = random_models.logits(theirs, IDS)
    adapter = adapter_of(engine, made.write(tmp_path / "adapter", made.config_of(8, lora_alpha=17), tensors))
    assert np.abs(logits(engine, adapter) - expected).max() > 4 * F16_FLIP * np.abs(expected).max()


def test_alpha_by_pattern_and_ranks_by_pattern_and_rslora(tmp_path: Path) -> None:
    folder = random_models.save(random_models.llama(seed=5), tmp_path / "base")
    engine, theirs = engine_of(folder), random_models.reload(folder)
    tensors = made.matrices(engine.config, 4, ["v_proj"], seed=1) | made.matrices(engine.config, 7, ["q_proj"], seed=2)
    tensors |= made.matrices(engine.config, 4, ["up_proj"], seed=3)
    alphas = {"layers.0.self_attn.q_proj": 10, "^up_proj": 1000, "^model.layers.1.mlp.up_proj": 20, r"self_attn\.(k|v)_pro.": 5.5}
    written = made.config_of(
        4, ["v_proj", "q_proj", "up_proj"], use_rslora=True, lora_alpha=6, alpha_pattern=alphas, rank_pattern={r"layers\.\d+\..*q_proj": 7}
    )
    adapter = adapter_of(engine, made.write(tmp_path / "adapter", written, tensors))

    def scale(module: str) -> float:
        exact = {"model.layers.0.self_attn.q_proj": 10.0, "model.layers.1.mlp.up_proj": 20.0}
        alpha = exact.get(module, 5.5 if "v_proj" in module else 6.0)
        return alpha / math.sqrt(7 if "q_proj" in module else 4)

    made.attach(theirs, tensors, scale)
    expected = random_models.logits(theirs, IDS)
    assert np.abs(logits(engine, adapter) - expected).max() <= F16_FLIP * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16"])
def test_values_of_any_size_keep_sixteen_bits(scheme: str) -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.array([1e-9, 3e-4, 1, 7e3, 2e9]), np.array([2e9, 7e3, 1, 3e-4, 1e-9])
    if scheme == "f16":
        rows, columns = rows.clip(1e-3, 7e3), columns.clip(1e-3, 7e3)
    a, b = rng.normal(size=(5, 40)) * rows[:, None], rng.normal(size=(30, 5)) * columns
    a[1], b[:, 2] = 0, 0
    stored = [side.astype(np.float16 if scheme == "f16" else np.float32) for side in (a, b)]
    if scheme == "bf16":
        stored = [(side.view(np.uint32) >> 16).astype(np.uint16) for side in stored]
    low = LowRank(scheme, *stored, 0.3)
    a, b = (side.astype(np.float64) for side in low.dense())
    kept_a, kept_b, scales = low.codes()
    assert kept_a.dtype == kept_b.dtype == np.int16 and scales.dtype == np.float32
    largest = 0.3 * np.abs(a).max(axis=1) * np.abs(b).max(axis=0)
    error = kept_b[:, :, None] * scales.astype(np.float64)[:, None] * kept_a - 0.3 * b[:, :, None] * a
    assert (np.abs(error).max(axis=(0, 2)) <= largest * (2.0 / 65534 + 2.0**-22)).all()
    x = rng.normal(size=(3, 40)).astype(np.float32)
    ours = ternary.low_rank(kept_a.astype(np.float32), kept_b.astype(np.float32), scales, x)
    exact = 0.3 * (x @ a.T) @ b.T
    fours = np.pad(largest, (0, 3)).reshape(2, 4).max(axis=1)  # A x meets B in 15 bits: half a step is 1 / 32766 of the largest of four
    moved = (2.0 / 65534 + 50 * 2.0**-24) * largest.sum() + 4 / 32766 * fours.sum()
    assert (np.abs(ours - exact) <= moved * np.abs(x).sum(axis=1, keepdims=True)).all()


def test_ternary_factors_stay_what_they_are() -> None:
    rng = np.random.default_rng(1)
    sides = [rng.integers(-1, 2, size=shape).astype(np.float32) * np.float32(0.0123) for shape in ((4, 50), (60, 4))]
    a, b, scales = LowRank("f32", *sides, 2.0).codes()
    assert set(np.unique(a)) == set(np.unique(b)) == {-1, 0, 1}
    assert np.allclose(scales, 2 * 0.0123**2, rtol=2.0**-22)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "mixed"])
def test_stored_halves_are_what_they_are(tmp_path: Path, dtype: str) -> None:
    folder = random_models.save(random_models.llama(seed=6), tmp_path / "base")
    engine = engine_of(folder)
    tensors = made.matrices(engine.config, 8)
    stored, values = {}, {}
    for i, (name, value) in enumerate(tensors.items()):
        kind = "F16" if dtype == "mixed" and i % 3 else "BF16" if dtype == "mixed" else dtype
        stored[name] = value.astype(np.float16) if kind == "F16" else ("BF16", (value.view(np.uint32) >> 16).astype(np.uint16))
        values[name] = (
            value.astype(np.float16).astype(np.float32) if kind == "F16" else (value.view(np.uint32) >> 16 << 16).view(np.float32)
        )
    one = adapter_of(engine, made.write(tmp_path / "stored", made.config_of(8), stored))
    other = adapter_of(engine, made.write(tmp_path / "widened", made.config_of(8), values))
    assert np.array_equal(logits(engine, one), logits(engine, other))
    assert one.nbytes == other.nbytes


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_the_same_bits_alone_and_beside_other_adapters(tmp_path: Path, family: str) -> None:
    folder = random_models.save(getattr(random_models, family)(seed=7), tmp_path / "base")
    whole, names = {}, ("none", "all", "some")
    for threads in (1, 3):
        engine = engine_of(folder, threads)
        every = made.write(tmp_path / "all", made.config_of(8), made.matrices(engine.config, 8))
        targets = ["k_proj", "down_proj"]
        some = made.write(tmp_path / "some", made.config_of(5, targets), made.matrices(engine.config, 5, targets, seed=9))
        adapters = {"none": None, "all": adapter_of(engine, every), "some": adapter_of(engine, some)}
        for name in names:
            assert np.array_equal(whole.setdefault(name, logits(engine, adapters[name])), logits(engine, adapters[name]))
        order = ("all", "none", "some", "all", "none")  # one sequence each; those of one adapter side by side and apart
        sequences = [engine.sequence(adapters[name]) for name in (*order, "all")]
        at = 0
        for n in (1, 33, 2, 24):  # in chunks
            rows = engine.forward([(s, IDS[at : at + n]) for s in sequences], all_logits=True).reshape(len(sequences), n, -1)
            for name, row in zip((*order, "all"), rows, strict=True):
                assert np.array_equal(row, whole[name][at : at + n])
            at += n
    assert not any(np.array_equal(whole[a], whole[b]) for a in names for b in names if a < b)


def test_rows_that_a_format_keeps_in_another_order(tmp_path: Path) -> None:
    """llama in GGUF has the rows of q and k by rope's pairs; the adapter keeps Hugging Face's order, and fits all the same."""
    folder = random_models.save(random_models.llama(seed=8), tmp_path / "base")
    convert(folder, tmp_path / "base.gguf", format="gguf-f32")
    ours, theirs = engine_of(folder), engine_of(tmp_path / "base.gguf")
    assert theirs.config.rope_interleaved and not ours.config.rope_interleaved
    tensors = made.matrices(ours.config, 8, ["q_proj", "k_proj", "v_proj"])
    path = made.write(tmp_path / "adapter", made.config_of(8, ["q_proj", "k_proj", "v_proj"]), tensors)
    one, other = logits(ours, adapter_of(ours, path)), logits(theirs, adapter_of(theirs, path))
    assert np.abs(one - other).max() <= F16_FLIP * np.abs(one).max()
    assert np.abs(one - logits(theirs, None)).max() > 8 * F16_FLIP * np.abs(one).max()


def renamed(old: str, new: str) -> Any:
    return lambda t: {name.replace(old, new): value for name, value in t.items()}


def scaled(factor: float) -> Any:
    return lambda t: {name: value * np.float32(factor) for name, value in t.items()}


def cut(side: str, *index: Any) -> Any:
    return lambda t: {name: value[index] if side in name else value for name, value in t.items()}


PLAIN = "this build runs plain LoRA"
FIT = "but that matrix of the base is"
REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"use_dora": True}, None, f"use_dora is True; {PLAIN}, and without it the adapter would not be itself"),
    ({"modules_to_save": ["lm_head"]}, None, rf"modules_to_save is \['lm_head'\]; {PLAIN}"),
    ({"bias": "lora_only"}, None, "bias is 'lora_only': it trained biases too"),
    ({"lora_bias": True}, None, f"lora_bias is True; {PLAIN}"),
    ({"a_later_invention": {"x": 1}}, None, f"a_later_invention is {{'x': 1}}; {PLAIN}"),
    ({"peft_type": "IA3"}, None, "peft_type is 'IA3'; this build runs LORA"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa', which changes the base's own weights"),
    ({"init_lora_weights": []}, None, r"init_lora_weights is \[\], which changes"),
    ({"alpha_pattern": {"(?=x)q_proj": 1}}, None, r"alpha_pattern: '\(\?=x\)q_proj' has a group that looks around"),
    ({"rank_pattern": {".*q_proj": 9}}, None, r"layers.0.q has rank 8, but adapter_config.json says r = 9"),
    ({"alpha_pattern": [1]}, None, r"alpha_pattern is \[1\]; expected names with numbers"),
    ({"lora_alpha": "x"}, None, "lora_alpha is 'x'; expected a number above 0"),
    ({"r": 9}, None, r"layers.0.q has rank 8, but adapter_config.json says r = 9"),
    ({"target_modules": ["q_proj"]}, None, r"has weights for model.layers.0.self_attn.v_proj, but target_modules do not name it"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, None, "has no weights for .*0.self_attn.o_proj, but target_modules name it"),
    ({"layers_to_transform": [0, 1]}, None, "has weights for model.layers.2.self_attn.q_proj, but"),
    ({"layers_to_transform": ["x"]}, None, r"layers_to_transform is \['x'\]; expected numbers of layers"),
    ({}, renamed("q_proj", "qkv_proj"), "'base_model.*layers.0.self_attn.qkv_proj.lora_A.weight' belongs to no linear layer"),
    ({}, renamed("layers.2.", "layers.3."), "of this llama model of 3 layers; the adapter is for another model"),
    ({}, renamed("q_proj.lora_A", "q_proj.lora_magnitude_vector"), "'.*lora_magnitude_vector.weight' belongs to no linear layer"),
    ({}, lambda t: {n: v for n, v in t.items() if "1.self_attn.q_proj.lora_B" not in n}, "'.*1.self_attn.q_proj.lora_A.*': stands alone"),
    ({}, cut("lora_A", ..., slice(50)), rf"layers.0.q has A \[8, 50\] and B \[96, 8\], {FIT} \[96, 96\]"),
    ({}, cut("v_proj.lora_B", slice(20)), rf"layers.0.v has A \[8, 96\] and B \[20, 8\], {FIT} \[32, 96\]"),
    ({}, lambda t: {n: v.astype(np.float64) for n, v in t.items()}, "is stored as F64; expected F32, F16 or BF16"),
    ({}, scaled(np.nan), "holds NaN or infinity"),
    ({}, lambda t: {}, "holds no tensor; expected lora_A and lora_B of one linear layer or more"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "damage", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_would_not_be_the_adapter_is_refused(tmp_path: Path, changes: dict[str, Any], damage: Any, message: str) -> None:
    base = config(random_models.save(random_models.llama(seed=3), tmp_path / "base"))
    targets = ["q_proj", "v_proj"]
    tensors = made.matrices(base, 8, targets)
    folder = made.write(tmp_path / "adapter", made.config_of(8, targets, **changes), damage(tensors) if damage else tensors)
    with pytest.raises(BitNetError, match=message) as error:
        read_adapter(folder, base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_is_no_adapter(tmp_path: Path) -> None:
    base = config(random_models.save(random_models.llama(seed=3), tmp_path / "base"))
    with pytest.raises(BitNetError, match=r"nothing: no such folder or file; expected an adapter's folder as PEFT saves it, or llama"):
        read_adapter(tmp_path / "nothing", base)
    with pytest.raises(BitNetError, match=r"holds no adapter_config.json; expected an adapter's folder as PEFT saves it"):
        read_adapter(tmp_path / "base", base)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BitNetError, match=r"adapter_model.safetensors: no such file"):
        read_adapter(tmp_path / "a", base)
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BitNetError, match=r"has adapter_model.bin, a pickle that could run any code"):
        read_adapter(tmp_path / "a", base)


def test_an_adapter_that_peft_itself_wrote(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = random_models.save(random_models.llama(seed=9), tmp_path / "base")
    # patterns in the order of their names, in which PEFT saves them, whatever order they had
    lora = peft.LoraConfig(
        r=8, lora_alpha=24, target_modules=["q_proj", "down_proj"], rank_pattern={r"(up|down)_proj": 3}, layers_to_transform=[1, 2],
        alpha_pattern={r"(.*\.)?layers\.[01]\..*down_proj": 5, ".*proj": 7}, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    random_models.torch.manual_seed(0)
    adapted = peft.get_peft_model(random_models.reload(folder), lora).eval()
    expected = random_models.logits(adapted, IDS)
    adapted.save_pretrained(tmp_path / "adapter")
    engine = engine_of(folder)
    adapter = adapter_of(engine, tmp_path / "adapter")
    assert np.abs(logits(engine, adapter) - expected).max() <= F16_FLIP * np.abs(expected).max()
    assert relative(logits(engine, None), expected).min() > 16 * F16_FLIP
