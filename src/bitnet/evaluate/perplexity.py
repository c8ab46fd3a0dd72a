"""Perplexity, bits per byte and next-token accuracy of a model on a text.

The text is encoded once, without BOS, and cut into windows that do not overlap: each window is [BOS] and up to context - 1 tokens, so
every token of the text is predicted exactly once, from at most context - 1 tokens before it. A tokenizer that adds no BOS leaves
nothing to predict a window's first token from: that token is not predicted, and its bytes are not counted.

    perplexity    = exp(nll / tokens)                     nll = -sum of ln p(token), natural logarithm
    bits_per_byte = nll / ln 2 / bytes of the text        comparable between tokenizers, as perplexity is not
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError, FormatError, UsageError

if TYPE_CHECKING:
    from bitnet.transformer import TernaryTransformer

LARGEST_EXPONENT = 709.0  # exp of more is no float64
BLOCK_ROWS = 32  # logit rows taken to float64 at a time
OTHERS = (".jsonl", ".npy", ".tsv")  # what `bitnet train` reads that is no plain text
Progress = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class Score:
    """What a model made of one text."""

    tokens: int  # predicted
    bytes: int  # of the text that the predicted tokens stand for
    perplexity: float
    bits_per_byte: float
    next_token_accuracy: float  # share of tokens that had the largest logit
    mean_probability: float  # that the tokens had: the share that sampling would get right


def read_text(path: Path, max_bytes: int | None = None, option: str = "--data") -> str:
    """The file's text without a byte order mark, or of its first `max_bytes` as many whole characters as fit. `option`: what named it.

    Raises `UsageError` if it cannot be read, is of another kind by its name, or `max_bytes` < 1, `FormatError` if it is empty or not UTF-8.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"max_bytes is {max_bytes}; expected a whole number >= 1")
    if path.suffix.lower() in OTHERS:
        raise UsageError(f"{path}: is no plain text, which {option} takes; write its documents into a .txt")
    try:
        with path.open("rb") as file:
            whole = max_bytes is None or max_bytes >= os.fstat(file.fileno()).st_size > 0
            data = file.read() if whole or max_bytes is None else file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as text: {error.strerror}; {option} takes text files") from None
    if max_bytes is not None and len(data) > max_bytes:
        cut = max_bytes
        while cut > 0 and data[cut] & 0xC0 == 0x80:  # data[cut] continues a character
            cut -= 1
        data = data[:cut]
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; expected a UTF-8 text file") from None
    if not text:
        raise FormatError(f"{path}: no text in {'it' if max_bytes is None else f'its first {max_bytes} bytes'}; expected a UTF-8 text file")
    return text


def score_text(model: TernaryTransformer, text: str, progress: Progress | None = None) -> Score:
    """Scores `text`. Raises `UsageError` if no token of it can be predicted, `BitNetError` if a logit is not finite."""
    ids, ends = model.tokenizer.encode_with_ends(text)
    bos = model.tokenizer.prefix_ids
    context = model.engine.config.max_context
    skipped = 0 if bos else 1
    width = context - len(bos)
    if width <= skipped:
        raise UsageError(f"the model's context of {context} tokens leaves nothing to predict")
    sizes = [] if bos else token_bytes(text, ends)
    sums, tokens, counted = np.zeros(3), 0, len(text.encode())
    for at in range(0, len(ids), width):
        window = ids[at : at + width]
        sums += score_window(model, bos, window)
        tokens += len(window) - skipped
        counted -= sum(sizes[at : at + skipped])
        if progress:
            progress(at + len(window), len(ids))
    if tokens <= 0 or counted <= 0:
        raise UsageError(f"a text of {len(ids)} tokens leaves nothing to predict; give a longer one")
    mean, accuracy, probability = (sums / tokens).tolist()
    return Score(tokens, counted, math.exp(min(mean, LARGEST_EXPONENT)), float(sums[0]) / math.log(2) / counted, accuracy, probability)


def score_window(model: TernaryTransformer, bos: list[int], window: list[int]) -> tuple[float, int, float]:
    """Over the predicted tokens of one window: the sum of -ln p, how many had the largest logit, and the sum of p."""
    inputs = [*bos, *window]
    first = max(len(bos), 1)  # index into inputs of the first predicted token
    if len(inputs) <= first:
        return 0.0, 0, 0.0
    nll, right, probability = 0.0, 0, 0.0
    at = 0
    for rows in model.iter_logits(inputs[:-1]):  # row i predicts inputs[i + 1]
        start = max(first - 1 - at, 0)
        targets = np.asarray(inputs[at + start + 1 : at + len(rows) + 1], dtype=np.intp)
        for low in range(0, len(targets), BLOCK_ROWS):
            part = targets[low : low + BLOCK_ROWS]
            block = rows[start + low : start + low + len(part)]
            chosen = log_probabilities(block, part)
            nll, probability = nll - float(chosen.sum()), probability + float(np.exp(chosen).sum())
            right += int((block.argmax(axis=1) == part).sum())
        at += len(rows)
    return nll, right, probability


def log_probabilities(logits: NDArray[np.float32], targets: NDArray[np.intp]) -> NDArray[np.float64]:
    """ln softmax(logits)[i, targets[i]] in float64. `logits` float32 [n, vocab], `targets` [n]. Raises `BitNetError` if not finite."""
    z = logits.astype(np.float64)
    top = z.max(axis=1, keepdims=True)
    chosen: NDArray[np.float64] = z[np.arange(len(targets)), targets] - top[:, 0] - np.log(np.exp(z - top).sum(axis=1))
    if not np.isfinite(chosen).all():
        raise BitNetError("the model gave logits that are not finite; the weights are damaged or do not fit this model")
    return chosen


def token_bytes(text: str, ends: list[int]) -> list[int]:
    """UTF-8 bytes that each token adds to the text, from the characters consumed up to its end; the sum is that up to the last token.

    Of the tokens that share one character, the first counts all of its bytes.
    """
    lengths = np.fromiter((len(c.encode()) for c in text), dtype=np.int64, count=len(text))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    reached = np.maximum.accumulate(offsets[np.asarray(ends, dtype=np.intp)]) if ends else np.zeros(0, np.int64)
    sizes: list[int] = np.diff(reached, prepend=0).tolist()
    return sizes
