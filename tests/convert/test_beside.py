"""What stands beside the weights goes along: all that a tokenizer consists of, texts that are odd, and nothing of a neighbour's."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_models
import peft_adapters
import pytest

import bitnet.convert
from bitnet.convert import NotTheSameError, convert
from bitnet.convert.tokenizer import ends_of
from bitnet.errors import FormatError, UsageError
from bitnet.files import safetensors
from bitnet.models import canonical, open_checkpoint
from bitnet.source import load_chat_template, load_tokenizer

Run = Callable[..., Any]
FILES = {
    "tokenizer.model": b"\x0a\x09pieces", "vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\na b\n",
    "special_tokens_map.json": b'{"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "unk_token": "a"}',
    "added_tokens.json": b"",
}  # fmt: skip


def with_files(folder: Path) -> Path:
    source = packed_models.write(folder, "qwen3")
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    return source


def test_all_files_of_a_tokenizer_go_into_a_folder(tmp_path: Path) -> None:
    source = with_files(tmp_path / "source")
    assert not convert(source, tmp_path / "out").notes
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == FILES
    other = tmp_path / "other.json"
    shutil.copy(source / "tokenizer.json", other)
    convert(source, tmp_path / "out", tokenizer_json=other)
    assert not {p.name for p in (tmp_path / "out").iterdir()} & set(FILES)


def test_a_copy_that_differs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = bitnet.convert.write_synced
    monkeypatch.setattr(bitnet.convert, "write_synced", lambda path, content: written(path, content.replace(b"pieces", b"places")))
    with pytest.raises(NotTheSameError, match=r"tokenizer.model: differs from what was to be written"):
        convert(with_files(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "how"), [("out", "copied as they are"), ("out.safetensors", "left behind"), ("out.gguf", "left behind")]
)
def test_a_tokenizer_of_another_kind_is_no_missing_one(tmp_path: Path, target: str, how: str) -> None:
    source = with_files(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (note,) = convert(source, tmp_path / target).notes
    assert note.startswith(f"the source has no tokenizer.json, but tokenizer.model, vocab.json: {how}")


@pytest.mark.parametrize("settings", [None, {"bos_token": None, "unk_token": "b"}])
@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_special_tokens_that_stand_in_their_map_alone(tmp_path: Path, settings: dict | None, target: str) -> None:
    """As older folders have them; what tokenizer_config.json names itself counts."""
    source = with_files(tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ bos_token }}-{{ eos_token }}")
    convert(source, tmp_path / target)
    for path in (source, tmp_path / target):
        template = load_chat_template(open_checkpoint(path))
        assert template is not None and template.render([{"role": "user", "content": "a"}]) == "<|begin|>-<|end|>"
    if target != "out.gguf":
        assert open_checkpoint(tmp_path / target).tokenizer_config["unk_token"] == ("a" if settings is None else "b")


def test_one_file_takes_nothing_from_its_neighbours(tmp_path: Path) -> None:
    """What it has not it says; other programs' files, which say nothing, are completed from beside."""
    source = packed_models.write(tmp_path / "source", "qwen3", texts=False)
    convert(source, tmp_path / "m.safetensors")
    neighbours = packed_models.write(tmp_path / "other", "qwen3")
    (neighbours / "generation_config.json").write_text('{"eos_token_id": 7}')
    shutil.move(tmp_path / "m.safetensors", neighbours / "m.safetensors")
    found = open_checkpoint(neighbours / "m.safetensors")
    assert (found.tokenizer_json, found.generation_config, found.tokenizer_config, found.chat_template) == (None, {}, {}, None)
    assert ends_of(found, 262) == [1]
    assert convert(neighbours / "m.safetensors", tmp_path / "out").notes == [
        "the source has no tokenizer, so the target has none; --tokenizer names one"
    ]
    assert load_tokenizer(found, 262, neighbours / "tokenizer.json").encode("the")
    bare = safetensors.read_stored(neighbours / "m.safetensors")
    raw = {n: (t.dtype, t.raw()) if t.dtype == "BF16" else t.raw() for n, t in bare.tensors.items()}
    safetensors.write(neighbours / "bare.safetensors", raw, {"config": bare.metadata["config"]})
    found = open_checkpoint(neighbours / "bare.safetensors")
    assert found.tokenizer_json and found.generation_config == {"eos_token_id": 7} and found.chat_template == packed_models.TEMPLATE


def test_a_tokenizer_that_one_file_could_not_be_read_with_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character beyond the 16-bit plane makes every one of the header's text four bytes in memory."""
    source = packed_models.write(tmp_path / "source", "qwen3")
    (source / "tokenizer_config.json").write_text(json.dumps({"long": "\U0001f600" + "a" * 300_000}, ensure_ascii=False))
    monkeypatch.setattr(safetensors, "MEMORY_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"is read with [\d,]+ at most; write a folder, where tokenizer and configuration are files"):
        convert(source, tmp_path / "m.safetensors", ready=lambda: pytest.fail("it was ready"))
    assert not (tmp_path / "m.safetensors").exists()
    convert(source, tmp_path / "out")
    (source / "tokenizer_config.json").write_text(json.dumps({"long": "a" * 300_000}))
    convert(source, tmp_path / "m.safetensors")


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_a_tokenizer_that_is_no_text(tmp_path: Path, target: str) -> None:
    source = packed_models.write(tmp_path / "source", "qwen3")
    (source / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FormatError, match=r"tokenizer.json is not UTF-8 \(byte 7\)"):
        convert(source, tmp_path / target)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_half_of_a_surrogate_pair_stays_what_it_is(tmp_path: Path, target: str) -> None:
    source = packed_models.write(tmp_path / "source", "qwen3", note="\ud83d, ü")
    half = {"bos_token": "<|begin|>", "note": "\ud800 and ü", "chat_template": "\udc00{{ messages[0].content }}"}
    (source / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "generation_config.json"):
        (source / name).write_text(json.dumps(half))
    convert(source, tmp_path / target)
    found = open_checkpoint(tmp_path / target)
    assert found.tokenizer_config == found.generation_config == half and found.config["note"] == "\ud83d, ü"
    with pytest.raises(FormatError, match=r"chat_template: holds half of a surrogate pair \(character 0\), which no GGUF can"):
        convert(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_a_tokenizer_for_a_gguf_without_a_vocabulary(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids that it names are looked up in the tokenizer that is given."""
    source = packed_models.write(tmp_path / "source", "qwen3", texts=False)
    metadata_of = bitnet.convert.gguf.metadata_of
    named = {f"tokenizer.ggml.{name}_token_id": i for name, i in (("bos", 0), ("eos", 1), ("padding", 400))}
    monkeypatch.setattr(bitnet.convert.gguf, "metadata_of", lambda *args: metadata_of(*args) | named)
    convert(source, tmp_path / "m.gguf")
    monkeypatch.undo()
    other = packed_models.write(tmp_path / "other", "qwen3") / "tokenizer.json"
    assert ends_of(open_checkpoint(tmp_path / "m.gguf"), 262) == [1]
    assert load_tokenizer(open_checkpoint(tmp_path / "m.gguf"), 262, other).eos_ids == {1}
    convert(tmp_path / "m.gguf", tmp_path / target, tokenizer_json=other)
    found = open_checkpoint(tmp_path / target)
    assert ends_of(found, 262) == [1]
    if target == "out.gguf":
        assert found.gguf_metadata["tokenizer.ggml.eos_token_id"] == 1 and found.gguf_metadata["tokenizer.ggml.bos_token_id"] == 0
    else:
        assert found.tokenizer_config == {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}


def test_the_end_of_a_text_stays_without_a_tokenizer(tmp_path: Path) -> None:
    """There and back; a tokenizer that is named later finds it."""
    source = packed_models.write(tmp_path / "source", "qwen3", texts=False)
    for before, after in (("source", "m.gguf"), ("m.gguf", "n.gguf"), ("n.gguf", "out"), ("out", "m.safetensors")):
        convert(tmp_path / before, tmp_path / after)
        assert ends_of(open_checkpoint(tmp_path / after), 262) == ends_of(open_checkpoint(source), 262) == [1]


def test_a_tokenizer_whose_kind_goes_without_saying(tmp_path: Path) -> None:
    """As older versions of the tokenizers library wrote it."""
    source = packed_models.write(tmp_path / "source", "qwen3")
    described = json.loads((source / "tokenizer.json").read_text())
    del described["model"]["type"]
    (source / "tokenizer.json").write_text(json.dumps(described))
    convert(source, tmp_path / "m.gguf")
    one, other = (load_tokenizer(open_checkpoint(path), 262) for path in (source, tmp_path / "m.gguf"))
    assert one.encode("the abacus") == other.encode("the abacus")


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_an_empty_template_is_none(tmp_path: Path, target: str) -> None:
    source = packed_models.write(tmp_path / "source", "qwen3")
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text('{"chat_template": ""}')
    assert load_chat_template(open_checkpoint(source)) is None
    convert(source, tmp_path / target)
    assert load_chat_template(open_checkpoint(tmp_path / target)) is None
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are text here")
@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_a_source_whose_name_is_no_utf_8(tmp_path: Path, target: str, bitnet: Run) -> None:
    """Nor that of its adapter; the picture of the report has a title all the same."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
    packed_models.write(source, "qwen3", trits=False)
    config = canonical(open_checkpoint(source)).config
    adapter = source / os.fsdecode(b"style\xfe")
    peft_adapters.write(adapter, peft_adapters.config_of(4), peft_adapters.matrices(config, 4))
    done = bitnet("convert", source, "-o", tmp_path / target, "--ternary")
    assert done.exit_code == 0, done.output
    assert "read back and compared" in done.stdout and f"{target}.report.json" in done.stdout
    assert open_checkpoint(tmp_path / target).config
