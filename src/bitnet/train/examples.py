"""Examples with a beginning and an end, of which only answers are learned: conversations, and rows of a table.

Conversations are .jsonl: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}, or
{"prompt": "...", "completion": "..."}. A prompt is encoded exactly as `bitnet run --chat` will encode it, by the model's own chat
template; a model without one gets TEMPLATE, which is exported with it.
Tables are .tsv as GLUE has them: a header, a row a line, no quoting. The text is the columns by their names, the answer the label as a
word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.chat import ChatTemplate, encode_chat
from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.tokenizer import Tokenizer
from bitnet.train.data import json_line, utf8

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_LABELS = ("label", "gold_label", "Quality", "is_duplicate")
_TEXTS = (
    "sentence", "sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis", "#1 String", "#2 String", "text",
)  # fmt: skip
_COLA = ("source", "label", "star", "sentence")  # CoLA's files have no header
MOST_LABELS = 50
Row = tuple[list[int], list[bool], bool]  # ids, which of them are to be predicted, True: it begins an example


def conversations(path: Path, tokenizer: Tokenizer, template: ChatTemplate, end: int | None, context: int | None = None) -> Iterator[Row]:
    """The file's conversations; one whose later prompts do not continue the tokens before them becomes several examples.

    Of one that is longer than `context` only what fits is learned; one with no answer in that is left out. A warning counts both.
    Raises `FormatError` where nothing is left.
    """
    most = None if context is None else context + 1  # the last token is a target only
    cut = left_out = count = 0
    for ids, asked, begins in _conversations(path, tokenizer, template, end):
        count += 1
        if any(asked[1:most]):
            cut += most is not None and len(ids) > most
            yield ids[:most], asked[:most], begins
        else:
            left_out += 1
    if count and left_out == count:
        raise FormatError(f"{path}: no answer begins within the context of {context} tokens; raise context, or shorten the conversations")
    if cut or left_out:
        warnings.warn(
            f"{path}: of {count} conversations {cut + left_out} are longer than the context of {context} tokens: {cut} are cut, {left_out}"
            " have no answer within it and are left out",
            stacklevel=2,
        )


def _conversations(path: Path, tokenizer: Tokenizer, template: ChatTemplate, end: int | None) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file, utf8(path):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            messages = _messages(json_line(line, path, number), path, number)
            ids: list[int] = []
            asked: list[bool] = []
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                try:
                    prompt = encode_chat(tokenizer, template, messages[:i], True)
                    before, after = (template.render(messages[: i + last], not last) for last in (0, 1))
                except BitNetError as error:
                    first = "" if i else "the assistant speaks first, which not every template allows; "
                    raise FormatError(f"{path}: line {number}: {first}{error}") from None
                if prompt[: len(ids)] != ids:
                    yield ids, asked, True
                    ids, asked = [], []
                if after.startswith(before):
                    text = after[len(before) :]
                else:  # the prompt holds more than the template writes of an answer that is over, such as empty <think></think>
                    text = (" " if before[-1:].isalnum() or before.endswith(":") else "") + message["content"]
                answer = tokenizer.encode(text, add_special=False, parse_special=True)
                if end is not None and not set(answer) & ({end} | tokenizer._special_ids):
                    answer.append(end)
                asked += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
                ids = prompt + answer
            yield ids, asked, True


def _messages(row: Mapping[str, Any], path: Path, number: int) -> list[dict[str, Any]]:
    found = row.get("messages")
    if found is None and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        found = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    good = isinstance(found, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
    )
    if not good or not isinstance(found, list):
        raise FormatError(
            f'{path}: line {number}: expected {{"messages": [{{"role": "user", "content": "..."}}, ...]}}, or prompt and completion'
        )
    if not any(m["role"] == "assistant" for m in found):
        raise FormatError(f"{path}: line {number}: no message of the role assistant; there is nothing to learn in it")
    return found


@dataclass(frozen=True)
class Table:
    """Rows of a .tsv: prompts, and what follows each."""

    prompts: list[str]
    answers: list[str]  # words
    words: list[str]  # all that there are
    columns: list[str]  # that make the prompts

    @staticmethod
    def read(path: Path, labels: Mapping[str, str] | None, columns: Sequence[str] | None, words: Sequence[str] | None = None) -> Table:
        """Raises `FormatError` for a file without a column of labels, of texts, or with more bad rows than one of a hundred."""
        with utf8(path):
            lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")
        header = lines[0].split("\t")
        if not set(_LABELS) & set(header) and len(header) == len(_COLA) and header[1] in ("0", "1"):
            header, lines = list(_COLA), ["", *lines]
        label = next((name for name in _LABELS if name in header), None)
        if label is None and "score" in header:
            raise FormatError(f"{path}: has scores (a regression, as STS-B is), no labels; a classification learns which label is right")
        if label is None:
            raise FormatError(f"{path}: the first line has no column {', '.join(_LABELS)}; expected tabs between names of columns")
        texts = list(columns or [name for name in header if name in _TEXTS])
        missing = [name for name in texts if name not in header]
        if missing or not texts:
            raise FormatError(f"{path}: has no column {missing[0] if missing else ' or '.join(_TEXTS)}; it has {', '.join(header)}")
        if label in texts:
            raise UsageError(f"{path}: columns name {label}, which is what shall be learned; leave it out")
        rows = [row for row in (line.split("\t") for line in lines[1:]) if len(row) == len(header)]
        if len(lines) == 1:
            raise FormatError(f"{path}: holds a header and no rows; expected an example a line")
        if len(rows) < 0.99 * (len(lines) - 1):
            raise FormatError(
                f"{path}: {len(lines) - 1 - len(rows)} of {len(lines) - 1} rows have not the {len(header)} columns of the header"
            )
        if len(rows) < len(lines) - 1:
            warnings.warn(f"{path}: {len(lines) - 1 - len(rows)} rows without {len(header)} columns are left out", stacklevel=2)
        found = [row[header.index(label)] for row in rows]
        empty = next((i for i, value in enumerate(found, 1) if not value.strip()), None)
        if empty is not None and not labels:
            raise FormatError(f"{path}: row {empty} has an empty label; name it, or remove the row")
        unknown = sorted(set(found) - set(labels)) if labels else []
        if unknown:
            raise UsageError(f"{path}: label {unknown[0]!r} is none of the recipe's labels ({', '.join(labels or ())})")
        answers = [labels[value] if labels else value for value in found]
        every = list(words or dict.fromkeys(labels.values() if labels else sorted(set(answers))))
        if len(every) > MOST_LABELS:
            raise UsageError(
                f"{path}: {len(every)} different labels; a classification has at most {MOST_LABELS} (numbers to fit are no labels)"
            )
        strange = set(answers) - set(every)
        if strange:
            raise UsageError(f"{path}: label {min(strange)!r} did not occur in the training rows ({', '.join(every)})")
        prompts = ["".join(f"{name}: {row[header.index(name)]}\n" for name in texts) + "label:" for row in rows]
        return Table(prompts, answers, every, texts)

    def rows(self, tokenizer: Tokenizer, begin: list[int], end: int | None, context: int) -> Iterator[Row]:
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            asked = _asked(tokenizer, answer, end)
            room = context - len(asked) - len(begin)
            if room < 1:
                raise UsageError(
                    f"context is {context}; the label {answer!r} alone takes {len(asked)} tokens, beside the text: raise context"
                )
            given = _given(tokenizer, prompt, begin, room)
            yield given + asked, [False] * len(given) + [True] * len(asked), True


def _asked(tokenizer: Tokenizer, word: str, end: int | None) -> list[int]:
    """A label's tokens and the end: without it a word that begins another one would always be the likelier of the two."""
    return [*tokenizer.encode(f" {word}", add_special=False), *([] if end is None else [end])]


def _given(tokenizer: Tokenizer, prompt: str, begin: list[int], room: int) -> list[int]:
    """A prompt's tokens, of a long one the last `room`."""
    return [*begin, *tokenizer.encode(prompt, add_special=False)[-room:]]


def accuracy(model: Any, table: Table, begin: list[int], end: int | None, context: int, progress: Any = None) -> tuple[int, int]:
    """(rows whose word is the likeliest of all words, rows), by `model`, a TernaryTransformer, trained with this context."""
    import numpy as np

    words = {word: _asked(model.tokenizer, word, end) for word in table.words}
    room, right = max(1, context - len(begin) - max(map(len, words.values()))), 0
    for done, (prompt, answer) in enumerate(zip(table.prompts, table.answers, strict=True), 1):
        given = _given(model.tokenizer, prompt, begin, room)
        scores = {}
        for word, ids in words.items():
            logits = model.logits([*given, *ids])[len(given) - 1 : -1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=1))
            scores[word] = float(chosen.sum())
        right += max(scores, key=lambda word: scores[word]) == answer
        if progress is not None:
            progress(done, len(table.prompts))
    return right, len(table.prompts)
