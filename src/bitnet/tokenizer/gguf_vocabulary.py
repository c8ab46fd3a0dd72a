"""The tokens that a GGUF file's metadata (`tokenizer.ggml.*`) describes, each field checked: texts, sorts, and which of them end a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet.errors import FormatError

MAX_TOKEN_CHARACTERS = 1 << 16  # real tokens have up to some hundreds
KEY = "tokenizer.ggml."

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# A text ends at these wherever a model has them, whatever the file says: many files name one end and mean several. llama.cpp's list.
END_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
))  # fmt: skip
# These are control tokens, too, even where a file calls them user-defined.
_INFILL_TEXTS = frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
))  # fmt: skip

CONTROL_TEXTS = END_TEXTS | _INFILL_TEXTS


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    ids: dict[str, int]
    control: np.ndarray[Any, np.dtype[np.bool_]]  # [tokens], and so below; unknown tokens too: both mean nothing in plain text
    user_defined: np.ndarray[Any, np.dtype[np.bool_]]
    mergeable: np.ndarray[Any, np.dtype[np.bool_]]  # plain text can become these
    unknown: int | None
    ends: set[int]

    @classmethod
    def read(cls, fields: Fields, vocab_size: int) -> Vocabulary:
        tokens = fields.tokens(vocab_size)
        ids = {text: token for token, text in enumerate(tokens)}
        if len(ids) != len(tokens):
            second = next(token for token, text in enumerate(tokens) if ids[text] != token)
            raise FormatError(
                f"{fields.where}: tokens {second} and {ids[tokens[second]]} are both {tokens[second][:40]!a}; expected each token once"
            )
        types = fields.numbers("token_type", len(tokens), "iu", default=NORMAL)
        if types.size and not (types.min() >= 0 and types.max() <= BYTE):
            wrong = int(np.flatnonzero((types < 0) | (types > BYTE))[0])
            raise FormatError(f"{fields.where}: token {wrong} has type {types[wrong]}; expected 1 (normal) to {BYTE} (byte)")
        named = {name: fields.token(f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
        ends = {token for name in ("eos", "eot", "eom") if (token := named[name]) is not None}
        ends |= {ids[text] for text in END_TEXTS if text in ids}
        control = (types == CONTROL) | (types == UNKNOWN)
        control[[ids[text] for text in CONTROL_TEXTS if text in ids]] = True  # files often say otherwise
        return cls(
            tokens, ids, control, (types == USER_DEFINED) & ~control, ~control & (types != BYTE), _unknown(named["unknown"], types), ends
        )


def _unknown(named: int | None, types: np.ndarray[Any, Any]) -> int | None:
    found = np.flatnonzero(types == UNKNOWN)
    return named if named is not None or not found.size else int(found[0])


class Fields:
    """The `tokenizer.ggml.*` of a file, each checked for its kind."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self._metadata, self.where = metadata, where

    def _wrong(self, name: str, expected: str) -> FormatError:
        value = self._metadata.get(KEY + name)
        found = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!a}"
        return FormatError(f"{self.where}: {KEY}{name} is {found}; expected {expected}")

    def string(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(KEY + name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._metadata.get(KEY + name, default)
        if not isinstance(value, bool | np.bool_):
            raise self._wrong(name, "true or false")
        return bool(value)

    def token(self, name: str, count: int, default: int | None = None) -> int | None:
        value = self._metadata.get(KEY + name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < count:
            raise self._wrong(name, f"the id of a token, 0 to {count - 1}")
        return int(value)

    def strings(self, name: str) -> list[str]:
        value = self._metadata.get(KEY + name)
        if isinstance(value, np.ndarray) and value.size == 0:
            value = []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "an array of strings")
        return value

    def numbers(self, name: str, count: int, kinds: str, default: int | None = None) -> np.ndarray[Any, Any]:
        value = self._metadata.get(KEY + name)
        if value is None and default is not None:
            return np.full(count, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.shape != (count,):
            raise self._wrong(name, f"an array of {count} {'integers' if kinds == 'iu' else 'numbers'}, one for each token")
        return value

    def tokens(self, vocab_size: int) -> list[str]:
        tokens = self.strings("tokens")
        if not 0 < len(tokens) <= vocab_size:
            raise FormatError(f"{self.where}: {KEY}tokens has {len(tokens)} tokens; expected 1 to {vocab_size}, the model's vocabulary")
        longest = max(range(len(tokens)), key=lambda token: len(tokens[token]))
        if len(tokens[longest]) > MAX_TOKEN_CHARACTERS:
            raise FormatError(
                f"{self.where}: token {longest} has {len(tokens[longest])} characters; expected at most {MAX_TOKEN_CHARACTERS}"
            )
        return [text or f"[EMPTY_{token}]" for token, text in enumerate(tokens)]
