"""What is refused, and that it is refused before anything is computed; what a source's own scheme means for the format."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
from packed_models import safetensors, write

from bitnet.convert import InexactError, Ternarization, convert, target
from bitnet.convert.source import read
from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.models import LINEARS, open_checkpoint
from bitnet.transformer import TernaryTransformer

TEXT = np.array([packed_models.IDS], np.int32)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {name: w.values(0, w.shape[0]) for name, w in read(open_checkpoint(path)).weights.items()}


def changed(source: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The model with one dense tensor changed."""
    stored = safetensors.read(source / "model.safetensors").tensors
    tensors = {key: ("BF16", t.raw()) for key, t in stored.items()} | {name: change(stored[name].dense())}
    safetensors.write(source / "model.safetensors", tensors)
    return source


def schemes(path: Path) -> set[str]:
    return {w.scheme for w in read(open_checkpoint(path)).weights.values() if w.kind in LINEARS}


KEPT = Ternarization(alphas=(("layers.*", "keep"),))
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("out", {"format": "onnx"}, "format is 'onnx'"),
    ("source", {}, "is the source itself"),
    ("text.txt", {"format": "gguf-tq2_0"}, "is no model"),
    ("out.gguf", {"format": "gguf-tq2_0", "changes": {"intermediate_size": 320}}, "320 inputs a row; gguf-tq2_0 needs a multiple of 256"),
    ("out", {"changes": {"intermediate_size": 510}}, "has 510 rows, and transformers loads"),
    ("out", {"ternarization": Ternarization("gptq", scale="row")}, "has a scale for every row, and they differ; hf has one for the whole"),
    ("out.gguf", {"ternarization": Ternarization("gptq", scale=64), "format": "gguf-tq2_0"}, "has a scale for every 64 inputs"),
    ("out.gguf", {"ternarization": Ternarization("gptq", scale=96)}, "has 256 inputs, which are no whole groups of 96"),
    ("out.gguf", {"format": "gguf-q1_0"}, "gguf-q1_0 is binary and holds no zeros; choose another format, such as gguf-tq2_0"),
    ("out", {"quantization": "int8", "format": "hf"}, "is int8, and hf holds ternary weights, not int8; choose --format hf-int8"),
    ("out", {"ternarization": Ternarization(alphas=(("k", (0.1,) * 4),))}, "alpha of layers.0.k: is a list of 4; expected 2"),
    ("out", {"ternarization": Ternarization(alphas=(("o", (0.1, 0.2)),))}, "alpha of layers.0.o: .* expected one number"),
    ("out", {"ternarization": KEPT}, "every linear layer is kept as it is, so hf would hold nothing ternary; keep fewer"),
    ("out.gguf", {"quantization": "int4", "ternarization": KEPT}, "so gguf-q4_0 would hold nothing int4"),
    ("out", {"quantization": "fp16", "calibration": None, "ternarization": KEPT}, "fp16 brings every weight into f16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), CASES, ids=[case[2][:30] for case in CASES])
def test_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "source", "qwen3", trits=False, **options.get("changes", {}))
    (tmp_path / "text.txt").write_text("a text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("bitnet.convert.choose_weights", lambda *_: pytest.fail("weights were chosen"))
    given = {"quantization": "ternary", "calibration": TEXT} | {key: value for key, value in options.items() if key != "changes"}
    with pytest.raises((UsageError, InexactError), match=message):
        convert(source, tmp_path / name, ready=lambda: pytest.fail("it was ready"), **given)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_the_disk_is_looked_at_first_and_for_the_report_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source, free = write(tmp_path / "source", "qwen3", trits=False), 1 << 40
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, free))
    called: list[bool] = []
    convert(source, tmp_path / name, quantization="ternary", ready=lambda: called.append((tmp_path / name).exists()))
    assert called == [False]
    path = tmp_path / name if name == "out.gguf" else tmp_path / name / "model.safetensors"
    free = path.stat().st_size + 100_000  # room for the model, and not for its report
    with pytest.raises(BitNetError, match=rf"{name}: needs [\d,]+ bytes of disk, {free:,} are free"):
        convert(source, tmp_path / name, quantization="ternary", ready=lambda: pytest.fail("it was ready"))


def test_the_disk_has_room_for_the_texts_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, free = write(tmp_path / "source", "qwen3"), 1 << 40
    (source / "vocab.json").write_text("x" * 100_000)
    (source / "chat_template.jinja").write_text("y" * 100_000)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, free))
    convert(source, tmp_path / "out")
    free = sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) - 90_000
    with pytest.raises(BitNetError, match=r"out: needs [\d,]+ bytes of disk"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp4"])
@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.gguf"])
def test_integers_keep_their_scheme_unless_asked(tmp_path: Path, scheme: str, name: str) -> None:
    convert(write(tmp_path / "source", "qwen3", trits=False), tmp_path / "packed", quantization=scheme)
    if scheme == "fp4" and name == "out.gguf":
        with pytest.raises(UsageError, match="GGUF has no fp4"):
            convert(tmp_path / "packed", tmp_path / name)
        return
    report = convert(tmp_path / "packed", tmp_path / name)
    kind = {"int8": "q8_0", "int4": "q4_0"}.get(scheme, "")
    assert report.format == {"out": f"hf-{scheme}", "out.safetensors": f"safetensors-{scheme}", "out.gguf": f"gguf-{kind}"}[name]
    one, other = weights(tmp_path / "packed"), weights(tmp_path / name)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("start", "scheme"), [("int8", "ternary"), ("int4", "int8"), ("fp4", "binary"), ("int8", "fp16"), ("int4", "fp4")])
def test_integers_become_another_scheme(tmp_path: Path, start: str, scheme: str) -> None:
    """As the plain numbers that they stand for would."""
    convert(write(tmp_path / "source", "qwen3", trits=False), tmp_path / "packed", quantization=start)
    report = convert(tmp_path / "packed", tmp_path / "one.safetensors", quantization=scheme)
    assert report.verified and start not in schemes(tmp_path / "one.safetensors")
    convert(tmp_path / "packed", tmp_path / "plain", format="hf-dense-f32")
    convert(tmp_path / "plain", tmp_path / "two.safetensors", quantization=scheme)
    one, two = weights(tmp_path / "one.safetensors"), weights(tmp_path / "two.safetensors")
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_what_a_ternary_format_says_of_integers(tmp_path: Path) -> None:
    convert(write(tmp_path / "source", "qwen3", trits=False), tmp_path / "packed", quantization="int8")
    with pytest.raises(UsageError, match=r"is int8, and gguf-tq2_0 holds ternary weights.*to make it ternary add --quantization ternary"):
        convert(tmp_path / "packed", tmp_path / "z.gguf", format="gguf-tq2_0")
    with pytest.raises(UsageError, match="gguf-q4_0 holds int4; add --quantization int4"):
        convert(tmp_path / "packed", tmp_path / "z.gguf", format="gguf-q4_0")
    report = convert(tmp_path / "packed", tmp_path / "dense", format="hf-dense-f32")
    assert "dense layers run with float32 activations, the int8 ones of the source with int8 activations in groups" in report.notes


@pytest.mark.parametrize("name", ["again", "again.gguf"])
@pytest.mark.parametrize(("group", "value"), [(64, 0.5), (256, 0.5), (32, 0.1)])
def test_integers_with_other_scales(tmp_path: Path, group: int, value: float, name: str) -> None:
    """As another program's folders may have them: coarser scales are repeated, and those that f16 does not hold are refused."""
    source, rng = write(tmp_path / "source", "qwen3", trits=False), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for key, tensor in safetensors.read(source / "model.safetensors").tensors.items():
        if "_proj" in key:
            tensors[key] = rng.integers(-127, 128, tensor.shape, np.int8)
            tensors[f"{key}_int8_scale"] = np.full((tensor.shape[0], tensor.shape[1] // group), value, np.float32)
        else:
            tensors[key] = ("BF16", tensor.raw())
    safetensors.write(source / "model.safetensors", tensors)
    if value == 0.1:
        with pytest.raises(InexactError, match=r"has scales that (hf-int8|gguf-q8_0) cannot hold \(f16, one for 32 inputs\)"):
            convert(source, tmp_path / name)
        return
    assert convert(source, tmp_path / name).format == ("gguf-q8_0" if name == "again.gguf" else "hf-int8")
    one, other = weights(source), weights(tmp_path / name)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.gguf"])
def test_binary_refuses_zeros_and_keeps_what_is_binary(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is ternary already, and binary has no place for its zeros; leave --quantization out"):
        convert(write(tmp_path / "ternary", "qwen3"), tmp_path / name, quantization="binary")
    assert not (tmp_path / name).exists()
    source = write(tmp_path / "binary", "qwen3", zeros=False)
    convert(source, tmp_path / name, quantization="binary")
    assert np.array_equal(weights(source)["layers.0.up"], weights(tmp_path / name)["layers.0.up"])


def test_biases_choose_the_class_that_transformers_runs_right(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen2", trits=False)
    report = convert(source, tmp_path / "out", quantization="ternary")
    assert report.format == "hf-bitlinear" and report.verified and not report.losses and not any("biases" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["linear_class"] == "bitlinear"
    asked = convert(source, tmp_path / "hf", format="hf", quantization="ternary")
    assert asked.format == "hf" and any("multiplies the biases" in note for note in asked.notes)
    one, other = weights(tmp_path / "out"), weights(tmp_path / "hf")
    assert all(np.allclose(one[key], other[key], rtol=2e-7, atol=0) for key in one), "a reciprocal rounds once more"
    assert convert(source, tmp_path / "out.safetensors", quantization="ternary").format == "safetensors"
    assert convert(write(tmp_path / "other", "qwen3"), tmp_path / "plain").format == "hf"


@pytest.mark.parametrize(("unit", "feed_forward", "form"), [
    (64, 512, "gguf-q2_0"), (128, 512, "gguf-q2_0"), (256, 512, "gguf-tq2_0"), ("tensor", 512, "gguf-tq2_0"), ("row", 512, "gguf-tq2_0"),
    ("tensor", 448, "gguf-q2_0"), ("row", 384, "gguf-q2_0"),
])  # fmt: skip
def test_gguf_alone_takes_what_holds_the_scale(tmp_path: Path, unit: str | int, feed_forward: int, form: str) -> None:
    source = write(tmp_path / "source", "qwen3", trits=False, intermediate_size=feed_forward)
    report = convert(source, tmp_path / "m.gguf", quantization="ternary", ternarization=Ternarization(scale=unit))
    assert report.format == form and report.verified and not report.losses


@pytest.mark.parametrize(("group", "form"), [(64, "gguf-q2_0"), (128, "gguf-q2_0"), (256, "gguf-tq2_0")])
def test_gguf_alone_looks_for_shared_scales_in_plain_numbers(tmp_path: Path, group: int, form: str) -> None:
    source, rng = write(tmp_path / "source", "qwen3", trits=False), np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for key, tensor in safetensors.read(source / "model.safetensors").tensors.items():
        tensors[key] = ("BF16", tensor.raw())
        if "_proj" in key:
            scales = rng.choice([0.25, 0.5], (tensor.shape[0], tensor.shape[1] // group)).astype(np.float32)
            tensors[key] = rng.choice([-1, 0, 1], tensor.shape).astype(np.float32) * np.repeat(scales, group, axis=1)
    safetensors.write(source / "model.safetensors", tensors)
    report = convert(source, tmp_path / "m.gguf")
    assert report.format == form and report.verified and not report.losses
    one, other = weights(source), weights(tmp_path / "m.gguf")
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("options", [
    {"format": "gguf-bf16"},
    {"quantization": "int8", "format": "gguf-f32"},
    {"quantization": "ternary", "ternarization": Ternarization(alphas=(("q", "keep"),))},
    {"quantization": "ternary", "ternarization": Ternarization(scale="row"), "format": "gguf-f32"},
])  # fmt: skip
def test_dense_layers_of_bitnet_in_gguf(tmp_path: Path, options: dict[str, Any]) -> None:
    """They would be read as masters, and become ternary at load."""
    source = write(tmp_path / "source", "bitnet", trits=False)
    with pytest.raises(BitNetError, match=r"q_proj.weight': is dense, and what is dense in a bitnet model's GGUF is read as what becomes"):
        convert(source, tmp_path / "out.gguf", ready=lambda: pytest.fail("it was ready"), **options)
    assert convert(source, tmp_path / "out.gguf", quantization="ternary", format="gguf-f16").verified


def test_patterns_that_fit_no_layer_are_noted(tmp_path: Path) -> None:
    how = Ternarization(alphas=(("layers.7.q", 0.9), ("head", "keep"), ("q_proj", 0.1)))
    report = convert(write(tmp_path / "source", "qwen3", trits=False), tmp_path / "out", quantization="ternary", ternarization=how)
    assert [note for note in report.notes if "pattern" in note] == [
        "pattern 'layers.7.q' fits no layer of this model", "pattern 'head' fits no layer of this model",
    ]  # fmt: skip


def test_calibration_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3")
    for quantization in (None, "fp16"):
        with pytest.raises(UsageError, match="calibration text is for schemes that choose what weights become"):
            convert(source, tmp_path / "out", quantization=quantization, calibration=TEXT)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    """Its own name stands in the message, whatever is to be written."""
    source = write(tmp_path / "source", "qwen3")
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for given, message in (("text.txt", "text.txt cannot be used: expected value"), ("bytes", "bytes is not UTF-8")):
        for name in ("out", "out.gguf"):
            with pytest.raises(BitNetError, match=message):
                convert(source, tmp_path / name, tokenizer_json=tmp_path / given)
    (tmp_path / "alone.safetensors").write_bytes((write(tmp_path / "dense", trits=False) / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"alone.safetensors: has no config.json, so no tokenizer is written; put config.json there"):
        convert(tmp_path / "alone.safetensors", tmp_path / "B.bin", quantization="ternary", tokenizer_json=tmp_path / "none.json")


@pytest.mark.parametrize("form", ["hf-dense-f32", "gguf-f32"])
def test_nan_is_called_by_its_name(tmp_path: Path, form: str) -> None:
    """A norm, and a matrix that is kept; the source's tensor is named, not what was being written."""
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        source = write(tmp_path / name, "qwen3", trits=False)
        stored = safetensors.read(source / "model.safetensors").tensors
        values = stored[name].dense().copy()
        values.flat[3] = np.nan
        safetensors.write(source / "model.safetensors", {key: ("BF16", t.raw()) for key, t in stored.items()} | {name: values})
        with pytest.raises(FormatError, match=rf"{name}/model.safetensors: tensor '{name}': holds NaN or infinity; the file"):
            convert(source, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["hf-dense-f32", "gguf-f32", "hf"])
def test_infinity_is_no_weight(tmp_path: Path, form: str) -> None:
    source = changed(write(tmp_path / "source", "qwen3", trits=False), "model.norm.weight", lambda values: values + np.float32(np.inf))
    with pytest.raises(FormatError, match=r"'model.norm.weight': holds NaN or infinity"):
        convert(source, tmp_path / "out", format=form, quantization="ternary" if form == "hf" else None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_whole_numbers_without_a_scale_are_refused(tmp_path: Path, dtype: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = changed(write(tmp_path / "source", "qwen3", trits=False), name, lambda values: (100 * values).astype(dtype))
    with pytest.raises(BitNetError, match=f"tensor '{name}'.*expected") as error:
        convert(source, tmp_path / "out", quantization="ternary")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_head_of_its_own_where_the_embedding_is_said_to_be_it(tmp_path: Path) -> None:
    """transformers would run the one that is there, others the embedding: neither is taken unasked. A copy is no contradiction."""
    source = write(tmp_path / "source", "qwen3", trits=False)
    stored = safetensors.read(source / "model.safetensors").tensors
    tensors = {key: ("BF16", t.raw()) for key, t in stored.items()}
    table = stored["model.embed_tokens.weight"].raw()
    safetensors.write(source / "model.safetensors", tensors | {"lm_head.weight": ("BF16", table)})
    convert(source, tmp_path / "out", quantization="ternary")
    other = table.copy()
    other.reshape(-1)[-1] ^= 1
    for head in (("BF16", other), stored["model.embed_tokens.weight"].dense()):
        safetensors.write(source / "model.safetensors", tensors | {"lm_head.weight": head})
        for use in (lambda: convert(source, tmp_path / "new", quantization="ternary"), lambda: TernaryTransformer.from_pretrained(source)):
            with pytest.raises(
                FormatError, match=r"source: config.json says that the head is the embedding .* lm_head.weight is another matrix"
            ):
                use()


def test_a_tokenizer_that_this_program_cannot_use_is_copied_and_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3")
    (source / "tokenizer.json").write_text('{"a": 1}')
    for name in ("out", "out.safetensors"):
        report = convert(source, tmp_path / name)
        assert any("the tokenizer is copied as it is, though this program cannot use it" in note for note in report.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    with pytest.raises(FormatError, match=r"tokenizer.json cannot be used"):
        convert(source, tmp_path / "out.gguf")


def test_what_may_not_be_written_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, allowed = write(tmp_path / "source", "qwen3", trits=False), os.access
    (tmp_path / "old.gguf").write_bytes(b"")
    for locked, name, message in ((tmp_path, "out", "is read-only"), (tmp_path / "old.gguf", "old.gguf", "old.gguf: is read-only")):
        monkeypatch.setattr(target.os, "access", lambda path, how, locked=locked: Path(path) != locked and allowed(path, how))
        with pytest.raises(UsageError, match=message):
            convert(source, tmp_path / name, quantization="ternary", ready=lambda: pytest.fail("it was ready"))


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are text here")
def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.gguf")
    convert(write(tmp_path / "source", "qwen3"), name)
    assert np.array_equal(packed_models.logits(Path(name)), packed_models.logits(tmp_path / "source"))
