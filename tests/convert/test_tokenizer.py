"""Tokenizers across formats: llama.cpp's ids after GGUF -> tokenizer.json -> GGUF, and refusals where they would differ."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import bitnet.convert
from bitnet.convert import NotTheSameError, convert, gguf
from bitnet.convert import tokenizer as conversion
from bitnet.errors import UnsupportedModelError
from bitnet.models import open_checkpoint
from bitnet.source import resolve
from bitnet.tokenizer import Tokenizer
from bitnet.tokenizer.gguf import tokenizer_from_gguf
from bitnet.tokenizer.gguf_vocabulary import END_TEXTS

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = 2000
EMBEDDED = resolve("tinyllm-ternary-v2")


def golden(name: str) -> Any:
    return json.loads(gzip.decompress((GOLDEN / f"tokenizer_{name}.json.gz").read_bytes()))


def metadata(kind: str) -> dict[str, Any]:
    dtypes = {"scores": np.float32, "token_type": np.int32}
    fields = golden(kind)["metadata"]
    return {f"tokenizer.ggml.{name}": np.array(value, dtypes[name]) if name in dtypes else value for name, value in fields.items()}


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "default", "llama"])
def test_the_ids_of_llama_cpp_after_going_there_and_back(kind: str) -> None:
    strings, answers = golden("strings"), golden(kind)["ids"]
    raw, source = conversion.to_json(metadata(kind), SIZE, "m.gguf")
    there = Tokenizer.from_json(raw, SIZE)
    back = tokenizer_from_gguf(conversion.to_gguf(there, raw, {}, sorted(source.eos_ids), "m")[0], SIZE, "m")
    assert back.prefix_ids == there.prefix_ids == source.prefix_ids
    whole = [(text, ids) for text, ids in zip(strings, answers, strict=True) if text.isprintable() or text.isascii()]
    assert len(whole) > 500
    for text, ids in whole:
        assert there.encode(text, add_special=False) == ids, ascii(text)
        assert back.encode(text, add_special=False) == ids, ascii(text)
        assert there.decode(ids).strip() == source.decode(ids).strip()
    for token in sorted(source.eos_ids)[:5]:
        text = there._library.id_to_token(token)
        assert there.encode(text, add_special=False, parse_special=True) == [token], "an end of text stays a special token"


def test_scores_that_no_list_of_merges_can_say_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"m.gguf: a tokenizer.json made of this file's vocabulary would give other ids .* --tokenizer"
    ):
        conversion.to_json(metadata("llama-ties"), SIZE, "m.gguf")


def test_a_tokenizer_that_gguf_says_almost() -> None:
    """The embedded one cuts at decimal digits, GGUF's nearest kind at all numbers; what is lost is counted, and kept beside."""
    raw = (EMBEDDED / "tokenizer.json").read_bytes()
    source, ends = conversion.read(raw, 4096, {}, {"eos_token_id": 0})
    made, note = conversion.to_gguf(source, raw, {}, ends, "m")
    assert (
        made["tokenizer.ggml.eos_token_id"] == 0 and made["tokenizer.ggml.add_bos_token"] is True and made["tokenizer.ggml.pre"] == "smollm"
    )
    assert note is not None and re.search(r"gives other ids than tokenizer.json on \d+ of \d+ texts", note)
    assert made[conversion.HUGGING_FACE] == raw.decode() and conversion.to_json(made, 4096, "m")[0] == raw
    other = tokenizer_from_gguf(made, 4096, "m")
    sound = [text for text in golden("strings") if not any(0xD800 <= ord(character) < 0xE000 for character in text)]
    assert sum(other.encode(text) != source.encode(text) for text in sound) <= 5 < 900 < len(sound)


def simple(pre: Any, normalizer: Any = None) -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("1", "2")]
    vocabulary = {text: i for i, text in enumerate([*alphabet, *map("".join, merges), "<eos>"])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer, library.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        library.normalizer = normalizer
    library.add_special_tokens(["<eos>"])
    library.add_tokens(["ab!"])
    return library.to_str().encode()


def test_missing_ids_special_and_added_tokens() -> None:
    raw = simple(pre_tokenizers.ByteLevel(add_prefix_space=False))
    source, ends = conversion.read(raw, 300, {"eos_token_id": [259, 5]}, {})
    made, note = conversion.to_gguf(source, raw, {"pad_token": {"content": "<eos>"}}, ends, "m")
    assert note is None
    assert made["tokenizer.ggml.token_type"][[0, 259, 260, 299]].tolist() == [1, 3, 4, 5]
    assert len(made["tokenizer.ggml.tokens"]) == 300 and made["tokenizer.ggml.tokens"][299] == "[PAD299]"
    assert (made["tokenizer.ggml.eos_token_id"], made["tokenizer.ggml.eot_token_id"], made["tokenizer.ggml.padding_token_id"]) == (
        259,
        5,
        259,
    )
    assert made["tokenizer.ggml.pre"] == "gpt-2" and "<|im_end|>" in END_TEXTS
    assert tokenizer_from_gguf(made, 300, "m").encode("x ab! y") == source.encode("x ab! y")


@pytest.mark.parametrize(
    ("pre", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
        (pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]), None),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(pre: Any, normalizer: Any) -> None:
    raw = simple(pre, normalizer)
    with pytest.raises(UnsupportedModelError, match=r"none of GGUF's kinds of tokenizers gives the ids that this tokenizer.json gives"):
        conversion.to_gguf(Tokenizer.from_json(raw, 300), raw, {}, [], "m")


def test_another_model_of_tokenizer_is_refused() -> None:
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).to_str().encode()
    with pytest.raises(UnsupportedModelError, match="the tokenizer is WordLevel; to GGUF this build converts BPE only"):
        conversion.to_gguf(Tokenizer.from_json(raw, 2), raw, {}, [], "m")


def test_more_ends_than_gguf_names_are_refused() -> None:
    raw = simple(pre_tokenizers.ByteLevel(add_prefix_space=False))
    source, ends = conversion.read(raw, 300, {"eos_token_id": [259, 5, 6, 7]}, {})
    with pytest.raises(UnsupportedModelError, match=r"4 ids end a text, and GGUF names three: \[7\] would not; keep the Hugging Face"):
        conversion.to_gguf(source, raw, {}, ends, "m")


@pytest.mark.parametrize("key", ["tokens", "eos_token_id", "chat_template", "merges", "token_type"])
def test_a_spoilt_tokenizer_in_gguf_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    written = gguf.metadata_of

    def spoilt(*args: Any) -> dict[str, Any]:
        keys = written(*args)
        name = f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}"
        value = keys[name]
        if isinstance(value, int):
            changed: Any = value + 1
        else:
            changed = value[::-1] if key != "tokens" else [*value[:40], value[41], value[40], *value[42:]]
        return keys | {name: changed}

    source = packed_models.write(tmp_path / "source")
    monkeypatch.setattr(gguf, "metadata_of", spoilt)
    with pytest.raises(NotTheSameError, match=rf"tokenizer\.\S*{key} differs from what was to be written"):
        convert(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "chat_template", "generation_config", "config"])
def test_a_spoilt_text_in_a_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    written = bitnet.convert.write_synced
    changes = {
        "tokenizer": (b'"the"', b'"eht"'), "tokenizer_config": (b"<|begin|>", b"<|end|>"), "chat_template": (b"role", b"rule"),
        "generation_config": (b"1", b"2"), "config": (b'"eos_token_id": 1', b'"eos_token_id": 2'),
    }  # fmt: skip

    def spoilt(path: Path, content: bytes) -> None:
        changed = content.replace(*changes[name]) if path.stem == name else content
        assert changed != content or path.stem != name
        written(path, changed)

    source = packed_models.write(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    monkeypatch.setattr(bitnet.convert, "write_synced", spoilt)
    with pytest.raises(NotTheSameError, match=rf"{name} differs from what was to be written"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.gguf"])
def test_the_ends_of_a_gguf_stay_with_another_tokenizer(tmp_path: Path, target: str) -> None:
    source = packed_models.write(tmp_path / "source")
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / target, tokenizer_json=source / "tokenizer.json")
    found = open_checkpoint(tmp_path / target)
    assert conversion.ends_of(found, 262) == conversion.ends_of(open_checkpoint(source), 262) == [1]
