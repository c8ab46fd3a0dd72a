"""What a format can hold exactly, what is refused, and what requantizing costs: against numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import packed_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import write

from bitnet.convert import FORMATS, InexactError, convert
from bitnet.convert.fit import fit, three_valued
from bitnet.convert.quantize import divisor
from bitnet.convert.source import Weight, from_codes, read, simplest
from bitnet.errors import BitNetError, UnsupportedModelError, UsageError
from bitnet.models import open_checkpoint

ROWS, INPUTS = 8, 512


def weight(scales: np.ndarray, zeros: bool = True, name: str = "layers.0.gate") -> Weight:
    codes = np.random.default_rng(1).choice([-1, 0, 1] if zeros else [-1, 1], (ROWS, INPUTS)).astype(np.int8)
    return from_codes(name, codes.shape, "ternary", "file: tensor 'x'", lambda a, b: codes[a:b], np.asarray(scales, np.float32))


def fitted(form: str, scales: np.ndarray, requantize: bool = False, beside: bool = False, **more: bool):  # type: ignore[no-untyped-def]
    return fit(weight(scales, **more), FORMATS[form], requantize, ["bf16"], beside, True)


HALVES = np.float16(np.random.default_rng(2).uniform(0.01, 0.1, (ROWS, INPUTS // 64))).astype(
    np.float32
)  # one for 64 inputs, all different
EQUAL_PAIRS = np.repeat(HALVES[:, ::2], 2, axis=1)  # in fact one for 128
EXACT = {
    "gguf-q2_0": [HALVES, EQUAL_PAIRS, HALVES[:, :1], HALVES[:1, :1]],
    "gguf-pq2_0": [EQUAL_PAIRS, HALVES[:, ::2], HALVES[:, :1]],
    "gguf-ptq1_0": [EQUAL_PAIRS, HALVES[:, ::2], HALVES[:, :1]],
    "mlx": [EQUAL_PAIRS, HALVES[:, ::2] * np.float32(1.1), HALVES[:, :1]],
    "gguf-tq2_0": [HALVES[:, ::4], HALVES[:, :1], np.repeat(HALVES[:, :2], 4, axis=1)],
    "gguf-i2_s": [HALVES[:1, :1] * np.float32(1.1), np.full((ROWS, 8), 0.3, np.float32)],
    "hf": [HALVES[:1, :1] * np.float32(1.1), np.full((ROWS, 1), 0.3, np.float32)],
}


@pytest.mark.parametrize(("form", "scales"), [(form, scales) for form, cases in EXACT.items() for scales in cases])
def test_exact(form: str, scales: np.ndarray) -> None:
    found, loss = fitted(form, scales)
    assert loss is None
    assert np.array_equal(found.values(0, ROWS), weight(scales).values(0, ROWS))


INEXACT = {
    "gguf-pq2_0": (HALVES, r"has a scale for every 64 inputs, and they differ; gguf-pq2_0 has one for the 128 inputs of a block"),
    "gguf-tq1_0": (
        EQUAL_PAIRS[:, ::2],
        r"has a scale for every 128 inputs, and they differ; gguf-tq1_0 has one for the 256 inputs of a block",
    ),
    "gguf-tq2_0": (
        HALVES[:, :1] * np.float32(1.01),
        r"has scales that gguf-tq2_0 cannot hold \(0\.\d+ would become 0\.\d+; off by \d\.\de-0[45]",
    ),
    "gguf-i2_s": (HALVES[:, :1], r"has a scale for every row, and they differ; gguf-i2_s has one for the whole tensor"),
    "hf": (HALVES, r"has a scale for every 64 inputs, and they differ; hf has one for the whole tensor"),
}


@pytest.mark.parametrize("form", INEXACT)
def test_refused_or_requantized(form: str) -> None:
    scales, message = INEXACT[form]
    with pytest.raises(InexactError, match=rf"^file: tensor 'x': {message}.*--allow-requantize$"):
        fitted(form, scales)
    found, loss = fitted(form, scales, requantize=True)
    before, after = weight(scales).values(0, ROWS).astype(np.float64), found.values(0, ROWS).astype(np.float64)
    assert np.array_equal(np.sign(before), np.sign(after)), "the trits stay"
    assert loss is not None and loss.relative == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-9)
    assert 0 < loss.relative < 0.6
    assert fit(found, FORMATS[form], False, ["bf16"], False, True)[1] is None, "now it fits"
    for other in (0.99, 1.01):  # least squared error: any other scale is worse (f16 allows for its own rounding)
        assert np.linalg.norm(after * other - before) > np.linalg.norm(after - before) or form == "gguf-tq2_0"


def test_one_scale_beside_the_blocks() -> None:
    scales = np.float32([[0.1]])
    with pytest.raises(InexactError, match="cannot hold"):
        fitted("gguf-tq2_0", scales)
    assert fitted("gguf-tq2_0", scales, beside=True)[1] is None


def test_scales_of_groups_of_zeros_say_nothing() -> None:
    codes = np.zeros((ROWS, INPUTS), np.int8)
    codes[:, 64:] = 1
    scales = np.full((ROWS, 8), 0.5, np.float32)
    scales[:, 0] = 0  # as llama.cpp writes a block of nothing but zeros
    idle = from_codes("layers.0.up", codes.shape, "ternary", "x", lambda a, b: codes[a:b], scales)
    found, loss = fit(idle, FORMATS["hf"], False, ["bf16"], False, True)
    assert loss is None and found.scales is not None and found.scales.tolist() == [[0.5]]
    codes[0, 0] = 1  # now it says that this one is 0
    with pytest.raises(InexactError, match="they differ"):
        fit(idle, FORMATS["hf"], False, ["bf16"], False, True)


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("gguf-tq2_0", (4, 384), r"has 384 inputs a row; gguf-tq2_0 needs a multiple of 256 \(gguf-q2_0 takes multiples of 64\)"),
        ("gguf-q2_0", (4, 96), r"has 96 inputs a row; gguf-q2_0 needs a multiple of 64 \(safetensors takes any\)"),
        ("gguf-i2_s", (3, 100), r"has 300 weights; gguf-i2_s needs a multiple of 128 \(safetensors takes any\)"),
        ("mlx", (4, 64), r"has 64 inputs a row; mlx needs a multiple of 128"),
    ],
)
def test_shapes_that_do_not_fit(form: str, shape: tuple[int, int], message: str) -> None:
    codes = np.ones(shape, np.int8)
    one = from_codes("layers.0.up", shape, "ternary", "x", lambda a, b: codes[a:b], np.ones((1, 1), np.float32))
    with pytest.raises(UsageError, match=message):
        fit(one, FORMATS[form], True, ["bf16"], False, True)


def test_binary_holds_no_zeros() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"has \d+ zeros? among its weights; gguf-q1_0 is binary and holds none|has 1,\d+ zeros among"
    ):
        fitted("gguf-q1_0", HALVES[:1, :1])
    assert fitted("gguf-q1_0", HALVES[:1, :1], zeros=False)[1] is None


@given(st.floats(2.0**-20, 2.0**20, width=32))
@settings(max_examples=300, deadline=None)
def test_the_reciprocal_is_the_best_there_is(scale: float) -> None:
    wanted = np.float32([[scale]])
    found = divisor(wanted)
    for other in (np.nextafter(found, np.float32(0)), np.nextafter(found, np.float32(np.inf))):
        assert abs(np.float32(1) / found - wanted) <= abs(np.float32(1) / other - wanted)


@pytest.mark.parametrize("group", [0, INPUTS, 256, 128, 64])
def test_dense_weights_of_three_values_are_found(group: int) -> None:
    scales = np.float32([[0.3]]) if group == 0 else np.random.default_rng(3).uniform(0.1, 1, (ROWS, INPUTS // group)).astype(np.float32)
    one = weight(scales)
    dense = Weight(one.name, one.shape, "f32", "x", one.values)
    found = three_valued(dense)
    assert found.codes is not None and one.codes is not None and found.scales is not None
    assert np.array_equal(found.codes(0, ROWS), one.codes(0, ROWS)) and np.array_equal(found.scales, simplest(scales))


def test_other_dense_weights_are_not_ternary() -> None:
    values = weight(HALVES).values(0, ROWS)
    values[5, 64:66] = 1, 1.5
    dense = Weight("layers.0.up", values.shape, "f32", "x", lambda a, b: values[a:b])
    with pytest.raises(
        InexactError, match=r"x: is f32 and not ternary \(4 magnitudes in 64 inputs of row 5\). To make it ternary add --quantization"
    ):
        three_valued(dense)


def test_f32_scales_go_into_gguf_where_llama_cpp_reads_them(tmp_path: Path) -> None:
    """Beside the blocks for llama, qwen3 and bitnet; of the others llama.cpp would forget it."""
    for family in packed_models.PARTICULARS:
        source = write(tmp_path / family, family, scale="f32")
        target = tmp_path / f"{family}.gguf"
        if family in ("llama", "qwen3", "bitnet"):
            convert(source, target)
            assert (
                sum(name.endswith(".scale") for name in open_checkpoint(target).tensors)
                == 7 * open_checkpoint(source).config["num_hidden_layers"]
            )
            continue
        with pytest.raises(InexactError, match="cannot hold"):
            convert(source, target)
        assert not target.exists()
        report = convert(source, target, allow_requantize=True)
        assert report.losses and max(loss.relative for loss in report.losses) <= 2.0**-11, "f16 rounds by half of 2^-10"


def test_block_types_of_the_embedding_stay_what_they_are(tmp_path: Path) -> None:
    """bitnet.gguf has TQ layers and a Q6_K table: the same bytes in another GGUF, the same values elsewhere."""
    source = Path(__file__).parents[1] / "golden" / "gguf" / "bitnet.gguf"
    before = open_checkpoint(source).tensors["token_embd.weight"]
    convert(source, tmp_path / "m.gguf", format="gguf-i2_s")
    after = open_checkpoint(tmp_path / "m.gguf").tensors["token_embd.weight"]
    assert after.scheme == before.scheme == "q6_k" and np.array_equal(after.raw(), before.raw())
    convert(source, tmp_path / "hf")
    dense = open_checkpoint(tmp_path / "hf").tensors["model.embed_tokens.weight"]
    assert dense.scheme == "f32" and np.array_equal(dense.dense(), before.dense())


def test_a_dense_model_is_not_made_ternary_unasked(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", trits=False)
    with pytest.raises(InexactError, match=r"self_attn.q_proj.weight': is bf16 and not ternary .* --quantization ternary"):
        convert(source, tmp_path / "out")
    with pytest.raises(UsageError, match="gguf-q8_0 holds int8; add --quantization int8"):
        convert(source, tmp_path / "out.gguf", format="gguf-q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    convert(source, tmp_path / "out.gguf", format="gguf-bf16")
    convert(tmp_path / "out.gguf", tmp_path / "back", format="hf-dense-bf16")
    one, other = read(open_checkpoint(source)), read(open_checkpoint(tmp_path / "back"))
    assert all(np.array_equal(w.values(0, w.shape[0]), other.weights[n].values(0, w.shape[0])) for n, w in one.weights.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_gguf_key_says_is_refused(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    cases = [
        ("qwen3", windows, "1 layers see 16 tokens only"),
        ("gemma3_text", {"query_pre_attn_scalar": 30}, "llama.cpp scales its queries by"),
    ]
    cases += [("gemma3_text", {"sliding_window_pattern": 3}, "gives every 6th layer full attention")]
    for i, (family, changes, message) in enumerate(cases):
        source = write(tmp_path / str(i), family, **changes)
        with pytest.raises(BitNetError, match=message):
            convert(source, tmp_path / "m.gguf", format="gguf-q2_0")
        convert(source, tmp_path / f"{i}.safetensors")


def test_rows_that_transformers_does_not_load(tmp_path: Path) -> None:
    """It allocates rows // 4 bytes for each input (integrations/bitnet.py), so 510 rows, which need 128, are no folder for it."""
    source = write(tmp_path / "source", "llama", intermediate_size=510)
    for form in ("hf", "hf-bitlinear"):
        with pytest.raises(
            UsageError, match=r"gate_proj.weight': has 510 rows, and transformers loads packed layers of a multiple of 4 only"
        ):
            convert(source, tmp_path / "out", format=form, allow_requantize=True)
    assert not (tmp_path / "out").exists()
    for target in ("out.safetensors", "out.gguf"):
        convert(source, tmp_path / target, format=None if target == "out.safetensors" else "gguf-i2_s")
        one, other = read(open_checkpoint(source)), read(open_checkpoint(tmp_path / target))
        assert all(np.array_equal(w.values(0, w.shape[0]), other.weights[n].values(0, w.shape[0])) for n, w in one.weights.items())
