"""Conversations -> prompts, by the model's own chat template (Jinja, as `transformers` renders it).

A template is untrusted code: it is rendered by minijinja in a process of its own, bounded in instructions, memory and seconds
(`sandbox.py`). A conversation is untrusted text: `encode_chat` keeps special tokens that somebody typed from becoming control tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.tokenizer import Tokenizer, replace_surrogates

MAX_TEMPLATE_CHARACTERS = 256 << 10  # the largest of real models have about 20,000
SECONDS = 1.0  # for one rendering, which takes about a millisecond,
SECONDS_A_BYTE = 1e-6  # and for what a long conversation adds
START_SECONDS = 30.0  # for the process to start, which takes about 0.03
READ_BYTES = 1 << 16  # of an answer at once

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's template; `where` names its file in errors. Safe to share between threads, which wait for each other, and with forks."""

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None, where: str = "chat template"):
        if not isinstance(source, str):
            raise FormatError(f"{where}: the chat template is of type {type(source).__name__}; expected a string")
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FormatError(f"{where}: the chat template has {len(source)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}")
        self.source, self.where = source, where
        self._special = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._locks: dict[int, threading.Lock] = {}  # by process: a thread that a fork does not have may hold the one that it inherits
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Any] | None = None, **variables: Any
    ) -> str:
        """The prompt. Lone surrogates in it become U+FFFD.

        Raises `UsageError` where the template itself refuses the conversation (in its own words) or the arguments are not JSON values, and
        `FormatError` where the template is broken or needs more than it may have.
        """
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None}
        request = {"source": self.source, "variables": self._special | given | variables}
        line = replace_surrogates(_json(request)).encode() + b"\n"
        answer = self._ask(line)
        if "refused" in answer:
            raise UsageError(f"{self.where}: the chat template refuses this conversation: {_line(answer['refused'])}")
        if "broken" in answer:
            raise FormatError(f"{self.where}: the chat template cannot be rendered: {_line(answer['broken'])}; expected a Jinja template")
        return answer["text"]

    def _ask(self, line: bytes) -> dict[str, str]:
        answer, here = None, os.getpid()
        with self._locks.setdefault(here, threading.Lock()):
            if self._process is not None and self._owner != here:
                _end(self._process)
                self._process = None
            try:
                if self._process is None:
                    self._process, self._owner = self._start(), here
                    if _exchange(self._process, b"", START_SECONDS) is None:
                        raise BitNetError(
                            f"the process that renders chat templates does not start ({sys.executable}); check the installation"
                        )
                answer = _exchange(self._process, line, SECONDS + len(line) * SECONDS_A_BYTE)
            finally:
                if answer is None and self._process is not None:  # it has died, or owes an answer that nobody waits for
                    _end(self._process)
                    self._process = None
        if answer is None:
            raise FormatError(
                f"{self.where}: the chat template takes more than {SECONDS:g} s or more memory than a template may have; use another"
            )
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        found = importlib.util.find_spec("minijinja")
        if found is None or found.origin is None:
            raise BitNetError("chat templates need the package minijinja, which is not installed; pip install minijinja")
        folder = str(Path(found.origin).parent.parent)
        script = str(Path(__file__).with_name("sandbox.py"))
        command = [sys.executable, "-I", "-S", script, folder]
        try:
            process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise BitNetError(f"the process that renders chat templates does not start ({_line(error)}); check the installation") from None
        weakref.finalize(self, _end, process)
        return process


def find_template(tokenizer_config: Mapping[str, Any], jinja_file: str | None, gguf_metadata: Mapping[str, Any]) -> str | None:
    """The source of a model's template: chat_template.jinja, else tokenizer_config.json's, else a GGUF's; None if there is none.

    An empty one is none.
    """
    if jinja_file:
        return jinja_file
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((entry.get("template") for entry in found if isinstance(entry, Mapping) and entry.get("name") == "default"), None)
    if found is None:
        found = gguf_metadata.get("tokenizer.chat_template")
    if found is not None and not isinstance(found, str):
        raise FormatError(f"the model's chat_template is of type {type(found).__name__}; expected a string, or a list with a 'default'")
    return found or None


def missing_template(where: str) -> UsageError:
    """What to say to somebody who wants to chat with a model without a template."""
    return UsageError(
        f"{where}: the model has no chat template; it is a base model, or the file lacks it; use plain prompts, or name a template file "
        "(--chat-template)"
    )


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    **variables: Any,
) -> list[int]:
    """Ids of the rendered conversation, in which only the template's own special tokens are control tokens.

    The prompt is encoded in one go, exactly as elsewhere, unless somebody typed a special token. To know who wrote what, each place in the
    given strings where the first two characters of one stand (or the first, last in a string: a template can join two strings) is marked
    with a character that occurs nowhere else, and the marks are taken out of the rendered text again. A special token that begins at a
    mark was typed: it is encoded as plain text, apart from what surrounds it. A mark stands before the text it marks and nowhere else, so
    the template finds in the strings what it looks for (`'</think>' in content`).
    """
    special = _Special(tokenizer.special_tokens)
    written = _json([messages, tools, variables])
    mark = next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in written and chr(code) not in template.source)
    given = special.marked([list(messages), tools, variables], mark)
    text, *others = template.render(given[0], add_generation_prompt, given[1], **given[2]).split(mark)
    typed: list[tuple[int, int]] = []  # start and end of the special tokens that begin at marks
    starts = []
    for part in others:
        starts.append(len(text))
        text += part
    for start in starts:
        end = start + special.length_at(text, start)
        if typed and start < typed[-1][1]:  # one inside the other, or overlapping
            typed[-1] = (typed[-1][0], max(typed[-1][1], end))
        elif end > start:
            typed.append((start, end))
    ids: list[int] = []
    at = 0
    for start, end in typed:
        ids += tokenizer.encode(text[at:start], add_special=False, parse_special=True)
        ids += tokenizer.encode(text[start:end], add_special=False)
        at = end
    return ids + tokenizer.encode(text[at:], add_special=False, parse_special=True)


class _Special:
    """Finds special tokens in texts. There may be thousands of them, so it looks up each length that they have."""

    def __init__(self, texts: Sequence[str]):
        self._texts = frozenset(texts)
        self._lengths = sorted({len(text) for text in texts}, reverse=True)
        beginnings = [re.escape(text) for text in sorted({text[:2] for text in texts})]
        ends = [re.escape(text) + r"\s*\Z" for text in sorted({text[0] for text in texts})]
        self._begins = re.compile(f"(?={'|'.join(beginnings + ends)})" if texts else r"(?!)")

    def length_at(self, text: str, start: int) -> int:
        """Length of the longest special token of `text` at `start`, or 0."""
        return next((length for length in self._lengths if text[start : start + length] in self._texts), 0)

    def marked(self, value: Any, mark: str) -> Any:
        """`value` with `mark` before every place in its strings where a special token may begin."""
        if isinstance(value, str):
            return self._begins.sub(mark, value)
        if isinstance(value, Mapping):
            return {self.marked(name, mark): self.marked(entry, mark) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(entry, mark) for entry in value]
        return value


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, str] | None:
    """The answer to `line`, or None from a process that has died or was killed because it took longer."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    left, reply = memoryview(line), bytearray()
    try:
        while left:
            left = left[process.stdin.write(left) :]
        while not reply.endswith(b"\n"):
            part = process.stdout.read(READ_BYTES)
            if not part:
                return None
            reply += part
    except OSError:
        return None
    finally:
        timer.cancel()
    found: dict[str, str] = json.loads(reply)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """In a fork this only closes its pipes, which have no buffer to be flushed: `Popen` kills and awaits nothing but its own child."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    process.wait()


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        expected = "messages of strings, numbers, lists and dicts"
        raise UsageError(f"the conversation cannot be rendered: {_line(error)}; expected {expected}") from None


def _line(text: object) -> str:
    return " ".join(str(text).split())[:400]
