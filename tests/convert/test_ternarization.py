"""Alphas by pattern, other schemes, binary sources, and the report."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
from click.testing import CliRunner
from packed_models import safetensors

from bitnet.cli import cli
from bitnet.convert import Ternarization, convert
from bitnet.convert.quantize import ALPHAS, read_alphas
from bitnet.convert.report import Layer, draw, means, record, table, verdict
from bitnet.convert.source import read
from bitnet.errors import UsageError
from bitnet.models import open_checkpoint
from bitnet.packing import INTEGERS
from bitnet.ternary import quantize_binary, quantize_fp4, quantize_int4, quantize_int8, ternarize


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return packed_models.write(tmp_path / "source", "qwen3", trits=False)


def test_which_alpha_a_layer_has(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"layers.0.q": [0.1, 0.2], "model.layers.1.*": 0.3, "mlp.*": "auto", "embedding": "keep", "k_proj": 0.4})
    )
    how = Ternarization(alpha=0.7, alphas=read_alphas(tmp_path / "a.json"))
    found = {n: how.alpha_of(n) for n in ("layers.0.q", "layers.0.k", "layers.1.k", "layers.2.up", "layers.0.o", "embedding", "head")}
    expected = {
        "layers.0.q": (0.1, 0.2),
        "layers.0.k": 0.4,
        "layers.1.k": 0.3,
        "layers.2.up": "auto",
        "layers.0.o": 0.7,
        "embedding": "keep",
    }
    assert found == expected | {"head": 0.7}
    assert how.calibrated and not Ternarization(alphas=(("q", "keep"),)).calibrated
    assert Ternarization().alpha_of("layers.5.v") == 0.08 == ALPHAS["v"]


def test_yaml_where_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    path = tmp_path / "a.yaml"
    path.write_text("q_proj: 0.1\nlayers.*.down: auto\n")
    assert read_alphas(path) == (("q_proj", 0.1), ("layers.*.down", "auto"))
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="is no JSON, and to read YAML pyyaml must be installed"):
        read_alphas(path)


@pytest.mark.parametrize(("content", "message"), [
    ("{}", "expected an object of patterns and alphas"),
    ("[0.1]", "expected an object of patterns and alphas"),
    ('{"q": -1}', "alpha of 'q' is -1; expected a finite number >= 0"),
    ('{"q": "best"}', "alpha of 'q' is 'best'; expected a finite number"),
    ('{"q": [0.1, "auto"]}', "alpha of 'q' has 'auto' in its list; expected a finite number >= 0 there"),
    ('{"q": 1' + "0" * 400 + "}", "alpha of 'q' is 1000.*; expected a finite number"),
    ('{"q": ' + "[" * 99_999, "is neither JSON nor YAML"),
    ('{"q": true}', "alpha of 'q' is True"),
    ('{"layers.0.querry": 0.1}', "pattern 'layers.0.querry' fits no layer's name"),
    ("{: [", "is neither JSON nor YAML"),
    ('{"q": 0.1, "k": 0.2, "q": 0.3}', "has 'q' twice, and only one can hold"),
    ("q: 0.1\nq: 0.3\n", "has 'q' twice, and only one can hold"),
    ("alphas:\n  q: 0.1\n  q: 0.3\n", "has 'q' twice, and only one can hold"),
    ('{"means": [], "alphas": {}}', "is a report without alphas, for its method or scheme has none"),
])  # fmt: skip
def test_alpha_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=message) as raised:
        read_alphas(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


def test_alphas_by_head(tmp_path: Path, source: Path) -> None:
    how = Ternarization(alpha=0.05, alphas=(("layers.0.q", (0.0, 0.5, 1.0, 1.5)), ("layers.0.o", "keep"), ("embedding", "keep")))
    convert(source, tmp_path / "t", quantization="ternary", ternarization=how)
    before, after = (read(open_checkpoint(path)).weights for path in (source, tmp_path / "t"))
    w, codes = before["layers.0.q"].values(0, 256), after["layers.0.q"].codes(0, 256)
    limit = np.repeat([0.0, 0.5, 1.0, 1.5], 64)[:, None] * np.abs(w).mean(dtype=np.float64)
    assert np.array_equal(codes, np.where(np.abs(w) > limit, np.sign(w), 0))
    for name in ("layers.0.o", "embedding"):
        assert np.array_equal(before[name].values(0, 256), after[name].values(0, 256)), "kept"
    with pytest.raises(UsageError, match=r"alpha of layers.0.q: is a list of 3; expected 4, one for each head"):
        convert(source, tmp_path / "u", quantization="ternary", ternarization=Ternarization(alphas=(("q", (0.1, 0.1, 0.1)),)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp4"])
@pytest.mark.parametrize("single", [False, True])
def test_integers_in_a_file_of_our_own(tmp_path: Path, source: Path, scheme: str, single: bool) -> None:
    target = tmp_path / ("t.safetensors" if single else "t")
    report = convert(source, target, quantization=scheme)
    assert report.verified and report.format.endswith(scheme)
    weight, found = read(open_checkpoint(source)).weights["layers.0.down"], read(open_checkpoint(target)).weights["layers.0.down"]
    w = weight.values(0, 256)
    if scheme == "int8":
        codes, scales = quantize_int8(w, 32)
        assert np.abs(found.codes(0, 256).astype(int) - codes).max() <= 1 and np.allclose(
            found.scales, scales, rtol=2**-11
        )  # scales in f16
    else:
        codes, scales = (quantize_int4 if scheme == "int4" else quantize_fp4)(w, 32)
        assert np.array_equal(found.codes(0, 256), codes) and np.array_equal(found.scales, scales)
    assert np.linalg.norm(found.values(0, 256) - w) < (0.01 if scheme == "int8" else 0.12) * np.linalg.norm(w)
    # the engine runs those very integers: a dense model of the same values, with its weights in int8, differs by that rounding alone
    assert np.linalg.norm(packed_models.logits(target) - packed_models.logits(source)) < (
        0.1 if scheme == "int8" else 0.6
    ) * np.linalg.norm(packed_models.logits(source))
    exact = packed_models.logits(target, weights="f16")
    assert np.linalg.norm(packed_models.logits(target) - exact) < 0.05 * np.linalg.norm(exact), "int8 activations, nothing else"
    convert(target, tmp_path / "again", format=f"hf-{scheme}", quantization=scheme)
    assert (tmp_path / "again" / "model.safetensors").read_bytes()[-4096:] == (
        target if single else target / "model.safetensors"
    ).read_bytes()[-4096:]


@pytest.mark.parametrize("scheme", list(INTEGERS))
def test_integers_packed_and_unpacked(scheme: str) -> None:
    codec = INTEGERS[scheme]
    values = codec.values or tuple(range(-128, 128))
    codes = np.random.default_rng(0).choice(np.array(values, np.int8), (7, 64))
    packed = codec.pack(codes)
    assert packed.shape == (7, 64 // codec.per_byte) and np.array_equal(codec.unpack(packed), codes)
    if scheme == "fp4":
        assert codec.pack(np.array([[1, -12]], np.int8)).tolist() == [[0xF1]], "E2M1: 0.5 in the low half, -6 in the high one"


@pytest.mark.parametrize(("target", "group"), [("t", 0), ("t.gguf", 128)])
def test_binary(tmp_path: Path, source: Path, target: str, group: int) -> None:
    convert(source, tmp_path / target, quantization="binary")
    w = read(open_checkpoint(source)).weights["layers.0.up"].values(0, 512)
    found = read(open_checkpoint(tmp_path / target)).weights["layers.0.up"]
    codes, scales = quantize_binary(w, group)
    assert np.array_equal(found.codes(0, 512), codes)
    assert np.allclose(found.scales, scales if group else np.abs(w).mean(), rtol=1e-3)


def test_binary_sources(tmp_path: Path, source: Path) -> None:
    """Of +-s no alpha below 1 makes a zero, and the report says so; where latent weights stand beside, those are taken."""
    stored = safetensors.read(source / "model.safetensors").tensors
    plain = {name: ("BF16", t.raw()) for name, t in stored.items()}
    linear = [name for name in plain if "_proj" in name]
    signs = {name: np.where(stored[name].dense() < 0, -0.03, 0.03).astype(np.float32) for name in linear}
    for latent in (False, True):
        folder = tmp_path / f"binary-{latent}"
        folder.mkdir()
        beside = {name.replace(".weight", ".latent_weight"): plain[name] for name in linear} if latent else {}
        safetensors.write(folder / "model.safetensors", plain | signs | beside)
        (folder / "config.json").write_text((source / "config.json").read_text())
        report = convert(folder, tmp_path / f"t-{latent}", quantization="ternary", ternarization=Ternarization(alpha=0.9))
        zeros = [layer.zeros for layer in report.layers if layer.kind != "embedding"]
        said = [note for note in report.notes if "no zeros for any alpha below 1" in note]
        assert (min(zeros) > 0.2 and not said) if latent else (max(zeros) == 0 and len(said) == 1)
        assert any("took the latent weights of 7 layers" in note for note in report.notes) == latent


@pytest.mark.parametrize(("every", "scale", "form", "lost"), [
    ("row", "tensor", "hf", "row"),
    ("row", "row", "gguf-q2_0", ""),
    ("row", 64, "gguf-q2_0", ""),
    ("row", 256, "gguf-tq2_0", ""),
    (128, "tensor", "hf", "group:128"),
    (128, "row", "gguf-q2_0", "group:128"),
    (128, 128, "gguf-q2_0", ""),
    (64, 128, "gguf-q2_0", "group:64"),
    (64, 64, "gguf-q2_0", ""),
    (64, 32, "gguf-q2_0", ""),
])  # fmt: skip
def test_binary_sources_with_a_scale_for_less(
    tmp_path: Path, source: Path, every: str | int, scale: str | int, form: str, lost: str
) -> None:
    """No zeros where what shares a scale shared one before; where it is more, small weights vanish, and the note says what keeps them."""
    rng, tensors = np.random.default_rng(0), dict[str, Any]()
    for name, tensor in safetensors.read(source / "model.safetensors").tensors.items():
        tensors[name] = ("BF16", tensor.raw())
        if "_proj" in name:
            rows, inputs = tensor.shape
            sizes = rng.choice(np.float32([0.25, 8]), (rows, 1 if every == "row" else inputs // int(every)))
            tensors[name] = np.repeat(sizes, inputs // sizes.shape[1], axis=1) * rng.choice(np.float32([-1, 1]), tensor.shape)
    safetensors.write(source / "model.safetensors", tensors)
    how = Ternarization(alpha=0.9, scale=scale, alphas=(("embedding", "keep"),))
    report = convert(
        source, tmp_path / "t", format=None if form == "hf" else form, quantization="ternary", ternarization=how, allow_requantize=True
    )
    most = max(layer.zeros for layer in report.layers)
    said = [note for note in report.notes if "weights of -s and +s" in note]
    assert len(said) == 1 and ("yield no zeros" in said[0]) == (not lost) == (most == 0) and f"--scale {lost}" * bool(lost) in said[0]


def test_a_packed_binary_source_says_so(tmp_path: Path) -> None:
    """Trits without zeros are binary weights, whatever layer class holds them; our own binary folder, too."""
    packed = packed_models.write(tmp_path / "packed", "qwen3", zeros=False)
    convert(packed_models.write(tmp_path / "plain", "qwen3", trits=False), tmp_path / "own", quantization="binary")
    for start, expected in ((packed, True), (tmp_path / "own", True), (packed_models.write(tmp_path / "ternary", "qwen3"), False)):
        report = convert(start, tmp_path / f"{start.name}.gguf", quantization="ternary")
        assert any("yield no zeros for any alpha below 1" in note for note in report.notes) == expected


def test_latent_weights_beside_packed_rows_that_are_padded(tmp_path: Path) -> None:
    """Packed rows come in fours; latent weights of the model's own number of rows are theirs, and of another shape they are not."""
    source = packed_models.write(tmp_path / "source", "qwen3", zeros=False, intermediate_size=510)
    tensors: dict[str, Any] = {}
    for name, tensor in safetensors.read(source / "model.safetensors").tensors.items():
        tensors[name] = ("BF16", tensor.raw()) if tensor.dtype == "BF16" else tensor.raw()
    rng = np.random.default_rng(0)
    latent = {"gate_proj": (510, 256), "up_proj": (510, 256), "down_proj": (256, 512)}
    tensors |= {f"model.layers.0.mlp.{n}.latent_weight": rng.standard_normal(shape).astype(np.float32) for n, shape in latent.items()}
    safetensors.write(source / "model.safetensors", tensors)
    report = convert(source, tmp_path / "t.safetensors", quantization="ternary")
    assert any("took the latent weights of 2 layers" in note for note in report.notes)
    said = next(note for note in report.notes if "latent weights of 1 layers are not taken, for they are of another shape" in note)
    assert said.endswith("down_proj.latent_weight' has shape [256, 512], its layer [256, 510])")
    trits = read(open_checkpoint(tmp_path / "t.safetensors")).weights
    assert np.array_equal(trits["layers.0.up"].codes(0, 510), ternarize(tensors["model.layers.0.mlp.up_proj.latent_weight"], ALPHAS["up"]))
    assert not (trits["layers.0.down"].codes(0, 256) == 0).any()


def layer(name: str, error: float, zeros: float = 0.3, output: float | None = None) -> Layer:
    return Layer(name, (4, 8), "absmean", None, zeros, 2.0, error, output, ())


def test_the_report_in_numbers(tmp_path: Path, source: Path) -> None:
    report = convert(source, tmp_path / "t", quantization="ternary", ternarization=Ternarization("absmean"))
    before, after = (read(open_checkpoint(path)).weights for path in (source, tmp_path / "t"))
    for found in report.layers:
        rows = found.shape[0]
        was, now = before[found.name].values(0, rows), after[found.name].values(0, rows)
        assert found.zeros == pytest.approx((now == 0).mean()) and found.weight_error == pytest.approx(
            np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-5
        )
    packed = [found for found in report.layers if found.kind != "embedding"]
    size = sum(t.nbytes for name, t in safetensors.read(tmp_path / "t" / "model.safetensors").tensors.items() if "_proj" in name)
    assert 8 * size == sum(round(found.bits_per_weight * found.weights) for found in packed), "the bits are those of the file"
    assert [row["kind"] for row in means(report.layers)] == ["embedding", "q", "k", "v", "o", "gate", "up", "down", "all"]
    assert len(table(report.layers)) == 10 and "output error" not in table(report.layers)[0]
    assert "output error" in table([layer("layers.0.q", 0.5, output=0.4)])[0]


def test_verdicts() -> None:
    layers = [layer("layers.0.q", 0.5)]
    assert "destroys this model. Train it further as a ternary model (bitnet train)" in verdict(layers, "ternary", 13.0, 4000.0)
    assert "--quantization int4" in verdict(layers, "ternary", 13.0, 4000.0)
    assert "destroys" in verdict(layers, "ternary", 13.0, float("nan"))
    assert verdict(layers, "int4", 13.0, 14.0).endswith("int4 costs this model something")
    assert verdict(layers, "int8", 13.0, 13.1).endswith("int8 keeps this model")
    assert "(307.69 x) over 5,000 tokens: ternary destroys" in verdict(layers, "ternary", 13.0, 4000.0, 5000, 262)
    assert verdict(layers, "ternary", 13.0, 4000.0, 20).endswith(
        "over 20 tokens: too few to say what ternary costs; --evaluate a longer text"
    )
    noise = verdict(layers, "int8", 8e307, 8e307, 5000, 262)
    assert noise.startswith("perplexity 8.0e+307 -> 8.0e+307 (1.00 x)") and "no better than chance here" in noise and "keeps" not in noise
    assert "by 50% of their norm" in verdict(layers, "ternary") and "--evaluate FILE" in verdict(layers, "ternary")
    assert verdict([layer("layers.0.q", 0.005)], "int8").startswith("int8 moved these weights by 0.5% of their norm")


def test_the_command_reports(tmp_path: Path, source: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the abacus and the things that they bought in the town " * 40)
    words = [
        "convert",
        str(source),
        "-o",
        str(tmp_path / "t"),
        "--ternary",
        "--alpha",
        "auto",
        "--calibration",
        str(text),
        "--keep",
        "embedding",
    ]
    result = CliRunner().invoke(cli, [*words, "--evaluate", str(text), "--evaluate-bytes", "500", "--json"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    saved = json.loads((tmp_path / "t.report.json").read_text())
    assert saved["verdict"] == last["verdict"] and saved["means"] == last["means"] and len(last["layers"]) == 7
    assert (
        last["evaluation"]["before"]["perplexity"] > 0 and last["evaluation"]["after"]["tokens"] == last["evaluation"]["before"]["tokens"]
    )
    assert (
        set(last["alphas"]) == {f"layers.0.{kind}" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
        and len(last["alphas"]["layers.0.q"]) == 4
    )
    # the report is itself a file of alphas
    again = CliRunner().invoke(
        cli,
        [
            "convert",
            str(source),
            "-o",
            str(tmp_path / "u"),
            "--ternary",
            "--alpha-config",
            str(tmp_path / "t.report.json"),
            "--keep",
            "embedding",
        ],
    )
    assert again.exit_code == 0, again.output
    one, other = (read(open_checkpoint(tmp_path / name)).weights for name in "tu")
    assert all(np.array_equal(one[n].codes(0, 256), other[n].codes(0, 256)) for n in one if one[n].codes is not None)


@pytest.mark.parametrize("alone", [False, True])
def test_a_report_of_auto_says_how_the_embedding_was_chosen(tmp_path: Path, source: Path, alone: bool) -> None:
    """Used again it gives the same model, without calibration text."""
    text = np.array([packed_models.IDS], np.int32)
    first = convert(source, tmp_path / "t", quantization="ternary", ternarization=Ternarization(alpha="auto"), calibration=text)
    (tmp_path / "r.json").write_text(json.dumps(record(first.layers)))
    how = Ternarization(alphas=read_alphas(tmp_path / "r.json"))
    assert how.alpha_of("embedding") == "auto" and not how.calibrated
    start = source
    if alone:
        (tmp_path / "alone").mkdir()
        start = (source / "model.safetensors").rename(tmp_path / "alone" / "m.safetensors")
    report = convert(start, tmp_path / "u.safetensors", quantization="ternary", ternarization=how)
    assert {layer.name: layer.rule for layer in report.layers}["embedding"] == "least error"
    if alone:
        for name in ("config.json", "tokenizer.json"):
            (source / name).rename(tmp_path / name)
    one, other = (read(open_checkpoint(tmp_path / name)).weights for name in ("t", "u.safetensors"))
    rows = packed_models.VOCABULARY
    assert np.array_equal(one["embedding"].values(0, rows), other["embedding"].values(0, rows))
    assert all(np.array_equal(w.codes(0, 64), other[name].codes(0, 64)) for name, w in one.items() if w.codes is not None)


@pytest.mark.parametrize(("words", "message"), [
    (["--alpha", "much"], "--alpha is 'much'; expected a number, such as 0.05, or auto"),
    (["--alpha", "-1"], "alpha is -1.0; expected a finite number >= 0"),
    (["--method", "absmean", "--alpha", "0.1"], "absmean has no alpha"),
    (["--method", "gptq", "--alpha", "0.1"], "gptq has no alpha"),
    (["--scale", "group:33"], "scale is 33; expected tensor, row, or group:N"),
    (["--keep", "querry"], "pattern 'querry' fits no layer's name"),
    (["--alpha", "auto", "--calibration", "missing.txt"], "missing.txt: cannot be read as text"),
    (["--sequences", "0", "--alpha", "auto"], "--sequences is 0"),
    (["--report", "./"], "is a folder; the report is a file of JSON, name one"),
    (["--evaluate-bytes", "9"], "--evaluate-bytes is of --evaluate, and no text was named"),
    (["--evaluate", "t", "--evaluate-bytes", "0"], "--evaluate-bytes is 0; expected at least 1"),
])  # fmt: skip
def test_errors_in_one_line(tmp_path: Path, source: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["convert", str(source), "-o", str(tmp_path / "t"), "--ternary", *words])
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") <= 4, result.output
    assert not (tmp_path / "t").exists()


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer("embedding", 0.4), layer("layers.0.q", 0.5, output=0.3), layer("layers.1.q", 0.6, output=0.2)]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
    assert draw(layers, tmp_path / "p.png", "title") is None
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert "needs matplotlib" in str(draw(layers, tmp_path / "q.png", "title")) and not (tmp_path / "q.png").exists()
