"""A .safetensors that has no config.json: made ternary by the names of its matrices, and run once the configuration lies beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import packed_models
import pytest
from click.testing import CliRunner
from packed_models import logits

from bitnet.cli import cli
from bitnet.convert import NotTheSameError, Report, Ternarization, convert
from bitnet.convert.quantize import ALPHAS
from bitnet.convert.report import Layer
from bitnet.convert.source import read
from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.files import safetensors
from bitnet.models import open_checkpoint
from bitnet.packing import pack_hf
from bitnet.ternary import ternarize


def by_name(report: Report) -> list[Layer]:
    return sorted(report.layers, key=lambda layer: layer.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds A.safetensors, nothing else; its configuration lies in `source` in it."""
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    shutil.copy(source / "model.safetensors", tmp_path / "A.safetensors")
    return tmp_path


@pytest.mark.parametrize("form", ["safetensors", "safetensors-bitlinear"])
def test_the_same_as_with_its_configuration(folder: Path, form: str) -> None:
    how = Ternarization(alphas=(("layers.1.o", "keep"), ("q_proj", 0.4)))
    report = convert(
        folder / "A.safetensors", folder / "B.safetensors", format=form, quantization="ternary", ternarization=how, allow_requantize=True
    )
    whole = convert(
        folder / "source", folder / "C.safetensors", format=form, quantization="ternary", ternarization=how, allow_requantize=True
    )
    assert report.verified and by_name(report) == by_name(whole) and any("has no config.json" in note for note in report.notes)
    with pytest.raises(BitNetError, match=r"B.safetensors: has no config; expected .*config.json"):
        open_checkpoint(folder / "B.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / "source" / name, folder / name)
    one, other = (read(open_checkpoint(folder / f"{name}.safetensors")).weights for name in "BC")
    before = read(open_checkpoint(folder / "source")).weights
    for name, weight in other.items():
        assert np.array_equal(one[name].values(0, one[name].shape[0]), weight.values(0, weight.shape[0])), name
        if weight.codes is not None:
            alpha = 0.4 if weight.kind == "q" else ALPHAS[weight.kind]
            assert np.array_equal(weight.codes(0, weight.shape[0]), ternarize(before[name].values(0, weight.shape[0]), alpha))
    assert np.array_equal(logits(folder / "B.safetensors"), logits(folder / "C.safetensors"))


def test_patterns_that_fit_no_layer_are_noted(folder: Path) -> None:
    how = Ternarization(alphas=(("layers.7.q", 0.9), ("layers.9.*", "keep"), ("q", (0.1, 0.2, 0.3, 0.4))))
    report = convert(folder / "A.safetensors", folder / "B.safetensors", quantization="ternary", ternarization=how)
    assert report.notes[:2] == [f"pattern {p!r} fits no layer of this model" for p in ("layers.7.q", "layers.9.*")]
    assert not any("fits no layer" in note for note in report.notes[2:])


def test_what_needs_the_configuration_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder / "A.safetensors"
    with pytest.raises(UsageError, match=r"A.safetensors: has no config.json, which gguf-tq2_0 needs; put it there"):
        convert(source, folder / "B.gguf", quantization="ternary")
    for other in ("binary", "int8", "fp16"):
        with pytest.raises(UsageError, match=r"A.safetensors: has no config.json, without which its weights become ternary only"):
            convert(source, folder / "C.safetensors", quantization=other)
    for how in (Ternarization(alpha="auto"), None):
        with pytest.raises(UsageError, match="without it the model cannot run over calibration text"):
            convert(source, folder / "B.bin", quantization="ternary", ternarization=how, calibration=np.zeros((1, 2), np.int32))
    with pytest.raises(UsageError, match=r"A.safetensors: has no I2_S tensors; i2_s='arm' is for files"):
        convert(source, folder / "B.bin", quantization="ternary", i2_s="arm")
    with pytest.raises(UsageError, match=r"alpha of layers.0.o: is a list of 2; expected one number, for it has no heads"):
        convert(source, folder / "B.bin", quantization="ternary", ternarization=Ternarization(alphas=(("o", (0.1, 0.2)),)))
    with pytest.raises(UsageError, match="is the source itself"):
        convert(source, source, quantization="ternary")
    tensors = {name: tensor.raw() for name, tensor in safetensors.read(source).tensors.items()}
    for changed, said in (
        ({"vision.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}, "both are layers.0.up; put the model's there"),
        ({"model.layers.0.mlp.up_proj.weight": np.ones((0, 4), np.float32)}, r"up_proj.* has shape \[0, 4\], which holds nothing"),
    ):
        safetensors.write(folder / "bad.safetensors", {**tensors, **changed}, {})
        with pytest.raises(FormatError, match=said):
            convert(folder / "bad.safetensors", folder / "B.bin", quantization="ternary")
    for words, said in (
        (["--ternary", "--alpha", "auto"], "without it the model cannot run over calibration text"),
        (["--ternary", "--calibration", "none.txt"], "without it the model cannot run over calibration text"),
        (["--quantization", "int8", "--calibration", "none.txt"], "without which its weights become ternary only"),
    ):
        done = CliRunner().invoke(cli, ["convert", str(source), "-o", str(folder / "B.bin"), *words])
        assert done.exit_code == 2 and f"{source}: has no config.json" in done.output and said in done.output, done.output
    with pytest.raises(BitNetError, match="has no config; expected"):
        convert(source, folder / "B.bin")
    packed_models.safetensors.write(folder / "D.safetensors", {"q_proj.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(BitNetError, match="has no config; expected"):  # no layer, so no name that is known
        convert(folder / "D.safetensors", folder / "B.bin", quantization="ternary")
    monkeypatch.setattr("bitnet.convert.hf.pack_hf", lambda codes: pack_hf(-codes))
    with pytest.raises(NotTheSameError, match="differs from what was to be written"):
        convert(source, folder / "B.bin", quantization="ternary")
    assert not (folder / "B.bin").exists() and not list(folder.glob(".*"))
