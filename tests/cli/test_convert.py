"""`bitnet convert` and `bitnet-convert`: the article's lines, what is printed, and one line for what goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packed_models
import pytest
from click.testing import CliRunner, Result

from bitnet.cli import article
from bitnet.cli.convert import FORMATS as HELP
from bitnet.convert import FORMATS
from bitnet.errors import BitNetError
from bitnet.models import open_checkpoint
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.transformer import TernaryTransformer

Run = Callable[..., Result]


def bitnet_convert(*args: object) -> Result:
    return CliRunner().invoke(article.convert, [str(arg) for arg in args])


def test_the_embedded_model_as_one_file(tmp_path: Path, bitnet: Run) -> None:
    """As the article's command line has it: content is known by bytes, and a tokenizer beside overrides."""
    target = tmp_path / "tinyllm-ternary-v2.bin"
    done = bitnet("convert", EMBEDDED_MODEL, "--output-model", target)
    assert done.exit_code == 0, done.output
    assert f"{target}: safetensors, {target.stat().st_size:,} bytes, 200 tensors, every weight read back and compared" in done.stdout
    assert "peak memory" in done.stdout and done.stderr == ""
    shutil.copy(resolve(EMBEDDED_MODEL) / "tokenizer.json", tmp_path / "tokenizer.json")
    run = [
        "--model",
        str(target),
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
        "--prompt",
        "Once upon a time",
        "-n",
        "12",
        "--seed",
        "1",
    ]
    said = CliRunner().invoke(article.cli, [*run, "--ternary"])
    expected = TernaryTransformer.from_pretrained(EMBEDDED_MODEL).generate("Once upon a time", max_new_tokens=12, seed=1).text
    assert said.exit_code == 0 and expected in said.stdout


@pytest.mark.parametrize("flags", [["--quantization", "ternary"], ["--ternary"]])
def test_the_articles_converter(tmp_path: Path, flags: list[str]) -> None:
    source = packed_models.write(tmp_path / "A", "llama", trits=False)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / name)
    shutil.move(source / "model.safetensors", tmp_path / "A.safetensors")
    done = bitnet_convert(
        "--input-model",
        tmp_path / "A.safetensors",
        "--output-model",
        tmp_path / "B.safetensors",
        *flags,
        "--alpha",
        "0.065",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    found = open_checkpoint(tmp_path / "B.safetensors")
    trits = found.tensors["model.layers.0.mlp.up_proj.weight"].trits()
    expected = packed_models.safetensors.read(tmp_path / "A.safetensors").tensors["model.layers.0.mlp.up_proj.weight"].dense()
    assert np.array_equal(trits, np.sign(expected) * (np.abs(expected) > 0.065 * np.abs(expected, dtype=np.float64).mean()))
    assert TernaryTransformer.from_pretrained(tmp_path / "B.safetensors").generate("the", max_new_tokens=3, temperature=0).text


def test_json_is_the_last_line(tmp_path: Path, bitnet: Run) -> None:
    done = bitnet("convert", EMBEDDED_MODEL, "-o", tmp_path / "m.gguf", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1 and "gguf-tq2_0" in done.stderr
    assert found["format"] == "gguf-tq2_0" and found["bytes"] == (tmp_path / "m.gguf").stat().st_size and found["verified"] is True
    assert any("SiLU" in note for note in found["notes"]) and found["peak_rss_bytes"] > 1e7 and found["requantized"] == []


@pytest.mark.parametrize("scheme", ["ternary", "binary", "int8", "int4", "fp4", "fp16"])
def test_every_scheme_ends_with_a_report(tmp_path: Path, bitnet: Run, scheme: str) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    done = bitnet("convert", source, "-o", tmp_path / "out.safetensors", "--quantization", scheme)
    assert done.exit_code == 0 and "weight error" in done.stdout and f"{scheme} moved these weights by" in done.stdout
    found = json.loads((tmp_path / "out.safetensors.report.json").read_text())
    assert found["quantization"] == scheme and len(found["layers"]) == 7 + 2 and {row["rule"] for row in found["layers"]}
    assert all(layer["bits_per_weight"] >= 2 and 0 <= layer["weight_error"] < 1 for layer in found["layers"])
    assert "report: " in done.stdout and ("matplotlib" in done.stdout or (tmp_path / "out.safetensors.report.png").exists())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine.txt", "mine.txt: is in the way of the report, and is none; move it"),
        ("picture.json", "picture.png: is in the way of the report, and is none"),
        ("no/r.json", "r.json: the report cannot be written in"),
        ("r.png", "r.png: is the picture's name; the report is JSON"),
        ("out.bin", "out.bin: is the target itself; the report is JSON"),
        ("n" * 251 + ".json", "is a name of 256 bytes; expected at most 255: name another --report"),
        ("source/config.json", "config.json: is in the way of the report"),
        ("source/../out.bin", "out.bin: is the target itself; the report is JSON"),
        ("out.bin/r.json", "r.json: the report cannot be written in"),
    ],
)
def test_a_report_replaces_reports_only(tmp_path: Path, bitnet: Run, place: str, message: str) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    for name in ("mine.txt", "picture.png"):
        (tmp_path / name).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = bitnet("convert", source, "-o", tmp_path / "out.bin", "--ternary", "--report", tmp_path / place)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # but a report may be made anew
        assert bitnet("convert", source, "-o", tmp_path / "out.bin", "--ternary", "--report", tmp_path / "r.json").exit_code == 0


def test_a_report_never_becomes_the_model_nor_a_part_of_it(tmp_path: Path, bitnet: Run) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    done = bitnet("convert", source, "-o", tmp_path / "p.png", "--format", "safetensors", "--ternary", "--report", tmp_path / "p.json")
    assert done.exit_code == 2 and "its picture" in done.stderr and "would be the target itself" in done.stderr
    for name in ("config.json", "tokenizer.json", "adapter_config.json"):
        done = bitnet("convert", source, "-o", tmp_path / "out", "--ternary", "--report", tmp_path / "out" / name)
        assert done.exit_code == 2 and f"{name}: is the name of a file of the model in it" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "p.png").exists()
    done = bitnet("convert", source, "-o", tmp_path / "a\nb", "--ternary", "--report", tmp_path / "a\nb" / "r.json")
    assert done.exit_code == 0 and "a\\nb: hf" in done.stdout and (tmp_path / "a\nb" / "r.json").exists()


def test_no_report_of_what_is_ternary_already(tmp_path: Path, bitnet: Run) -> None:
    source = packed_models.write(tmp_path / "source", "llama")
    words = ["convert", source, "-o", tmp_path / "out", "--ternary", "--keep", "embedding", "--keep", "head"]
    for more in ([], ["--report", tmp_path / "r.json"]):
        path = more[-1] if more else tmp_path / "out.report.json"
        note = f"nothing was quantized, so there is nothing to report: no {path}"
        done = bitnet(*words, *more)
        assert done.exit_code == 0 and f"note: {note}\n" in done.stdout and not path.exists()
        assert note in json.loads(bitnet(*words, *more, "--json").stdout)["notes"]


def test_a_target_by_no_name_of_its_own(tmp_path: Path, bitnet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command runs nothing is replaced; elsewhere the report's name is that of the folder."""
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    (tmp_path / "e1" / "adapters").mkdir(parents=True)
    shutil.copy(source / "config.json", tmp_path / "e1" / "config.json")
    (tmp_path / "link").symlink_to("e1")
    before = sorted(tmp_path.rglob("*"))
    for here, target in (("e1", "."), ("e1", "./"), ("e1", "../e1"), ("e1/adapters", ".."), ("e1/adapters", "../../e1/.")):
        monkeypatch.chdir(tmp_path / here)
        done = bitnet("convert", source, "-o", target, "--ternary")
        assert done.exit_code == 2 and "is the folder that this runs in, or holds it, and would be replaced; name another" in done.stderr
        assert done.stderr.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
    monkeypatch.chdir(tmp_path)
    done = bitnet("convert", source, "-o", "link/.", "--ternary")
    assert done.exit_code == 2 and "link: is a symbolic link to e1" in done.stderr
    done = bitnet("convert", source, "-o", "e1", "--ternary", "--report", "e1/..")
    assert done.exit_code == 2 and "is a folder; the report is a file of JSON" in done.stderr and sorted(tmp_path.rglob("*")) == before
    for target in ("./e1/.", "e1/adapters/..", "link/adapters/../."):
        done = bitnet("convert", source, "-o", target, "--ternary")
        assert done.exit_code == 0 and (tmp_path / "e1" / "model.safetensors").exists(), done.output
        assert {path.name for path in tmp_path.iterdir()} - {"e1.report.png"} == {"e1", "e1.report.json", "link", "source"}
        (tmp_path / "e1.report.json").unlink()


def test_nothing_is_measured_before_a_refusal(tmp_path: Path, bitnet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    (tmp_path / "text.txt").write_text("the abacus " * 20)
    monkeypatch.setattr("bitnet.cli.convert._perplexity", lambda *_: pytest.fail("perplexity was measured"))
    for words, message in (
        (["--format", "onnx"], "format is 'onnx'"),
        (["--scale", "row"], "has a scale for every row, and they differ; hf has one for the whole tensor"),
        (["--method", "gptq", "--scale", "group:96"], "has 256 inputs, which are no whole groups of 96"),
        (["--alpha-config", tmp_path / "none.json"], "none.json"),
    ):
        done = bitnet("convert", source, "-o", tmp_path / "out", "--ternary", "--evaluate", tmp_path / "text.txt", *words)
        assert done.exit_code in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_a_report_that_cannot_be_written_leaves_table_and_verdict(tmp_path: Path, bitnet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise BitNetError("r.json: cannot be written (No space left on device)")

    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    monkeypatch.setattr("bitnet.convert.report.write_json", full)
    done = bitnet("convert", source, "-o", tmp_path / "out.bin", "--ternary")
    assert done.exit_code == 1 and done.stderr == "error: r.json: cannot be written (No space left on device)\n"
    assert "every weight read back and compared" in done.stdout and "weight error" in done.stdout
    assert "ternary moved these weights by" in done.stdout and (tmp_path / "out.bin").exists()


def test_perplexity_before_and_after_with_its_tokens(tmp_path: Path, bitnet: Run) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=False)
    (tmp_path / "text.txt").write_text("the abacus " * 20)
    done = bitnet("convert", source, "-o", tmp_path / "out.bin", "--ternary", "--evaluate", tmp_path / "text.txt", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = found["evaluation"]["before"]["tokens"]
    assert found["evaluation"]["after"]["tokens"] == tokens < 256
    assert f"over {tokens} tokens: too few to say what ternary costs; --evaluate a longer text" in found["verdict"]
    assert found["verdict"] == json.loads((tmp_path / "out.bin.report.json").read_text())["verdict"] and found["verdict"] in done.stderr


def test_what_requantizing_costs_is_printed(tmp_path: Path, bitnet: Run) -> None:
    done = bitnet("convert", EMBEDDED_MODEL, "-o", tmp_path / "out", "--format", "hf-dense-bf16")
    assert done.exit_code == 1 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--allow-requantize" in done.stderr
    done = bitnet("convert", EMBEDDED_MODEL, "-o", tmp_path / "out", "--format", "hf-dense-bf16", "--allow-requantize")
    assert done.exit_code == 0 and "requantized 77 weights: off by " in done.stdout and "the worst by " in done.stdout
    assert "note: dense layers run with float32 activations" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", EMBEDDED_MODEL], "Missing option '--output-model'"),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--format", "onnx"], "format is 'onnx'; expected gguf or one of hf, hf-bitlinear"),
        (
            ["convert", EMBEDDED_MODEL, "-o", "x", "--ternary", "--quantization", "int8"],
            "--ternary and --quantization int8 exclude each other",
        ),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--alpha", "0.1"], "alpha: of quantization 'ternary' only; add it"),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--method", "gptq", "--calibration", "no.txt"], "method: of quantization 'ternary' only"),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--keep", "q"], "keep: of a quantization only, and none was asked for; add one"),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--ternary", "--alpha", "-1"], "alpha is -1.0; expected a finite number >= 0"),
        (["convert", EMBEDDED_MODEL, "-o", "no/such/m.gguf"], "there is no folder"),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--report", "r.json"], "--report is of --quantization, and none was asked for"),
        (
            ["convert", EMBEDDED_MODEL, "-o", "x", "--evaluate", "no.txt"],
            "no.txt: cannot be read as text: No such file or directory; --evaluate",
        ),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--ternary", "--calibration", "no.txt"], "directory; --calibration takes text files"),
        (
            ["convert", EMBEDDED_MODEL, "-o", "x", "--ternary", "--sequences", "4"],
            "--sequences is of the calibration text, which nothing here",
        ),
        (["convert", EMBEDDED_MODEL, "-o", "x", "--sequence-length", "4"], "--sequence-length is of the calibration text, which nothing"),
        (["convert", "nothing-here", "-o", "x"], "no folder, file or embedded model named 'nothing-here'"),
    ],
)
def test_bad_usage_is_one_line(bitnet: Run, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = bitnet(*args)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_text_that_is_too_short_is_named(bitnet: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A")
    done = bitnet("convert", EMBEDDED_MODEL, "-o", tmp_path / "x", "--ternary", "--calibration", tmp_path / "short.txt")
    assert done.exit_code == 2 and f"{tmp_path}/short.txt: the calibration text has 1 tokens; expected at least 2" in done.stderr


def test_another_device_is_refused(tmp_path: Path) -> None:
    done = bitnet_convert("--input-model", EMBEDDED_MODEL, "--output-model", tmp_path / "x", "--device", "cuda")
    assert done.exit_code == 2 and "--device is 'cuda'; this build converts on the cpu only" in done.stderr


def test_help_names_every_format() -> None:
    """Written once, shortened where names differ in their ends only."""
    words = HELP.replace(",", " ").split()
    for name in FORMATS:
        assert name in words or name.startswith("safetensors-") or f"-{name.rsplit('-', 1)[-1]}" in words, name


@pytest.mark.parametrize("words", [[], ["--ternary", "--alpha", "auto"]])
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, bitnet: Run, words: list[str]) -> None:
    source = packed_models.write(tmp_path / "source", "llama", trits=not words)
    (tmp_path / "text.txt").write_text("a text")
    done = bitnet("convert", source, "-o", tmp_path / "out", "--tokenizer", tmp_path / "text.txt", *words)
    assert done.exit_code == 1 and f"error: {tmp_path}/text.txt cannot be used: " in done.stderr and done.stderr.count("\n") == 1


def test_inspect_and_doctor_accept_ternary(bitnet: Run) -> None:
    plain, ternary = (bitnet("inspect", EMBEDDED_MODEL, "--json", *words) for words in ([], ["--ternary"]))
    assert plain.exit_code == ternary.exit_code == 0 and plain.stdout == ternary.stdout
    done = bitnet("doctor", "nothing-here", "--ternary")
    assert done.exit_code == 2 and "no folder, file or embedded model named 'nothing-here'" in done.stderr
