"""Ordinary weights into ternary, int8 and int4: the definitions of bitnet.ternary, the article's alphas, and scales of least error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from packed_models import logits, safetensors, write

from bitnet import ternary
from bitnet.convert import Ternarization, convert
from bitnet.convert.quantize import ALPHAS, binary, integer, read_alphas, representable, rounded, ternarized
from bitnet.convert.source import Weight, read
from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.models import LINEARS, open_checkpoint

VALUES = np.random.default_rng(4).standard_normal((96, 256)).astype(np.float32) * np.linspace(0.5, 2, 96, dtype=np.float32)[:, None]


def weight(name: str = "layers.0.q", values: np.ndarray = VALUES) -> Weight:
    return Weight(name, values.shape, "f32", "file: tensor 'x'", lambda a, b: values[a:b])


def parts(found: Weight) -> tuple[np.ndarray, np.ndarray]:
    assert found.codes is not None and found.scales is not None
    return found.codes(0, found.shape[0]), found.scales


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.065, 0.5, 2.0])
def test_threshold_is_ternarize_with_the_scale_of_least_error(alpha: float) -> None:
    codes, scales = parts(ternarized(weight(), Ternarization(alpha=alpha), "f32"))
    assert np.array_equal(codes, ternary.ternarize(VALUES, alpha)) and scales.shape == (1, 1)
    best = (VALUES.astype(np.float64) * codes).sum() / (codes != 0).sum()
    assert scales[0, 0] == np.float32(best)
    errors = [np.linalg.norm(VALUES - codes * s) for s in (scales[0, 0], scales[0, 0] * 0.99, scales[0, 0] * 1.01)]
    assert errors[0] == min(errors)


def test_absmean_is_its_definition() -> None:
    codes, scales = parts(ternarized(weight(), Ternarization("absmean"), "f32"))
    expected, scale = ternary.absmean(VALUES)
    assert np.array_equal(codes, expected) and scales[0, 0] == scale


@pytest.mark.parametrize("method", ["threshold", "absmean"])
@pytest.mark.parametrize("unit", ["row", 64, 128])
def test_a_row_or_a_group_is_a_tensor_of_its_own(method: str, unit: str | int) -> None:
    codes, scales = parts(ternarized(weight(), Ternarization(method, None, unit), "f32"))
    width = 256 if unit == "row" else int(unit)
    pieces = [VALUES[r : r + 1, k : k + width] for r in range(96) for k in range(0, 256, width)]
    alone = [parts(ternarized(weight(values=piece), Ternarization(method), "f32")) for piece in pieces]
    assert np.array_equal(codes.reshape(-1, width), np.concatenate([c for c, _ in alone]))
    assert np.allclose(scales.reshape(-1), np.concatenate([s[0] for _, s in alone]), rtol=2e-7, atol=0), "sums of another order"


def test_runs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts(ternarized(weight(), Ternarization(), "f32"))
    monkeypatch.setattr("bitnet.convert.source.CHUNK", 256 * 7)
    pieces = parts(ternarized(weight(), Ternarization(), "f32"))
    assert np.array_equal(whole[0], pieces[0]) and np.allclose(whole[1], pieces[1], rtol=2e-7)


def test_the_articles_alphas() -> None:
    assert {part: ALPHAS[part] for part in LINEARS} == {"q": 0.08, "k": 0.08, "v": 0.08, "o": 0.06, "gate": 0.06, "up": 0.06, "down": 0.06}
    assert ALPHAS["embedding"] == ALPHAS["head"] == 0.05
    shares = {}
    for name in ("layers.3.q", "layers.3.o", "head"):
        codes, scales = parts(ternarized(weight(name), Ternarization(), "f32"))
        shares[name] = (codes == 0).mean()
        assert scales.shape == ((96, 1) if name == "head" else (1, 1)), "tables have a scale for every row"
    assert shares["layers.3.q"] > shares["layers.3.o"] > shares["head"] > 0
    assert Ternarization(alpha=0.065).alpha_of("head") == 0.065


@pytest.mark.parametrize("stored", ["f16", "bf16", "f32"])
def test_scales_are_rounded_to_what_the_file_holds(stored: str) -> None:
    exact = parts(ternarized(weight(), Ternarization(), "f32"))
    found = parts(ternarized(weight(), Ternarization(), stored))
    assert np.array_equal(found[0], exact[0]) and np.array_equal(found[1], rounded(exact[1], stored))
    assert abs(found[1] / exact[1] - 1) <= {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 0}[stored]


def test_int4_is_its_definition_and_int8_with_f16_scales() -> None:
    codes, scales = parts(integer(weight(), "int4"))
    expected = ternary.quantize_int4(VALUES, 32)
    assert np.array_equal(codes, expected[0]) and np.array_equal(scales, expected[1])
    codes, scales = parts(integer(weight(), "int8"))
    assert np.array_equal(scales, rounded(ternary.quantize_int8(VALUES, 32)[1], "f16")) and np.abs(codes).max() == 127
    step = np.repeat(scales, 32, axis=1)
    assert np.all(np.abs(codes * step - VALUES) <= step * (0.5 + 127 * 2.0**-11)), "half a step, and f16's rounding of the largest"


def test_what_is_refused() -> None:
    for arguments, message in (
        ({"method": "best"}, "method is 'best'; expected one of threshold, absmean"),
        ({"alpha": -1.0}, "alpha is -1.0; expected a finite number >= 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"method": "absmean", "alpha": 0.1}, "absmean has no alpha"),
        ({"scale": "column"}, "scale is 'column'; expected tensor, row, or group:N, a multiple of 32"),
        ({"scale": 33}, "scale is 33"),
    ):
        with pytest.raises(UsageError, match=message):
            Ternarization(**arguments)
    with pytest.raises(UsageError, match="has 256 inputs, which are no whole groups of 96"):
        ternarized(weight(), Ternarization(scale=96), "f32")
    with pytest.raises(FormatError, match="tensor 'x': holds NaN or infinity"):
        ternarized(weight(values=np.full((2, 64), np.nan, np.float32)), Ternarization(), "f32")
    codes, scales = parts(ternarized(weight(values=np.zeros((2, 64), np.float32)), Ternarization(), "f32"))
    assert not codes.any() and scales[0, 0] == np.float32(1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("form", ["hf", "safetensors", "mlx", "gguf-tq2_0", "gguf-q2_0", "gguf-i2_s", "hf-dense-bf16"])
def test_a_whole_model(tmp_path: Path, family: str, form: str) -> None:
    """Verified against what was computed, runs, and its tables are ternary too, packed where the format can."""
    source = write(tmp_path / "source", family, trits=False)
    target = tmp_path / ("m.gguf" if "gguf" in form else "out.safetensors" if form == "safetensors" else "out")
    report = convert(source, target, format=form, quantization="ternary")
    assert not report.losses and report.verified
    found, before = read(open_checkpoint(target)), read(open_checkpoint(source))
    for name, w in found.weights.items():
        if w.kind not in (*LINEARS, "embedding", "head"):
            continue
        values = w.values(0, w.shape[0])
        assert len(np.unique(np.abs(values[0]))) <= 2
        assert np.array_equal(np.sign(values), ternary.ternarize(before.weights[name].values(0, w.shape[0]), ALPHAS[w.kind])) or w.kind in (
            "embedding",
            "head",
        )
        packed = form != "hf-dense-bf16" and (w.kind in LINEARS or form in ("mlx", "gguf-tq2_0", "gguf-q2_0"))
        assert (w.scheme == "ternary") == packed
    assert np.isfinite(logits(target)).all()


@pytest.mark.parametrize(
    ("scheme", "form", "kind"), [("int8", "gguf-q8_0", "q8_0"), ("int4", "gguf-q4_0", "q4_0"), ("fp16", "gguf-f16", "f16")]
)
def test_other_schemes_go_through_the_same_door(tmp_path: Path, scheme: str, form: str, kind: str) -> None:
    source = write(tmp_path / "source", "llama", trits=False)
    report = convert(source, tmp_path / "m.gguf", quantization=scheme)
    assert report.format == form and report.verified
    tensors = open_checkpoint(tmp_path / "m.gguf").tensors
    assert {tensors[name].scheme for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_q.weight", "output.weight")} == {kind}
    error = np.linalg.norm(logits(tmp_path / "m.gguf", weights="f16") - logits(source)) / np.linalg.norm(logits(source))
    assert error < {"int8": 0.05, "int4": 0.5, "fp16": 0.01}[scheme]
    with pytest.raises(UsageError, match=f"does not hold fp16|holds {scheme}|not {scheme}"):
        convert(source, tmp_path / "other", format="hf", quantization=scheme)


def test_what_is_ternary_already_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3")
    report = convert(source, tmp_path / "out", quantization="ternary")
    assert any("7 weights of the source are ternary or binary already" in note for note in report.notes)
    one, other = read(open_checkpoint(source)), read(open_checkpoint(tmp_path / "out"))
    assert np.array_equal(one.weights["layers.0.q"].values(0, 256), other.weights["layers.0.q"].values(0, 256))


def test_a_binary_source_yields_no_zeros_and_says_so(tmp_path: Path) -> None:
    convert(write(tmp_path / "source", "qwen3", zeros=False), tmp_path / "b.gguf", format="gguf-q1_0")
    assert open_checkpoint(tmp_path / "b.gguf").tensors["blk.0.attn_q.weight"].scheme == "binary"
    report = convert(tmp_path / "b.gguf", tmp_path / "t.gguf", format="gguf-q2_0", quantization="ternary")
    assert any("yield no zeros for any alpha below 1" in note for note in report.notes)
    trits = open_checkpoint(tmp_path / "t.gguf").tensors["blk.0.attn_q.weight"].trits()
    assert not (trits == 0).any()


def test_what_belongs_to_a_quantization_is_refused_by_its_name(tmp_path: Path) -> None:
    kept = (("q", "keep"),)
    for how, scheme, message in (
        (Ternarization(alpha=0.1), None, "alpha: of quantization 'ternary' only; add it"),
        (Ternarization(alphas=(*kept, ("k", 0.1))), "int8", "alpha: of quantization 'ternary' only"),
        (Ternarization("gptq", scale="row", alphas=kept), None, "method and scale: of quantization 'ternary' only"),
        (Ternarization(alphas=kept), None, "keep: of a quantization only, and none was asked for; add one"),
        (Ternarization(), None, "ternarization: of a quantization only, and none was asked for"),
    ):
        with pytest.raises(UsageError, match=f"^{message}"):
            convert(write(tmp_path / "source"), tmp_path / "out", quantization=scheme, ternarization=how)
    with pytest.raises(UsageError, match="quantization is 'nf4'; expected one of ternary, binary, int8, int4, fp4, fp16"):
        convert(write(tmp_path / "source"), tmp_path / "out", quantization="nf4")


@pytest.mark.parametrize("size", [1e-7, 1e-15])
def test_small_weights_keep_their_scale(size: float) -> None:
    """absmean's has a least size, as BitNet models are trained; that of a threshold is the mean, however small."""
    values = (size * np.random.default_rng(0).standard_normal((32, 64))).astype(np.float32)
    some, nothing = weight(values=values), weight(values=0 * values)
    for made in (ternarized(some, Ternarization(alpha=0.7), "f32"), binary(some, "tensor", "f32")):
        assert np.linalg.norm(made.values(0, 32) - values) < 0.7 * np.linalg.norm(values)
    assert ternarized(some, Ternarization("absmean"), "f32").scales == np.float32(1e-5)
    for made in (ternarized(nothing, Ternarization(), "reciprocal"), binary(nothing, "tensor", "reciprocal")):
        assert made.scales is not None and np.isfinite(1 / made.scales).all()


@pytest.mark.parametrize(
    ("scheme", "form"), [("ternary", "gguf-tq2_0"), ("ternary", "mlx"), ("binary", "gguf-q1_0"), ("int8", "gguf-q8_0"), ("fp4", "hf-fp4")]
)
def test_scales_beyond_f16(tmp_path: Path, scheme: str, form: str) -> None:
    source = write(tmp_path / "source", "qwen3", trits=False)
    stored = safetensors.read(source / "model.safetensors").tensors
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {name: stored[name].dense() * np.float32(1e8)}
    safetensors.write(source / "model.safetensors", {key: ("BF16", t.raw()) for key, t in stored.items()} | changed)
    with pytest.raises(UnsupportedModelError, match=rf"{name}': has weights so large that f16 does not hold their scale as {scheme}"):
        convert(source, tmp_path / "out", format=form, quantization=scheme)
    assert not (tmp_path / "out").exists() and convert(source, tmp_path / "out", quantization="ternary").verified


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("ternary", "gguf-tq2_0"), ("ternary", "mlx"), ("ternary", "hf-dense-f16"), ("binary", "gguf-q1_0"), ("int8", "hf-int8"),
     ("int4", "gguf-q4_0"), ("fp4", "hf-fp4")],
)  # fmt: skip
def test_scales_below_f16(tmp_path: Path, scheme: str, form: str) -> None:
    """A layer does not vanish; nothing but zeros, and a row far below the others, may."""
    source = write(tmp_path / "source", "qwen3", trits=False)
    stored = safetensors.read(source / "model.safetensors").tensors
    name, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    values, rows = stored[name].dense(), stored[table].dense().copy()

    def changed(up: np.ndarray, **more: np.ndarray) -> None:
        tensors = {key: ("BF16", t.raw()) for key, t in stored.items()} | {name: up.astype(np.float32)}
        safetensors.write(source / "model.safetensors", tensors | ({table: rows} if more else {}))

    small = 3e-9 / np.abs(values).max() * values
    changed(small)
    with pytest.raises(UnsupportedModelError, match=rf"{name}.* so small \(3.0e-09 at most\) that f16 rounds .* as {scheme} to 0"):
        convert(source, tmp_path / "out", format=form, quantization=scheme)
    assert not (tmp_path / "out").exists() and convert(source, tmp_path / "out", quantization="ternary").verified
    rows[3] *= np.float32(1e-23)
    changed(0 * values, rows=rows)
    report = convert(source, tmp_path / "zeros", format=form, quantization=scheme)
    assert report.verified and next(layer for layer in report.layers if layer.name == "layers.0.up").weight_error == 0


@pytest.mark.parametrize(("beside", "refused"), [(1e-7, True), (2e-5, True), (5e-5, False), (1.0, False)])
def test_a_row_whose_scale_is_below_f16(beside: float, refused: bool) -> None:
    """It vanishes only beside what is 2^11 times as large, whose own rounding is more."""
    found = weight(values=np.repeat(np.float32([[2e-8], [beside]]), 64, axis=1))
    made = ternarized(found, Ternarization(scale="row"), "f16")
    if refused:
        with pytest.raises(UnsupportedModelError, match="has weights so small"):
            representable(found, made)
    else:
        assert representable(found, made) is made and made.scales is not None and made.scales[0] == 0


@pytest.mark.parametrize(
    "value",
    [
        "2026-13-45",
        "!!int abc",
        "!!float abc",
        "0b_",
        "!!bool abc",
        "!!timestamp abc",
        "9" * 5001,
        "!!python/none x",
        "&a [*a]",
        "5e",
        "e5",
    ],
)
def test_alphas_that_are_none_in_yaml(tmp_path: Path, value: str) -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")
    for name, text in (("alphas.yaml", f"q: {value}\n"), ("alphas.json", f'{{"q": {value}}}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=rf"{name}: ") as error:
            read_alphas(tmp_path / name)
        assert "\n" not in str(error.value)


def test_exponents_that_yaml_takes_for_texts(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")
    (tmp_path / "alphas.yaml").write_text("q: 5e-2\nk: 1.5E-1\nv: [1e-1, 2.0e-1]\n")
    assert read_alphas(tmp_path / "alphas.yaml") == (("q", 0.05), ("k", 0.15), ("v", (0.1, 0.2)))
