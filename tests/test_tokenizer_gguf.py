"""Tokenizers from GGUF metadata: llama.cpp's ids, texts that come back whole, and one line for whatever contradicts itself."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import gguf
from bitnet.tokenizer import Tokenizer, replace_surrogates
from bitnet.tokenizer.gguf import tokenizer_from_gguf
from bitnet.tokenizer.scored_merges import SPACE

GOLDEN = Path(__file__).parent / "golden"
BYTE_LEVEL = ["gpt-2", "llama-bpe", "qwen2", "default"]
KINDS = [*BYTE_LEVEL, "llama", "llama-ties"]
SIZE = 2000  # of the model's vocabulary; the golden ones have about 1,800 tokens


def golden(name: str) -> Any:
    return json.loads(gzip.decompress((GOLDEN / f"tokenizer_{name}.json.gz").read_bytes()))


def as_gguf(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` as the reader of GGUF files gives them: by full key, numbers in numpy arrays."""
    dtypes = {"scores": np.float32, "token_type": np.int32}
    return {f"tokenizer.ggml.{name}": np.array(value, dtypes[name]) if name in dtypes else value for name, value in fields.items()}


STRINGS: list[str] = golden("strings")
ANSWERS = {kind: golden(kind) for kind in KINDS}


def load(kind: str, **changes: Any) -> Tokenizer:
    fields = {name: value for name, value in (ANSWERS[kind]["metadata"] | changes).items() if value is not None}
    return tokenizer_from_gguf(as_gguf(fields), SIZE, "model.gguf")


TOKENIZERS = {kind: load(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_llama_cpp(kind: str) -> None:
    tokenizer, answers = TOKENIZERS[kind], ANSWERS[kind]
    assert len(STRINGS) == len(answers["ids"]) == len(answers["parsed"]) == 1000
    for text, ids, parsed in zip(STRINGS, answers["ids"], answers["parsed"], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, ascii(text)
        assert tokenizer.encode(text, add_special=False, parse_special=True) == parsed, ascii(text)
    assert sum(ids != parsed for ids, parsed in zip(answers["ids"], answers["parsed"], strict=True)) > 20


def wrong(kind: str, **changes: Any) -> int:
    """How many of the 1,000 strings get other ids than llama.cpp's when the metadata are changed."""
    tokenizer = load(kind, **changes)
    return sum(tokenizer.encode(text, add_special=False) != ids for text, ids in zip(STRINGS, ANSWERS[kind]["ids"], strict=True))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("other", BYTE_LEVEL)
def test_the_wrong_words_are_noticed(kind: str, other: str) -> None:
    assert (wrong(kind, pre=other) == 0) == (kind == other)


def test_wrong_rules_are_noticed() -> None:
    metadata = ANSWERS["llama"]["metadata"]
    assert wrong("llama", add_space_prefix=False) > 500
    assert wrong("llama", scores=[0.0] * len(metadata["scores"])) > 100
    assert wrong("llama", token_type=[1 if kind == 4 else kind for kind in metadata["token_type"]]) > 20
    assert wrong("qwen2", merges=ANSWERS["qwen2"]["metadata"]["merges"][::-1]) > 100
    unmerged = load("llama-bpe", pre="dbrx")  # the same words, without ignore_merges
    assert unmerged.encode(" unmergeable") != TOKENIZERS["llama-bpe"].encode(" unmergeable", add_special=False)
    by_id = [score - token / 1000 for token, score in enumerate(ANSWERS["llama-ties"]["metadata"]["scores"])]  # equals: by id, not by place
    assert wrong("llama-ties", scores=by_id) > 10


def test_gemma(gemma_path: Path, shared_golden: Path) -> None:
    """llama.cpp's ids for a real vocabulary of 262,144 tokens."""
    answers = json.loads((shared_golden / "gemma-3-270m-q4_k_m.llama.cpp.json").read_text(encoding="utf-8"))["tokenization"]
    start = time.monotonic()
    tokenizer = tokenizer_from_gguf(gguf.read(gemma_path).metadata, 262_144, "gemma.gguf")
    assert time.monotonic() - start < 30  # a hang; it takes one second
    assert len(answers) == 1000
    for answer in answers:
        assert tokenizer.encode(answer["text"], add_special=False) == answer["ids"], ascii(answer["text"])
        assert tokenizer.decode(answer["ids"]) == answer["text"]
    assert tokenizer.prefix_ids == [2] and {1, 106} <= tokenizer.eos_ids
    assert tokenizer.encode("<start_of_turn>", add_special=False, parse_special=True) == [105]
    assert 105 not in tokenizer.encode("<start_of_turn>")


def merged_naively(text: str, ids: dict[str, int], scores: list[float]) -> list[str]:
    """The definition: as long as two neighbours together are a token, join the ones of the highest score, the leftmost of equals."""
    symbols = list(text)
    while True:
        joins = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not joins:
            return symbols
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab▁é", min_size=2, max_size=5), max_size=25, unique=True),
    st.lists(st.integers(-4, 0), min_size=25, max_size=25),
    st.text("ab é", max_size=60),
)
def test_merges_equal_their_definition(words: list[str], scores: list[int], text: str) -> None:
    """Small vocabularies with many equal scores, and tokens that overlap themselves."""
    tokens = ["<unk>", *BYTES, "a", "b", "▁", "é", *words]
    all_scores = [0.0] * (len(tokens) - len(words)) + [float(score) for score in scores[: len(words)]]
    types = [2] + [6] * 256 + [1] * (len(tokens) - 257)
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": all_scores,
        "token_type": types,
        "add_space_prefix": False,
        "add_bos_token": False,
    }
    tokenizer = tokenizer_from_gguf(as_gguf(fields), 400, "small.gguf")
    mergeable = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    expected = [mergeable[symbol] for symbol in merged_naively(text.replace(" ", SPACE), mergeable, all_scores)]
    assert tokenizer.encode(text, add_special=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for text in STRINGS:
        whole = replace_surrogates(text)
        if kind.startswith("llama") and SPACE in whole:
            continue  # SentencePiece's own sign for a space cannot be told from one
        ids = tokenizer.encode(text, add_special=False)
        if kind == "llama" and any(special in whole for special in ("<tool>", "</tool>", "  ", "\n\n\n")):
            continue  # after a special token, too, a space is put before the text, and decoding cannot tell
        assert tokenizer.decode(ids) == whole, ascii(text)
        stream = tokenizer.stream()
        assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == whole
        same_ids, ends = tokenizer.encode_with_ends(text)
        assert same_ids == ids and ends == sorted(ends) and (not ends or ends[-1] == len(whole))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, SIZE - 1), max_size=24), st.sampled_from(["", "a", " the <tool>", "文"]))
def test_a_stream_equals_the_whole_for_any_ids(kind: str, ids: list[int], prompt: str) -> None:
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode(prompt)
    stream = tokenizer.stream(before)
    pieces = [*(stream.push(token) for token in ids), stream.flush()]
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode(before + ids)


def test_special_tokens_are_parsed_only_when_asked() -> None:
    for kind in KINDS:
        tokenizer, tokens = TOKENIZERS[kind], ANSWERS[kind]["metadata"]["tokens"]
        control, defined = tokens.index("<|eot_id|>"), tokens.index("<tool>")
        ids = tokenizer.encode("a<|eot_id|><tool>")
        assert control not in ids and ids[-1] == defined
        assert control in tokenizer.encode("a<|eot_id|><tool>", parse_special=True)
        assert tokenizer.decode([defined, control]) == "<tool>" and tokenizer.decode([control], skip_special=False) == "<|eot_id|>"
        assert "<|eot_id|>" in tokenizer.special_tokens and "<tool>" not in tokenizer.special_tokens


def test_a_control_token_cannot_grow_out_of_text() -> None:
    """Where the pieces of a control token merge, llama.cpp gives the control token."""
    tokens = ["<unk>", "<", "s", ">", "<s", "<s>", *BYTES, "<0", "x4", "1>", "x41>", "<0x41>!"]
    types = [2, 1, 1, 1, 1, 3, *[6] * 256, *[1] * 5]
    fields = {"model": "llama", "tokens": tokens, "scores": [0.0] * len(tokens), "token_type": types, "add_bos_token": False}
    tokenizer = tokenizer_from_gguf(as_gguf(fields | {"add_space_prefix": False}), 300, "small.gguf")
    assert tokenizer.encode("<s>") == [4, 3]
    assert tokens.index("<0x41>") not in tokenizer.encode("<0x41>")
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_beginnings_and_ends() -> None:
    bos = ANSWERS["llama-bpe"]["metadata"]["bos_token_id"]
    assert TOKENIZERS["llama-bpe"].prefix_ids == [bos] and TOKENIZERS["llama-bpe"].encode("") == [bos]
    assert TOKENIZERS["qwen2"].prefix_ids == [] and load("qwen2", add_bos_token=True).encode("") == [bos]
    assert load("llama-bpe", add_bos_token=False).prefix_ids == []
    assert TOKENIZERS["llama"].prefix_ids == [1] and load("llama", bos_token_id=None).prefix_ids == [1]
    assert load("llama", add_eos_token=True).encode("a") == TOKENIZERS["llama"].encode("a")
    named = ANSWERS["llama"]["metadata"]["tokens"].index("<|eot_id|>")
    assert TOKENIZERS["llama"].eos_ids == {2, named}
    assert load("llama", eot_token_id=9, eom_token_id=10).eos_ids == {2, named, 9, 10}
    metadata = as_gguf(ANSWERS["llama"]["metadata"])
    assert tokenizer_from_gguf(metadata, SIZE, "model.gguf", eos_ids=[17]).eos_ids == {2, named, 17}


def test_user_text_in_one_thread_is_not_parsed_by_another_s_wish() -> None:
    tokenizer = TOKENIZERS["qwen2"]
    text, found = "a<|eot_id|>b " * 50, []
    expected = {parse: tokenizer.encode(text, parse_special=parse) for parse in (False, True)}

    def work(parse: bool) -> None:
        found.extend(tokenizer.encode(text, parse_special=parse) == expected[parse] for _ in range(100))

    threads = [threading.Thread(target=work, args=(parse,)) for parse in (False, True) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(found)


def test_a_long_text_of_one_word_takes_no_more_than_it_should() -> None:
    start = time.monotonic()
    for text in ("the" * 100_000, "e" * 300_000):
        assert TOKENIZERS["llama"].decode(TOKENIZERS["llama"].encode(text)) == text
    assert time.monotonic() - start < 60  # a hang; it takes two seconds


NAN = float("nan")
LLAMA, QWEN = ANSWERS["llama"]["metadata"], ANSWERS["qwen2"]["metadata"]
COUNT, WORDS = len(LLAMA["tokens"]), len(QWEN["tokens"])
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no tokens": ("llama", {"tokens": []}, "tokens has 0 tokens; expected 1 to 2000"),
    "tokens missing": ("llama", {"tokens": None}, "tokens is missing; expected an array of strings"),
    "tokens that are numbers": ("llama", {"tokens": np.arange(9)}, "expected an array of strings"),
    "a token that is a number": ("llama", {"tokens": [*LLAMA["tokens"][1:], 7]}, "expected an array of strings"),
    "a token that is bytes": ("llama", {"tokens": [*LLAMA["tokens"][1:], b"x"]}, "expected an array of strings"),
    "a token of 70,000 characters": ("llama", {"tokens": [*LLAMA["tokens"][1:], "x" * 70_000]}, "has 70000 characters"),
    "a token with a surrogate": ("llama", {"tokens": [*LLAMA["tokens"][1:], "x\udc80"]}, "surrogates not allowed"),
    "the same token twice": ("llama", {"tokens": [*LLAMA["tokens"][1:], LLAMA["tokens"][7]]}, "are both '"),
    "more tokens than the model has": ("llama", {"tokens": [f"t{i}" for i in range(2001)]}, "tokens has 2001 tokens; expected 1 to 2000"),
    "fewer scores": ("llama", {"scores": LLAMA["scores"][1:]}, f"expected an array of {COUNT} numbers, one for each token"),
    "more scores": ("llama", {"scores": [*LLAMA["scores"], 0.0]}, f"expected an array of {COUNT} numbers"),
    "no scores": ("llama", {"scores": None}, "scores is missing"),
    "scores that are no numbers": ("llama", {"scores": [NAN] * COUNT}, "token 0 has the score nan"),
    "infinite scores": ("llama", {"scores": [float("-inf")] * COUNT}, "token 0 has the score -inf"),
    "scores in rows": ("llama", {"scores": np.zeros((COUNT, 1))}, "numbers, one for each token"),
    "fewer types": ("llama", {"token_type": LLAMA["token_type"][1:]}, f"expected an array of {COUNT} integers"),
    "types of 7": ("llama", {"token_type": [7] * COUNT}, "token 0 has type 7; expected 1 (normal) to 6 (byte)"),
    "negative types": ("llama", {"token_type": [-1] * COUNT}, "token 0 has type -1"),
    "neither bytes nor unknown": (
        "llama",
        {"tokens": [f"t{i}" for i in range(COUNT)], "token_type": [1] * COUNT, "unknown_token_id": None},
        "neither the 256 tokens <0x00> to <0xFF> nor an unknown token",
    ),
    "a negative BOS": ("llama", {"bos_token_id": -1}, f"bos_token_id is int '-1'; expected the id of a token, 0 to {COUNT - 1}"),
    "a huge EOS": ("llama", {"eos_token_id": 2**64 - 1}, "eos_token_id is int '18446744073709551615'"),
    "an EOT one too large": ("llama", {"eot_token_id": COUNT}, "eot_token_id is int"),
    "padding beyond": ("qwen2", {"padding_token_id": 2**32 - 1}, "padding_token_id is int '4294967295'"),
    "an id that is a word": ("llama", {"eos_token_id": "2"}, "eos_token_id is str '2'"),
    "an id that is true": ("llama", {"eos_token_id": True}, "eos_token_id is bool 'True'"),
    "an id that is a float": ("llama", {"bos_token_id": 1.0}, "bos_token_id is float '1.0'"),
    "a switch that is a word": ("llama", {"add_bos_token": "true"}, "add_bos_token is str 'true'; expected true or false"),
    "a prefix that is a number": ("llama", {"add_space_prefix": 1}, "add_space_prefix is int '1'; expected true or false"),
    "a model that is a number": ("llama", {"model": 3}, "model is int '3'; expected a string"),
    "a BOS to add, and none": ("llama-bpe", {"bos_token_id": None}, "bos_token_id is missing"),
    "a merge of unknown tokens": ("qwen2", {"merges": ["zz qq"]}, "Token `zz` out of vocabulary"),
    "a merge into an unknown token": ("qwen2", {"merges": ["Ġ é"]}, "out of vocabulary"),
    "a merge without space": ("qwen2", {"merges": ["th"]}, "the merge 'th' (tokenizer.ggml.merges) has no space"),
    "an empty merge": ("qwen2", {"merges": [""]}, "has no space"),
    "no merges": ("qwen2", {"merges": None}, "merges is missing; expected an array of strings"),
    "merges that are numbers": ("qwen2", {"merges": [1, 2]}, "expected an array of strings"),
    "a pre that is a number": ("qwen2", {"pre": 5}, "pre is int '5'; expected a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_contradict_themselves(name: str) -> None:
    kind, changes, message = BAD[name]
    with pytest.raises(FormatError) as error:
        load(kind, **changes)
    text = str(error.value)
    assert text.startswith("model.gguf: ") and message in text and "; expected" in text
    assert text.isprintable() and len(text) < 500


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "gemma4", "whisper\n" * 100])
def test_other_kinds_are_refused(model: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        load("llama", model=model)
    assert "supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE)" in str(error.value)
    assert str(error.value).isprintable()


def test_other_words_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"tokenizer.ggml.pre is 'tekken', which .* supported: default gpt-2 .*llama-bpe.*qwen2"
    ):
        load("qwen2", pre="tekken")


def test_an_empty_token_and_a_few_types_are_taken_as_llama_cpp_does() -> None:
    tokens = [*LLAMA["tokens"][:-1], ""]
    assert load("llama", tokens=tokens).decode([COUNT - 1]) == f"[EMPTY_{COUNT - 1}]"
    assert load("qwen2", token_type=None).encode("a<|begin|>") == TOKENIZERS["qwen2"].encode("a<|begin|>")
    assert load("qwen2", merges=np.empty(0)).encode("the") == [QWEN["tokens"].index(character) for character in "the"]
    assert len(load("qwen2")) == WORDS


def test_mutated_metadata_give_one_line() -> None:
    """Random wrong values in every field: a tokenizer or a FormatError, nothing else, and soon."""
    pick = random.Random(7)
    values = [
        None,
        -1,
        0,
        2**63,
        1.5,
        NAN,
        True,
        "",
        "x",
        [],
        ["a"],
        ["a", "a"],
        [""],
        [1],
        b"x",
        np.zeros(3),
        np.zeros(0),
        np.array(5),
        {},
        [[]],
    ]
    fields = [
        "model",
        "pre",
        "tokens",
        "scores",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "add_space_prefix",
    ]
    small: dict[str, dict[str, Any]] = {
        "llama": {
            "model": "llama",
            "tokens": ["<unk>", *BYTES, "a"],
            "scores": np.zeros(258),
            "token_type": np.array([2] + [6] * 256 + [1]),
        },
        "gpt2": {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": np.ones(3, int)},
    }
    outcomes = {"read": 0, "refused": 0}
    for _ in range(2000):
        metadata = dict(small[pick.choice(["llama", "gpt2"])])
        for name in pick.sample(fields, pick.randrange(1, 3)):
            metadata[name] = pick.choice(values)
        try:
            tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, 300, "m")
            tokenizer.decode(tokenizer.encode("ab é", parse_special=True))
            outcomes["read"] += 1
        except (FormatError, UnsupportedModelError) as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
