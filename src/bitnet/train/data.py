"""From text files to training windows.

A corpus file is UTF-8 text whose documents are separated by a line `<|endoftext|>`. Each document is encoded on its own and
preceded by the end-of-text token, so that a model learns both to begin a document after it and to end one with it.
Windows are cut at random places, or, with probability `snap`, at the start of the document if it is near.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"

# Some story collections lost their separators: a story then begins on the line right after another paragraph, without
# the empty line that parts paragraphs, and with one of the genre's openings.
_STORY_START = re.compile(r"(?<=[^\n])\n(?=(?:Once upon a time|Once there|One day|One sunny|There once|There was|Once,|In a ))")


@dataclass
class Source:
    """One corpus file as tokens."""

    name: str
    tokens: np.ndarray  # uint16 [tokens]
    starts: np.ndarray  # int64 [documents], index of each document's end-of-text token
    text_bytes: int


def documents(text: str) -> list[str]:
    """Split a corpus into its documents; a file without separators is split at story openings."""
    parts = re.split(r"(?m)^<\|endoftext\|>\n?", text)
    if len(parts) == 1:
        parts = _STORY_START.split(text)
    return [p.strip("\n") for p in parts if p.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens; id 0 is end-of-text, which also begins every encoded text."""
    tok = Tokenizer(models.BPE())
    digits_apart = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits_apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if tok.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields a vocabulary of {tok.get_vocab_size()} tokens, {vocab_size} were asked for")
    tok.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    return tok


def encode(name: str, text: str, tokenizer: Tokenizer) -> Source:
    """Encode every document of `text`; each starts with the end-of-text token that the tokenizer adds."""
    encoded = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(documents(text))]
    starts = np.concatenate([[0], np.cumsum([len(e) for e in encoded])[:-1]])
    return Source(name, np.concatenate(encoded), starts.astype(np.int64), len(text.encode()))


def sample_windows(
    sources: list[Source], weights: np.ndarray, batch: int, length: int, snap: float, rng: np.random.Generator
) -> np.ndarray:
    """int64 [batch, length] windows; source i is drawn with probability weights[i]."""
    out = np.empty((batch, length), np.int64)
    for row, which in enumerate(rng.choice(len(sources), size=batch, p=weights)):
        source = sources[which]
        at = int(rng.integers(0, len(source.tokens) - length))
        if rng.random() < snap:
            start = int(source.starts[np.searchsorted(source.starts, at, side="right") - 1])
            if at - start < 2 * length:  # a book's beginning is not worth more than its middle
                at = min(start, len(source.tokens) - length)
        out[row] = source.tokens[at : at + length]
    return out


def read_sources(folder: Path, names: list[str]) -> dict[str, str]:
    """The texts of the recipe's files; a missing one is an error that names it."""
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: the recipe's text files are not there: {', '.join(missing)}")
    return {n: (folder / n).read_text(encoding="utf-8") for n in names}
