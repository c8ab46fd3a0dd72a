"""Bytes <-> named arrays and metadata; knows no model.

Every reader begins here, because a file may lie: only a regular file is opened (a pipe would hang), its size is known before one of its
bytes is believed, and JSON is weighed before it is parsed. No file may cost more than a second, nor MEMORY_BYTES beyond its own size.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import BitNetError, FormatError

MEMORY_BYTES = 64 << 20
MAX_DEPTH = 64  # nested JSON; a real config has about 6 levels, a tokenizer 8
MAX_DIGITS = 300  # of a whole number in JSON, which as a float still is finite
CHUNK_BYTES = 1 << 18
VALUE_BYTES = 150  # the most that one small JSON value takes as a Python object, its place in the container included

GGUF_MAGIC = b"GGUF"
_NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))  # what says nothing of how JSON nests

PathLike = str | os.PathLike[str]


def shown(text: object) -> str:
    """`text` as it may stand in a message of one line: printable, without the middle of a very long one."""
    line = str(text)
    short = line if len(line) <= 400 else f"{line[:200]}...{line[-100:]}"
    return short if short.isprintable() else ascii(short)[1:-1]


def place_of(path: PathLike) -> Path:
    """Where a file lies or would, the same by whichever way it is named; a link is itself, not what it leads to."""
    absolute = Path(path).absolute()
    return absolute.resolve() if absolute.name == ".." else absolute.parent.resolve() / absolute.name


@contextmanager
def system_errors(path: PathLike, doing: str) -> Iterator[None]:
    """Turn the operating system's refusal into one line about `path`; `doing` is "read" or "written"."""
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{shown(path)}: no such file or folder; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        kind = FormatError if doing == "read" else BitNetError
        raise kind(f"{shown(path)}: cannot be {doing} ({shown(reason)}); check the path, its permissions and the disk") from None


@contextmanager
def open_regular(path: PathLike) -> Iterator[tuple[int, int]]:
    """(descriptor, size in bytes) of a regular file that is not empty; anything else is a FormatError and never waits."""
    with system_errors(path, "read"):
        kind = os.stat(path).st_mode  # looked at first, because to open a device can be to act on it
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe, socket or device"
            raise FormatError(f"{shown(path)}: is {what}; expected a regular file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise FormatError(f"{shown(path)}: is empty (0 bytes); download or save it again")
        with system_errors(path, "read"):
            yield descriptor, size
    finally:
        os.close(descriptor)


def map_file(path: PathLike) -> mmap.mmap:
    """A file's bytes, read-only, mapped and not read: they come from the disk as they are touched."""
    with open_regular(path) as (descriptor, size):
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)


def read_file(path: PathLike, limit_bytes: int) -> bytes:
    """All bytes of a small file. Raises FormatError for one of more than `limit_bytes`."""
    with open_regular(path) as (descriptor, size):
        if size > limit_bytes:
            raise FormatError(f"{shown(path)}: holds {size:,} bytes; expected at most {limit_bytes:,} in a file of this name")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(size)


def is_gguf(path: PathLike) -> bool:
    """Whether a regular file begins as GGUF files do; False for a folder. Raises FormatError where there is nothing to read."""
    if os.path.isdir(path):
        return False
    with open_regular(path) as (descriptor, _):
        return os.read(descriptor, len(GGUF_MAGIC)) == GGUF_MAGIC


def refuse_other_formats(head: bytes, where: str) -> None:
    """Say what the first bytes of a file are, if they are no safetensors but something known. `where`: what the message begins with."""
    if head.startswith(GGUF_MAGIC):
        raise FormatError(f"{where}: is a GGUF file; expected safetensors. Name that file itself to run it")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or re.match(rb"\x80[\x02-\x05]", head):
        raise FormatError(
            f"{where}: is a Python pickle or zip archive (as PyTorch writes .bin, .pt and .ckpt), and to load one can run any code in it;"
            " expected safetensors: where you trust the file, load it with PyTorch and save it with safetensors.torch.save_file"
        )
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(f"{where}: is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file")


def check_json_object(raw: bytes, where: str) -> None:
    """That `raw` is one JSON object by its brackets: begun, closed, and at most MAX_DEPTH deep. Neither recursive nor copied whole."""
    if not re.match(rb"[ \t\r\n]*\{", raw):
        raise FormatError(f"{where}: begins with {raw[:8]!r}; expected a JSON object, which begins with {{")
    at = depth = quotes = 0  # quotes: how many so far, so a bracket after an odd number of them is text
    while at < len(raw):
        chunk = raw[at : at + CHUNK_BYTES]
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and len(chunk) > 1:
            chunk = chunk[:-1]  # an escape is not cut in two
        at += len(chunk)
        kept = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__").translate(None, _NO_MARKS)
        if not kept:
            continue
        marks = np.frombuffer(kept, np.uint8)
        text = (np.cumsum(marks == ord('"'), dtype=np.uint8) + np.uint8(quotes)) & np.uint8(1)
        folded = marks | np.uint8(0x20)  # [ becomes {, and ] becomes }
        steps = ((folded == ord("{")).astype(np.int8) - (folded == ord("}")).astype(np.int8)) * (1 - text.astype(np.int8))
        depths = depth + np.cumsum(steps, dtype=np.int32)
        if depths.max() > MAX_DEPTH:
            raise FormatError(f"{where}: JSON nests more than {MAX_DEPTH} deep; expected a plain file of its kind")
        depth, quotes = int(depths[-1]), int(text[-1])
    if depth or quotes:
        raise FormatError(f"{where}: JSON breaks off or does not close ({depth} brackets open at its end); download or save it again")


def _whole_number(digits: str) -> int:
    """Of at most MAX_DIGITS: int() takes time quadratic in them. transformers writes 31 where a tokenizer has no longest text."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a configuration or an index. Raises FormatError for anything but an object, and for more than MEMORY_BYTES of objects."""
    check_json_object(raw, where)
    wide = not raw.isascii() or b"\\u" in raw  # one character beyond the 16-bit plane makes the text and a value 4 bytes a character
    values = sum(raw.count(mark) for mark in (b"[", b"{", b",", b":"))
    if len(raw) * (9 if wide else 2) + VALUE_BYTES * values > MEMORY_BYTES:
        raise FormatError(f"{where}: {len(raw):,} bytes of JSON with about {values:,} values would take over 64 MB; expected a plain file")
    try:
        value = json.loads(raw.decode(), parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not valid JSON ({shown(error)}); download or save it again") from None
    assert isinstance(value, dict)
    return value
