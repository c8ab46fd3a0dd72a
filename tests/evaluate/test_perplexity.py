"""Perplexity against a definition written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.evaluate.perplexity import log_probabilities, read_text, score_text, token_bytes
from bitnet.tokenizer import Tokenizer
from bitnet.transformer import TernaryTransformer

VOCAB = 257
TEXT = "The fox \U0001f98a said: caf\u00e9? " * 9


class BigramEngine:
    """Logits depend on the last token and on the number of tokens before it, so that a wrong window shows."""

    def __init__(self, max_context: int):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_context=max_context)
        self.table = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)

    def row(self, token: int, position: int) -> np.ndarray:
        return self.table[token] * np.float32(1 + position % 3)

    def sequence(self, adapter: object = None) -> list[int]:
        return []

    def forward(self, batch: list[tuple[list[int], Sequence[int]]], all_logits: bool = False) -> np.ndarray:
        ((sequence, ids),) = batch
        assert all_logits and len(sequence) + len(ids) <= self.config.max_context
        rows = []
        for token in ids:
            rows.append(self.row(token, len(sequence)))
            sequence.append(token)
        return np.stack(rows)


def byte_tokenizer(bos: bool) -> Tokenizer:
    library = Library(
        models.BPE(vocab={"<s>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>"])
    if bos:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer.from_json(library.to_str().encode(), VOCAB)


def definition(engine: BigramEngine, ids: list[int], bos: bool) -> tuple[int, float, int, float]:
    """(tokens, nll, right, sum of p), one token at a time."""
    tokens, nll, right, probability = 0, 0.0, 0, 0.0
    width = engine.config.max_context - bos
    for at in range(0, len(ids), width):
        window = [0] * bos + ids[at : at + width]
        for i in range(1, len(window)):
            row = engine.row(window[i - 1], i - 1).astype(np.float64)
            nll += math.log(np.exp(row).sum()) - row[window[i]]
            right += int(row.argmax() == window[i])
            probability += np.exp(row[window[i]]) / np.exp(row).sum()
            tokens += 1
    return tokens, nll, right, probability


@pytest.mark.parametrize("context", [2, 7, 300, 600, 10_000])
@pytest.mark.parametrize("bos", [True, False])
def test_equals_the_definition(context: int, bos: bool) -> None:
    engine, tokenizer = BigramEngine(context), byte_tokenizer(bos)
    ids = tokenizer.encode(TEXT, add_special=False)
    assert len(ids) == len(TEXT.encode())
    done = []
    score = score_text(TernaryTransformer(engine, tokenizer), TEXT, lambda at, total: done.append((at, total)))  # type: ignore[arg-type]
    tokens, nll, right, probability = definition(engine, ids, bos)
    assert score.tokens == tokens
    assert score.next_token_accuracy == right / tokens
    # float64 sums of some hundred terms in another order
    assert score.mean_probability == pytest.approx(probability / tokens, rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / score.bytes, rel=1e-12)
    if bos:
        assert score.tokens == len(ids) and score.bytes == len(TEXT.encode())
    else:
        assert score.bytes < len(TEXT.encode())
    assert done[-1] == (len(ids), len(ids))


def test_token_bytes_add_up_and_a_split_character_counts_once() -> None:
    ids, ends = byte_tokenizer(True).encode_with_ends("a\U0001f98a\u00e9b")
    assert len(ids) == 8
    assert token_bytes("a\U0001f98a\u00e9b", ends) == [1, 4, 0, 0, 0, 2, 0, 1]


def test_log_probabilities_of_large_logits() -> None:
    found = log_probabilities(np.float32([[1e4, 0], [0, 0]]), np.array([0, 1]))
    assert found.tolist() == [0.0, -math.log(2)]
    with pytest.raises(BitNetError, match="not finite"):
        log_probabilities(np.float32([[math.nan, 0]]), np.array([0]))


def test_read_text_cuts_at_whole_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("a\u00e9\U0001f98a".encode())
    assert [read_text(path, n) for n in (1, 2, 3, 6, 7, 8)] == ["a", "a", "a\u00e9", "a\u00e9", "a\u00e9\U0001f98a", "a\u00e9\U0001f98a"]
    assert read_text(path) == "a\u00e9\U0001f98a"
    path.write_bytes(b"\xef\xbb\xbfab")
    assert [read_text(path, n) for n in (4, 5, None)] == ["a", "ab", "ab"]  # a byte order mark is no text


def test_bad_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    for data, limit, kind, message in (
        (b"", None, FormatError, "no text in it; expected a UTF-8 text file"),
        (b"\xef\xbb\xbf", None, FormatError, "no text in it; expected a UTF-8 text file"),
        (b"ab\xffc", None, FormatError, "byte 2 (0xff) is not UTF-8; expected a UTF-8 text file"),
        (b"ab\xc3", None, FormatError, "byte 2 (0xc3) is not UTF-8; expected a UTF-8 text file"),
        ("\u00e9".encode(), 1, FormatError, "no text in its first 1 bytes; expected a UTF-8 text file"),
        (b"ab", 0, UsageError, "max_bytes is 0; expected a whole number >= 1"),
    ):
        path.write_bytes(data)
        with pytest.raises(kind) as error:
            read_text(path, limit)
        assert str(error.value).removeprefix(f"{path}: ") == message
    with pytest.raises(UsageError, match=r"missing\.txt: cannot be read as text: No such file or directory; --data takes text files"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="cannot be read as text: Is a directory"):
        read_text(tmp_path)
    for name in ("rows.jsonl", "rows.TSV", "tokens.npy"):  # scored as it stands, the figure would be the punctuation's
        (tmp_path / name).write_text('{"text": "a"}')
        with pytest.raises(UsageError, match=rf"{name}: is no plain text, which --eval takes; write its documents into a \.txt"):
            read_text(tmp_path / name, option="--eval")


def test_a_text_too_short_to_predict_anything() -> None:
    with pytest.raises(UsageError, match="a text of 1 tokens leaves nothing to predict; give a longer one"):
        score_text(TernaryTransformer(BigramEngine(8), byte_tokenizer(False)), "a")  # type: ignore[arg-type]
