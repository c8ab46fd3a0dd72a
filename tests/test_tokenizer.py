"""The tokenizer: text stays text, hostile files become one line, and a stream equals the decoding of the whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bitnet.errors import FormatError
from bitnet.tokenizer import Tokenizer, eos_token_ids, replace_surrogates

BOS = "<|endoftext|>"


def byte_level() -> Library:
    """One token a byte, a BOS, and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0} | {c: i + 1 for i, c in enumerate(alphabet)} | {"th": 257, "the": 258}
    library = Library(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([BOS])
    library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return library


def sentencepiece() -> Library:
    """As llama 2: a space before every word, bytes for what is not in the vocabulary, the text's first space stripped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "\u2581a", "b", "\u2581the", "\u00e9"]
    library = Library(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def load(library: Library, vocab_size: int = 300) -> Tokenizer:
    return Tokenizer.from_json(library.to_str().encode(), vocab_size)


BYTE_LEVEL, SENTENCEPIECE = load(byte_level()), load(sentencepiece())


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int]) -> list[str]:
    stream = tokenizer.stream(context)
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_bos_is_added_and_a_typed_special_token_is_text() -> None:
    ids = BYTE_LEVEL.encode(f"the {BOS}")
    assert ids[:2] == [0, 258] and 0 not in ids[1:]
    assert BYTE_LEVEL.decode(ids) == f"the {BOS}"
    assert BYTE_LEVEL.encode("the", add_special=False) == [258]
    assert BYTE_LEVEL.prefix_ids == [0] and SENTENCEPIECE.prefix_ids == [1]
    assert len(BYTE_LEVEL) == 259


def test_without_post_processor_there_is_no_prefix() -> None:
    library = byte_level()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    assert load(library).prefix_ids == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_a_stream_equals_the_whole_for_any_text(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        ids = tokenizer.encode(text, add_special=False)
        pieces = streamed(tokenizer, ids, [])
        assert "".join(pieces) == tokenizer.decode(ids)
        if tokenizer is BYTE_LEVEL:
            assert "".join(pieces) == text
            assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=24), st.sampled_from(["", "a", "the a", "b the"]))
def test_a_stream_equals_the_whole_for_any_ids(ids: list[int], prompt: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):  # 264 and above are in the model but not in the tokenizer
        before = tokenizer.encode(prompt)
        assert tokenizer.decode(before) + "".join(streamed(tokenizer, ids, before)) == tokenizer.decode(before + ids)


def test_a_stream_after_a_prompt_keeps_the_leading_space() -> None:
    prompt, word = SENTENCEPIECE.encode("a"), SENTENCEPIECE.encode("the", add_special=False)
    assert streamed(SENTENCEPIECE, word, prompt) == [" the", ""]
    assert streamed(SENTENCEPIECE, word, []) == ["the", ""]


def test_an_emoji_comes_whole_and_an_unfinished_one_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("\U0001f98a!", add_special=False)
    assert streamed(BYTE_LEVEL, ids, []) == ["", "", "", "\U0001f98a", "!", ""]
    assert streamed(BYTE_LEVEL, ids[:3], []) == ["", "", "", "\ufffd"]


def test_byte_level_tokens_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decode, decoded = load(byte_level()), Tokenizer.decode, []
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, skip=True: decoded.append(list(ids)) or decode(self, ids, skip))
    ids = tokenizer.encode("the the\u00e9the", add_special=False)
    streamed(tokenizer, ids, [])
    decoded.clear()
    assert "".join(streamed(tokenizer, ids, [])) == "the the\u00e9the"
    assert [258] not in decoded and all(len(ids) <= 2 for ids in decoded)  # only the two bytes of \u00e9 need each other


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert replace_surrogates("a\udcffb") == "a\ufffdb"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\udcffb")) == "a\ufffdb"


def test_a_tokenizer_that_does_not_fit_the_vocabulary() -> None:
    with pytest.raises(FormatError) as error:
        load(byte_level(), vocab_size=100)
    assert str(error.value) == (
        "tokenizer does not fit the vocabulary: its largest token id is 258 (259 tokens), the model has 100 (ids 0 to 99); "
        "use the tokenizer.json that belongs to this model"
    )


def hostile(**changes: Any) -> bytes:
    return json.dumps({**json.loads(byte_level().to_str()), **changes}).encode()


BOS_OF_99999 = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [99999], "tokens": [BOS]}},
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "tokenizer.json cannot be used: EOF"),
        (b"{", "tokenizer.json cannot be used: EOF"),
        (b"[" * 100_000, "tokenizer.json cannot be used: "),
        (b'{"model":' + b"[" * 100_000, "tokenizer.json cannot be used: "),
        (b"null", "tokenizer.json cannot be used: invalid type: null"),
        (b"\xff{}", "tokenizer.json is not UTF-8 (byte 0)"),
        (b"{}", "tokenizer.json cannot be used: Model missing"),
        (
            hostile(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[], post_processor=None),
            "tokenizer.json has an empty vocabulary",
        ),
        (hostile(model={"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}), "tokenizer.json cannot be used: invalid value"),
        (
            hostile(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
            "tokenizer.json cannot be used: Token `x` out of vocabulary",
        ),
        (hostile(model={"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "?"}), "tokenizer.json cannot be used: WordLevel error"),
        (
            hostile(model={"type": "WordLevel", "vocab": {"a": 0, "?": 77777}, "unk_token": "?"}),
            "tokenizer does not fit the vocabulary: its largest token id is 77777",
        ),
        (hostile(post_processor=BOS_OF_99999), "tokenizer does not fit the vocabulary: its largest token id is 99999"),
        (hostile(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}), "Oniguruma error"),
        # The next two make the library panic, which is no Exception and prints a backtrace.
        (hostile(post_processor={**BOS_OF_99999, "special_tokens": {}}), "tokenizer.json cannot be used: "),
        (hostile(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "tokenizer.json cannot be used: "),
    ],
)
def test_hostile_files_become_one_line(data: bytes, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FormatError) as error:
        Tokenizer.from_json(data, 300)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 400
    assert capfd.readouterr().err == ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_load_or_become_one_line(data: st.DataObject) -> None:
    raw = bytearray(byte_level().to_str().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        Tokenizer.from_json(bytes(raw), 300).decode(range(300))
    except FormatError as error:
        assert "\n" not in str(error)


def test_truncation_padding_and_dropout_are_switched_off() -> None:
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=10)
    library.model.dropout = 1.0
    assert load(library).encode("the") == [0, 258]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, set()),
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"eos_token_id": 2}, {"eos_token_id": None}, {2}),
    ],
)
def test_eos(config: dict[str, Any], generation: dict[str, Any], expected: set[int]) -> None:
    assert eos_token_ids(config, generation, 10) == expected


@pytest.mark.parametrize("value", ["2", 10, -1, True, [1, "x"], {}, 1.5])
def test_eos_that_is_no_token(value: object) -> None:
    with pytest.raises(FormatError, match="expected token ids from 0 to 9"):
        eos_token_ids({"eos_token_id": value}, {}, 10)
