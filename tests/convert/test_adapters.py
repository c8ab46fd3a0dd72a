"""Adapters at a conversion: kept beside every format with the same bits of base + adapter, and merged with what survives said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import peft_adapters as made
import pytest
from click.testing import CliRunner
from packed_models import IDS

from bitnet.cli import cli
from bitnet.convert import Ternarization, convert
from bitnet.convert.merging import delta, lines, record, together
from bitnet.convert.source import read
from bitnet.errors import BitNetError, UnsupportedModelError, UsageError
from bitnet.models import canonical, open_checkpoint
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import read_adapter
from bitnet.weights import load_engine


def source(
    folder: Path, family: str = "bitnet", rank: int = 8, size: float = 1.0, name: str = "style",
    alphas: dict[str, float] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    base = packed_models.write(folder / "source", family, **changes)
    config = canonical(open_checkpoint(base)).config
    tensors = {n: v * np.float32(size) for n, v in made.matrices(config, rank).items()}
    made.write(base / name, made.config_of(rank, alpha_pattern=alphas or {}), tensors)
    return base


def adapted(base: Path, adapter: Path | None) -> np.ndarray:
    engine = load_engine(open_checkpoint(base), threads=1)
    found = None if adapter is None else engine.adapter(read_adapter(adapter, engine.config).parts)
    return engine.forward([(engine.sequence(found), IDS)], all_logits=True)


@pytest.mark.parametrize("name", ["style", ""])
@pytest.mark.parametrize("form", ["hf", "safetensors", "gguf-i2_s", "gguf-tq1_0", "hf-dense-f32"])
def test_base_and_adapter_give_the_same_bits_before_and_after(tmp_path: Path, form: str, name: str) -> None:
    base = source(tmp_path, scale="f16", name=name)
    to = {"hf": "out", "safetensors": "out.bin", "hf-dense-f32": "out"}.get(form, "out.gguf")
    report = convert(base, tmp_path / to, format=form)
    kept = tmp_path / to / name if (tmp_path / to).is_dir() else tmp_path / (name or "out-adapter")
    assert any("kept, 7 matrices of rank 8, read back and compared" in note for note in report.notes)
    assert (kept / "adapter_model.safetensors").read_bytes() == (base / name / "adapter_model.safetensors").read_bytes()
    named = json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == (str(tmp_path / to) if form.startswith("hf") else "org/base")
    before, after, alone = adapted(base, base / name), adapted(tmp_path / to, kept), adapted(tmp_path / to, None)
    if form == "hf-dense-f32":  # whose layers meet float32 activations
        assert np.linalg.norm(after - before) < 0.1 * np.linalg.norm(alone - after)
    else:
        assert np.array_equal(before, after)
    assert not np.array_equal(alone, after)


@pytest.mark.parametrize(
    ("first", "second", "to", "said"),
    [
        ("", "t-adapter", "t.safetensors", r"t-adapter: is where both the source's adapter .* would go"),
        ("adapters-style", "adapters/style", "t.gguf", r"t-adapters-style-LoRA\.gguf: is where both"),
        ("both-a", "both/a", "t.gguf", r"t-both-a-LoRA\.gguf: is where both"),
        ("adapters/both-a", "adapters/both/a", "t.gguf", r"t-adapters-both-a-LoRA\.gguf: is where both"),
        ("style", "adapters/style", "style", r"style: is where both the model and the source's adapter .*style would go"),
    ],
)
def test_two_things_in_one_place_are_refused_beforehand(tmp_path: Path, first: str, second: str, to: str, said: str) -> None:
    base = source(tmp_path, "llama", rank=4, name=first, scale="f16")
    config = canonical(open_checkpoint(base)).config
    made.write(base / second, made.config_of(2), made.matrices(config, 2))
    (tmp_path / "new").mkdir()
    with pytest.raises(UsageError, match=said):
        convert(base, tmp_path / "new" / to, format="gguf-tq2_0" if to.endswith(".gguf") else "safetensors")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("to", "file"), [("out.bin", "adapters"), ("out", "adapters"), ("out", "adapters/style"), ("adapters", "")])
def test_a_file_in_the_place_of_a_folder_is_refused_beforehand(tmp_path: Path, to: str, file: str) -> None:
    base = source(tmp_path, name="adapters/style")
    if to == "out":
        convert(base, tmp_path / "out", merge_adapter=base / "adapters" / "style")
    way = (tmp_path / to if to == "out" else tmp_path) / file
    if file:
        way.parent.mkdir(exist_ok=True)
        way.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = rf"{file}: is in the way of the source's adapter .*adapters/style; move it" if file else "adapters: is where both the model and"
    with pytest.raises(UsageError, match=said):
        convert(base, tmp_path / to, format="hf" if to == "out" else "safetensors", ready=lambda: pytest.fail("it was ready"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_llama_in_gguf_agrees_to_float_noise(tmp_path: Path) -> None:
    base = source(tmp_path, "llama", rank=4)
    convert(base, tmp_path / "out.gguf", format="gguf-tq2_0")
    before, after = adapted(base, base / "style"), adapted(tmp_path / "out.gguf", tmp_path / "style")
    # rope's pairs lie in another order, so do the sums of attention; an activation may then round to the next int8 (test_pairs.py)
    assert np.linalg.norm(before - after) <= 2e-2 * np.linalg.norm(before)
    assert np.linalg.norm(before - adapted(base, None)) > 0.2 * np.linalg.norm(before)


@pytest.mark.parametrize("alphas", [{}, {"down_proj": 3.0, "layers.0.*q_proj": 7.5}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bitnet"])
def test_llama_cpps_file_of_the_adapter(tmp_path: Path, family: str, alphas: dict[str, float]) -> None:
    """The same function beside the GGUF and beside the source: rows of B turned as the base's, the scale where the file has it."""
    base = source(tmp_path, family, rank=4, alphas=alphas)
    report = convert(base, tmp_path / "out.gguf", format="gguf-tq2_0")
    lora = tmp_path / "out-style-LoRA.gguf"
    assert any(f"for llama.cpp (--lora) as {lora}, read back and compared" in note for note in report.notes)
    peft, other = adapted(base, base / "style"), adapted(base, lora)
    if alphas:  # scale (B (A x)) and (scale B) (A x) differ by roundings, which int8 activations make larger
        assert np.linalg.norm(peft - other) <= 2e-2 * np.linalg.norm(peft)
    else:
        assert np.array_equal(peft, other)
    assert np.array_equal(adapted(tmp_path / "out.gguf", lora), adapted(tmp_path / "out.gguf", tmp_path / "style")) or alphas
    assert np.linalg.norm(peft - adapted(base, None)) > 0.2 * np.linalg.norm(peft)
    one = read_adapter(base / "style", canonical(open_checkpoint(base)).config).parts
    two = read_adapter(lora, canonical(open_checkpoint(base)).config).parts
    assert one.keys() == two.keys() and all(np.allclose(one[n].delta(), two[n].delta(), atol=1e-6) for n in one)
    lora.write_text("x")
    with pytest.raises(UsageError, match=r"out-style-LoRA.gguf: is in the way of the source's adapter .* for llama.cpp; move it"):
        convert(base, tmp_path / "out.gguf", format="gguf-tq2_0")


def test_what_lies_in_the_way_and_what_is_not_run(tmp_path: Path) -> None:
    base = source(tmp_path)
    made.write(base / "dora", made.config_of(8, use_dora=True), made.matrices(canonical(open_checkpoint(base)).config, 8))
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"dora: is in the way of the source's adapter .*source/dora; move it"):
        convert(base, tmp_path / "out.gguf", format="gguf-i2_s")
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "style").exists()
    for _ in range(2):  # and over itself
        report = convert(base, tmp_path / "out")
        assert any("copied as it is, though this build would not run it" in note and "use_dora" in note for note in report.notes)
        assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["dora", "style"]


@pytest.mark.parametrize("to", ["out", "out.safetensors", "out.gguf"])
def test_all_files_of_an_adapter_and_one_level_deeper(tmp_path: Path, to: str) -> None:
    """adapters/sql, as docs/lora.md has it; a pickle and a card go along."""
    base = source(tmp_path, name="adapters/sql")
    (base / "adapters" / "sql" / "README.md").write_text("card")
    made.write(base / "pickle", made.config_of(8), {})
    (base / "pickle" / "adapter_model.safetensors").unlink()
    (base / "pickle" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    for _ in range(2):  # and over itself
        report = convert(base, tmp_path / to, format="gguf-i2_s" if to == "out.gguf" else None)
        folder = tmp_path / to if to == "out" else tmp_path
        assert (folder / "adapters" / "sql" / "README.md").read_text() == "card"
        assert (folder / "pickle" / "adapter_model.bin").read_bytes() == b"PK\x03\x04"
        assert any("adapters/sql: kept, 7 matrices" in note for note in report.notes)
        assert any("pickle: copied as it is, though this build would not run it" in note for note in report.notes)
    assert (tmp_path / "out-adapters-sql-LoRA.gguf").exists() == (to == "out.gguf")


@pytest.mark.parametrize("to", ["out", "out.safetensors"])
def test_folders_in_an_adapter_s_folder(tmp_path: Path, to: str) -> None:
    """They go along, but for links and other models, which are named, and what a dead writer left."""
    base = source(tmp_path)
    style = base / "style"
    (style / "logs" / "deep").mkdir(parents=True)
    (style / "logs" / "deep" / "loss.txt").write_text("0.5")
    (style / "adapter_logs").mkdir()
    (style / "adapter_logs" / "card.txt").symlink_to("../logs/deep/loss.txt")
    packed_models.write(style / "logs" / "merged")
    for name in ("a.gguf", "pytorch_model.bin"):
        (style / name.replace(".", "-")).mkdir()
        (style / name.replace(".", "-") / name).write_text("weights")
    (style / "round").symlink_to(".")
    (style / ".README.md.0123456789ab.bitnet-tmp").mkdir()
    (style / ".README.md.0123456789ab.bitnet-tmp" / "new").write_text("half")
    for _ in range(2):  # and over itself
        report = convert(base, tmp_path / to)
        kept = (tmp_path / to if to == "out" else tmp_path) / "style"
        below = ["adapter_logs/card.txt", "logs/deep/loss.txt"]
        assert sorted(str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file() and p.parent != kept) == below
        assert all((kept / name).read_text() in ("0.5", "mine") and not (kept / name).is_symlink() for name in below)
        said = "a-gguf (another model), pytorch_model-bin (another model), round (a link or device), logs/merged (another model)"
        assert any(note.endswith(f"read back and compared; without {said}") for note in report.notes), report.notes
        (kept / below[0]).write_text("mine")
    assert (kept / below[0]).read_text() == "mine"


@pytest.mark.parametrize("to", ["out", "out.safetensors", "out.gguf"])
def test_several_adapters_in_one_folder(tmp_path: Path, to: str) -> None:
    """As PEFT saves those of one model that have names: each in a folder of its name, the default one beside them."""
    base = source(tmp_path)  # style
    config, names = canonical(open_checkpoint(base)).config, ["style/other", "both/a", "both/b", "adapters/both/a", "adapters/both"]
    for i, name in enumerate([*names, "style/deep/deeper", "model/its", ".hidden/one", "adapters/model/its"]):
        made.write(base / name, made.config_of(2), made.matrices(config, 2, seed=i))
    for name in ("model", "adapters/model"):
        (base / name / "config.json").write_text("{}")
    (base / "both" / "README.md").write_text("card")
    (base / "round").symlink_to(".")
    for _ in range(2):  # and over itself
        report = convert(base, tmp_path / to, format="gguf-i2_s" if to == "out.gguf" else None)
        root = tmp_path / to if to == "out" else tmp_path
        found = {str(path.parent.relative_to(root)) for path in root.rglob("adapter_config.json") if base not in path.parents}
        assert found == {"style", "style/deep/deeper", *names}, "what lies deeper is a part of it"
        for name in ("style", *names):
            assert (root / name / "adapter_model.safetensors").read_bytes() == (base / name / "adapter_model.safetensors").read_bytes()
            assert any(f"adapter {base / name}: kept, 7 matrices" in note and "without" not in note for note in report.notes)
        made_of = {path.name for path in tmp_path.glob("*LoRA.gguf")}
        assert made_of == {f"out-{name.replace('/', '-')}-LoRA.gguf" for name in ("style", *names) if to == "out.gguf"}
    if to == "out":
        (tmp_path / "out" / "both" / "other").mkdir()
        with pytest.raises(UsageError, match="out: holds both, a folder or a link, which would be lost"):
            convert(base, tmp_path / "out")


def test_an_adapter_among_the_model_s_files(tmp_path: Path) -> None:
    """Of the model's folder only what is named after the adapter is copied beside a file."""
    base = source(tmp_path, name="")
    convert(base, tmp_path / "out.safetensors")
    assert sorted(path.name for path in (tmp_path / "out-adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_another_adapter_in_the_way(tmp_path: Path) -> None:
    """The same weights with another alpha are another adapter; and llama.cpp's file is replaced by itself only."""
    base = source(tmp_path)
    convert(base, tmp_path / "out.gguf", format="gguf-i2_s")
    config = json.loads((base / "style" / "adapter_config.json").read_text())
    (base / "style" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another/name"}))
    convert(base, tmp_path / "out.gguf", format="gguf-i2_s")
    (base / "style" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"style: is in the way of the source's adapter .*source/style; move it"):
        convert(base, tmp_path / "out.gguf", format="gguf-i2_s")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "style").rename(tmp_path / "old")
    with pytest.raises(UsageError, match=r"out-style-LoRA.gguf: is in the way of the source's adapter .* for llama.cpp; move it"):
        convert(base, tmp_path / "out.gguf", format="gguf-i2_s")
    assert not (tmp_path / "style").exists()


def test_a_damaged_adapter_is_copied_and_stops_nothing(tmp_path: Path) -> None:
    base = source(tmp_path)
    (base / "broken").mkdir()
    (base / "broken" / "adapter_config.json").write_text("{")
    for to in ("out", "out.safetensors"):
        for _ in range(2):
            report = convert(base, tmp_path / to)
            assert any("broken: copied as it is, though this build would not run it" in note for note in report.notes)
        folder = tmp_path / to if to == "out" else tmp_path
        assert (folder / "broken" / "adapter_config.json").read_text() == "{" and (folder / "style").is_dir()


def test_an_adapter_that_cannot_be_copied_leaves_the_old_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = source(tmp_path)
    convert(base, tmp_path / "out.safetensors", merge_adapter=base / "style")
    before = (tmp_path / "out.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet.convert.adapters.shutil.copyfileobj", full)
    with pytest.raises(BitNetError, match="No space left on device"):
        convert(base, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_no_adapter_of_the_old_model_stays_in_a_folder(tmp_path: Path) -> None:
    base, other = source(tmp_path), packed_models.write(tmp_path / "other", seed=5)
    convert(base, tmp_path / "out")
    for start, merge in ((other, None), (base, base / "style")):
        with pytest.raises(UsageError, match=r"out/style: is an adapter of the model to be replaced, and is not written anew"):
            convert(start, tmp_path / "out", merge_adapter=merge)
    assert np.array_equal(adapted(tmp_path / "out", tmp_path / "out" / "style"), adapted(base, base / "style"))


def test_a_file_without_a_configuration_says_that_adapters_stay_behind(tmp_path: Path) -> None:
    base = source(tmp_path, trits=False)
    (base / "config.json").unlink()
    report = convert(base / "model.safetensors", tmp_path / "B.safetensors", quantization="ternary")
    assert any("adapters beside the source are not copied" in note and "source/style" in note for note in report.notes)
    report = convert(base / "model.safetensors", base / "B.safetensors", quantization="ternary")
    assert not any("adapters" in note for note in report.notes)


def test_merging_nothing_is_nothing(tmp_path: Path) -> None:
    base = source(tmp_path, size=0.0)
    report = convert(base, tmp_path / "out", merge_adapter=base / "style")
    one, other = read(open_checkpoint(base)), read(open_checkpoint(tmp_path / "out"))
    assert all(np.array_equal(w.values(0, w.shape[0]), other.weights[n].values(0, w.shape[0])) for n, w in one.weights.items())
    assert all(part.changed == 0 and part.survived == 1 for part in report.merged)
    assert not (tmp_path / "out" / "style").exists()


def test_merging_returns_to_the_grid_and_says_what_survived(tmp_path: Path) -> None:
    base = source(tmp_path, size=2.0)
    report = convert(base, tmp_path / "out", merge_adapter=base / "style")
    parts = read_adapter(base / "style", canonical(open_checkpoint(base)).config).parts
    one, other = read(open_checkpoint(base)), read(open_checkpoint(tmp_path / "out"))
    for merged in report.merged:
        w, found, low = one.weights[merged.name], other.weights[merged.name], parts[merged.name]
        assert w.codes is not None and found.codes is not None and w.scales is not None
        rows = w.shape[0]
        d, s = low.delta().astype(np.float64), float(w.scales[0, 0])
        wanted = np.clip(np.rint(w.codes(0, rows) + d / s), -1, 1)
        near = np.abs(np.abs(w.codes(0, rows) + d / s) - 0.5) < 1e-4  # where float32 may round to the other side
        assert np.array_equal(found.codes(0, rows)[~near], wanted[~near]) and np.array_equal(found.scales, w.scales)
        change = s * (found.codes(0, rows).astype(np.float64) - w.codes(0, rows))
        assert merged.survived == pytest.approx((change * d).sum() / (d * d).sum(), rel=1e-3)
        assert merged.changed == (found.codes(0, rows) != w.codes(0, rows)).sum() > 0
    total = together(report.merged, "in all")
    assert 0 < total.survived < 1 and total.trits == sum(int(np.prod(one.weights[w.name].shape)) for w in report.merged)


def test_merging_into_plain_weights(tmp_path: Path) -> None:
    base = source(tmp_path, "llama", rank=4, trits=False)
    report = convert(base, tmp_path / "out", format="hf-dense-f32", merge_adapter=base / "style")
    total = together(report.merged, "in all")
    assert total.survived == pytest.approx(1, abs=1e-2) and total.trits_changed is None  # rounded to the base's own 16 bits
    assert lines(report.merged)[-1].endswith(" -") and record(report.merged)[0]["trits_changed"] is None
    merged, unmerged, alone = adapted(tmp_path / "out", None), adapted(base, base / "style"), adapted(base, None)
    assert np.linalg.norm(merged - unmerged) < 0.05 * np.linalg.norm(alone - unmerged)
    ternary = convert(base, tmp_path / "ternary", quantization="ternary", merge_adapter=base / "style")
    assert together(ternary.merged, "in all").survived > 0.2 and together(ternary.merged, "in all").changed > 0


@pytest.mark.parametrize("how", [Ternarization("gptq"), Ternarization(alpha="auto")], ids=["gptq", "auto"])
def test_merging_before_calibration(tmp_path: Path, how: Ternarization) -> None:
    """The merged weights are what is calibrated: as if they had been written first."""
    if how.method == "gptq":
        pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    base = source(tmp_path, "llama", rank=4, trits=False)
    text = np.array([IDS, IDS[::-1]], np.int32)
    report = convert(base, tmp_path / "one", quantization="ternary", ternarization=how, calibration=text, merge_adapter=base / "style")
    assert report.verified and 0.2 < together(report.merged, "in all").survived < 2 and len(report.merged) == 7
    stored = {"bf16": "hf-dense-bf16", "f16": "hf-dense-f16"}[read(open_checkpoint(base)).weights["layers.0.q"].scheme]
    convert(base, tmp_path / "merged", format=stored, merge_adapter=base / "style")
    convert(tmp_path / "merged", tmp_path / "two", quantization="ternary", ternarization=how, calibration=text)
    one, two = read(open_checkpoint(tmp_path / "one")), read(open_checkpoint(tmp_path / "two"))
    for name, weight in one.weights.items():
        assert np.array_equal(weight.values(0, weight.shape[0]), two.weights[name].values(0, weight.shape[0])), name


def test_a_delta_has_the_same_bits_however_rows_are_cut() -> None:
    rng = np.random.default_rng(0)
    low = LowRank("f32", rng.normal(size=(7, 50)).astype(np.float32), rng.normal(size=(90, 7)).astype(np.float32), 0.3)
    whole = delta(low, 0, 90)
    assert np.array_equal(whole, np.concatenate([delta(low, at, min(at + 13, 90)) for at in range(0, 90, 13)]))
    assert np.allclose(whole, low.delta(), rtol=1e-5, atol=1e-5)


def test_what_is_not_merged_is_refused(tmp_path: Path) -> None:
    convert(packed_models.write(tmp_path / "dense", "llama", trits=False), tmp_path / "q8.gguf", format="gguf-q8_0", quantization="int8")
    config = canonical(open_checkpoint(tmp_path / "q8.gguf")).config
    adapter = made.write(tmp_path / "adapter", made.config_of(4), made.matrices(config, 4))
    with pytest.raises(UnsupportedModelError, match="is q8_0; an adapter is merged into ternary or plain weights only"):
        convert(tmp_path / "q8.gguf", tmp_path / "out.gguf", format="gguf-q8_0", merge_adapter=adapter)
    assert not (tmp_path / "out.gguf").exists()


def test_another_model_with_its_adapter_is_no_adapter_beside(tmp_path: Path) -> None:
    """Not in a folder of models, and not in a target: its weights are neither copied nor replaced."""
    source(tmp_path, name="")
    convert(packed_models.write(tmp_path / "other"), tmp_path / "one.bin")
    report = convert(tmp_path / "one.bin", tmp_path / "out")
    assert not report.notes and not (tmp_path / "out" / "source").exists()
    (tmp_path / "source").rename(tmp_path / "out" / "source")
    with pytest.raises(UsageError, match="out: holds source, a folder or a link, which would be lost"):
        convert(tmp_path / "one.bin", tmp_path / "out")
    assert (tmp_path / "out" / "source" / "model.safetensors").exists()


def test_perplexity_before_a_merge_is_that_of_base_and_adapter(tmp_path: Path) -> None:
    """What a merge should keep: in float32, which is never rounded to the trits or to bf16, nothing has changed."""
    base = tmp_path / "base"
    convert(source(tmp_path, "llama", trits=False), base, format="hf-dense-f32")
    (tmp_path / "text.txt").write_text("the abbot ate the bread " * 20)
    words = ["convert", str(base), "-o", str(tmp_path / "out"), "--format", "hf-dense-f32"]
    words += ["--evaluate", str(tmp_path / "text.txt"), "--merge-adapter", str(base / "style"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    before, after = (json.loads(done.output.splitlines()[-1])["evaluation"][when]["perplexity"] for when in ("before", "after"))
    words[words.index("--merge-adapter") :] = ["--json"]
    alone = json.loads(CliRunner().invoke(cli, words).output.splitlines()[-1])["evaluation"]["before"]["perplexity"]
    # sums of at most 512 products in another order: 512 * 2^-24 = 3e-5 of logits that are below 10
    assert abs(before / after - 1) < 3e-4 < abs(alone / after - 1)


def test_folders_of_others_beside_one_file_are_not_looked_into(tmp_path: Path) -> None:
    """What holds adapters and nothing else is taken for this model's; a project with an adapter in it is somebody's work."""
    convert(packed_models.write(tmp_path / "model"), tmp_path / "m.bin")
    base = source(tmp_path / "runs", name="project/adapter")
    (base / "project").rename(tmp_path / "project")
    assert any("kept, 7 matrices" in note for note in convert(tmp_path / "m.bin", tmp_path / "one").notes)
    (tmp_path / "project" / "src").mkdir()
    assert not convert(tmp_path / "m.bin", tmp_path / "two").notes and not (tmp_path / "two" / "project").exists()
    (tmp_path / "project" / "src").rmdir()
    (tmp_path / "project" / "adapter").rename(tmp_path / "project" / "checkpoint-500")
    assert not convert(tmp_path / "m.bin", tmp_path / "two").notes
