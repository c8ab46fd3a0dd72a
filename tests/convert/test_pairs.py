"""Every format into every other: the same weights, configuration, tokenizer and logits after each step.

`convert` reads back what it wrote and compares it with its source. That this comparison can fail is shown here, too; that the bytes are
those of other programs, in test_bytes.py and test_peers.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import packed_models
import pytest
from packed_models import IDS, TEMPLATE, logits

from bitnet.convert import FORMATS, NotTheSameError, convert
from bitnet.convert.source import read
from bitnet.convert.verify import verify
from bitnet.models import open_checkpoint
from bitnet.transformer import TernaryTransformer

TERNARY = [name for name, form in FORMATS.items() if not form.dense and not form.integer and form.weights != "q1_0"]
DENSE = [name for name, form in FORMATS.items() if form.dense]
FAMILIES = list(packed_models.PARTICULARS)
CLOSE = 2e-2  # of the logits' norm: int8 activations fall to other sides where float sums run in another order (llama's rope by pairs)


def name_of(form: str) -> str:
    return form + (".gguf" if form.startswith("gguf") else ".bin" if form.startswith("safetensors") else "")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every format, each from Hugging Face's. Its scales are powers of two: reciprocals and f16 hold them."""
    folder = tmp_path_factory.mktemp("all")
    source = packed_models.write(folder / "source")
    stored = packed_models.safetensors.read(source / "model.safetensors").tensors
    halved = {name: np.array([2.0**-6], np.float32) if name.endswith("_scale") else t.raw() for name, t in stored.items()}
    plain = {name: ("BF16", values) if stored[name].dtype == "BF16" else values for name, values in halved.items()}
    packed_models.safetensors.write(source / "model.safetensors", plain, {"format": "pt"})
    for form in TERNARY + DENSE:
        convert(source, folder / name_of(form), format=form)
    return {form: folder / name_of(form) for form in FORMATS if (folder / name_of(form)).exists()} | {"source": source}


@pytest.mark.parametrize("to", [*TERNARY, *DENSE])
@pytest.mark.parametrize("start", [*TERNARY, *DENSE])
def test_every_pair(tmp_path: Path, written: dict[str, Path], start: str, to: str) -> None:
    report = convert(written[start], tmp_path / name_of(to), format=to)
    assert report.verified and not report.losses and report.format == to
    one, other = read(open_checkpoint(written["source"])), read(open_checkpoint(tmp_path / name_of(to)))
    for name, weight in one.weights.items():
        found = other.weights[name]
        assert np.array_equal(weight.values(0, weight.shape[0]), found.values(0, weight.shape[0])), name


@pytest.mark.parametrize("to", TERNARY)
def test_the_same_logits_and_text(written: dict[str, Path], to: str) -> None:
    assert np.array_equal(logits(written[to]), logits(written["source"]))
    ours, theirs = (TernaryTransformer.from_pretrained(written[form]) for form in (to, "source"))
    text = "the abacus and\n 1999 things"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.eos_ids == theirs.tokenizer.eos_ids == {1}
    assert ours.chat_template is not None and ours.chat_template.source == TEMPLATE
    assert ours.generate("the", max_new_tokens=8, temperature=0).text == theirs.generate("the", max_new_tokens=8, temperature=0).text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["hf", "safetensors", "mlx", "gguf-i2_s", "gguf-q2_0", "gguf-tq1_0"])
def test_every_family_there_and_back(tmp_path: Path, family: str, to: str) -> None:
    source = packed_models.write(tmp_path / "source", family)
    there = tmp_path / name_of(to)
    convert(source, there, format=to)
    convert(there, tmp_path / "back", format="hf")
    expected = logits(source)
    for path in (there, tmp_path / "back"):
        found = logits(path)
        if path == there and family == "llama" and to.startswith("gguf"):
            assert np.linalg.norm(found - expected) <= CLOSE * np.linalg.norm(expected), "rope adds the same products in another order"
        else:
            assert np.array_equal(found, expected), path
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after["model_type"] == before["model_type"] and len(IDS) == 24


@pytest.mark.parametrize("between", ["hf", "safetensors", "mlx", "hf-dense-f16", "gguf-i2_s"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_packed_tables_return(tmp_path: Path, family: str, between: str) -> None:
    """An embedding and a head of trits, through a format that has them as plain numbers; the notes say what that changes."""
    source, first, last = packed_models.write(tmp_path / "source", family, trits=False), tmp_path / "first.gguf", tmp_path / "last.gguf"
    convert(source, first, format="gguf-q2_0", quantization="ternary")
    notes = convert(first, tmp_path / name_of(between), format=between).notes
    said = "dense head runs with float32 activations, the ternary one of the source with int8 activations per token" in notes
    assert said == (between != "mlx"), notes
    notes = convert(tmp_path / name_of(between), last, format="gguf-q2_0").notes
    assert ("ternary head runs with int8 activations, the dense one of the source with float32 activations" in notes) == said, notes
    one, other = (read(open_checkpoint(path)).weights for path in (first, last))
    assert {name: w.scheme for name, w in one.items()} == {name: w.scheme for name, w in other.items()}
    assert first.stat().st_size == last.stat().st_size and np.array_equal(logits(first), logits(last))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    },
    YARN,
    YARN | {"attention_factor": 1.3, "beta_fast": 16.0},
])  # fmt: skip
def test_rope_scaling_survives(tmp_path: Path, rope: dict) -> None:
    family = "llama" if rope["rope_type"] == "llama3" else "qwen3"  # of others llama.cpp does not load llama3's
    source = packed_models.write(tmp_path / "source", family, rope_parameters=rope)
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    for path in (tmp_path / "m.gguf", tmp_path / "back"):
        assert np.linalg.norm(logits(path) - logits(source)) <= CLOSE * np.linalg.norm(logits(source))


def test_masters_that_are_ternarized_at_load(tmp_path: Path) -> None:
    """Of online quantization: what is packed is what ran."""
    source = packed_models.write(tmp_path / "source", trits=False)
    config = json.loads((source / "config.json").read_text())
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": online}))
    for to in ("hf", "gguf-tq2_0", "mlx"):
        convert(source, tmp_path / name_of(to), format=to, allow_requantize=to == "mlx")
        assert np.array_equal(logits(tmp_path / name_of(to)), logits(source))


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """One trit, one scale, one norm, one setting: the verification fails."""
    source = packed_models.write(tmp_path / "source")
    model = read(open_checkpoint(source))
    stored = packed_models.safetensors.read(source / "model.safetensors").tensors
    plain = {name: ("BF16", t.raw()) if t.dtype == "BF16" else t.raw() for name, t in stored.items()}
    config = (source / "config.json").read_text()
    verify(source, model, model.weights, lambda *_: None)

    def spoilt(name: str, change: int) -> Path:
        folder = tmp_path / f"spoilt-{change}-{name[-12:]}"
        folder.mkdir()
        values = plain[name][1].copy() if isinstance(plain[name], tuple) else plain[name].copy()
        values.view(np.uint8).reshape(-1)[-1 if change == 1 else 0] ^= change
        packed_models.safetensors.write(
            folder / "model.safetensors", plain | {name: ("BF16", values) if isinstance(plain[name], tuple) else values}
        )
        (folder / "config.json").write_text(config)
        return folder

    down = "model.layers.0.mlp.down_proj.weight"
    byte = int(plain[down].reshape(-1)[0]) & 3
    cases = [
        (down, 1 if byte == 0 else 3 if byte == 1 else 2, "differs from the source between rows"),
        (f"{down}_scale", 4, "scales differ"),
    ]
    cases += [("model.norm.weight", 8, "differs from the source"), ("model.embed_tokens.weight", 16, "differs from the source")]
    for name, change, message in cases:
        with pytest.raises(NotTheSameError, match=message):
            verify(spoilt(name, change), model, model.weights, lambda *_: None)
    (source / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(NotTheSameError, match=r"would be read as another model \(rope "):
        verify(source, model, model.weights, lambda *_: None)
