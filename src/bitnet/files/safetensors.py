"""safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes (format: github.com/huggingface/safetensors).

The header's grammar is small: {name: {"dtype": word, "shape": [n, ...], "data_offsets": [begin, end]}, "__metadata__": {text: text}}.
So no general JSON parser sees it. The few patterns here read exactly that, in any order and spacing, without recursion, in time linear in
its length; what they find must tile the data section exactly. Only then is there a tensor to ask for.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import FormatError, UsageError
from bitnet.files import MEMORY_BYTES, PathLike, map_file, refuse_other_formats, shown, system_errors
from bitnet.files.replacing import new_file
from bitnet.files.tensor import DTYPES, Tensor, pair_ternary

MAX_HEADER_BYTES = 100_000_000  # as the official reader
MAX_TENSORS = 100_000  # of one file, its metadata counted as one
MAX_METADATA = 10_000
MAX_DIMENSIONS = 8
AGAIN = "the file is damaged, or no safetensors: download or save it again"

_SPACE, _WHOLE = r"[ \t\n\r]*", r"(?:0|[1-9][0-9]{0,18})"
_MARK = re.compile(f"{_SPACE}([{{}}:,]){_SPACE}")
_KEY = re.compile(rf'"([^"\\\x00-\x1f]*)"{_SPACE}:{_SPACE}')  # as nearly all are: no escapes
_FIELD = rf'{_SPACE}"(dtype|shape|data_offsets)"{_SPACE}:{_SPACE}("[^"\\]{{0,32}}"|\[[^][{{}}"]{{0,512}}\]){_SPACE}'
_ENTRY = re.compile(rf"\{{{_FIELD},{_FIELD},{_FIELD}\}}")
_NUMBERS = re.compile(rf"\[{_SPACE}(?:{_WHOLE}{_SPACE}(?:,{_SPACE}{_WHOLE}{_SPACE})*)?\]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ASTRAL = re.compile(rb"\\u[dD][89abAB]")  # an escape that makes a string 4 bytes a character
_STRING = json.JSONDecoder()  # asked for strings only

Values = NDArray[Any] | tuple[str, NDArray[Any]]


@dataclass(frozen=True)
class SafetensorsFile:
    path: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read(path: PathLike) -> SafetensorsFile:
    """Names, shapes and metadata, and no tensor's bytes. Pairs `X.weight` (packed, U8) and `X.weight_scale` become ternary.

    Raises FormatError for a file that is not exactly what it says, UnsupportedModelError for a format that this build does not read.
    """
    stored = read_stored(path)
    return SafetensorsFile(stored.path, stored.metadata, pair_ternary(stored.tensors, stored.metadata, Path(path).parent))


def read_stored(path: PathLike) -> SafetensorsFile:
    """As `read`, with every tensor just as it is stored: a weight and its scale may lie in two files."""
    data, where, source = map_file(path), shown(path), os.fspath(path)
    metadata, entries = _Header(_header_text(data, where), where).parse()
    start = 8 + int.from_bytes(data[:8], "little")
    _check_tiling(entries, len(data) - start, where)
    tensors = {
        name: Tensor(name, shape, dtype, dtype.lower(), source, data, start + begin) for name, (dtype, shape, begin, _) in entries.items()
    }
    return SafetensorsFile(source, metadata, tensors)


def _header_text(data: mmap.mmap, where: str) -> str:
    """The header, bounded before it is decoded: it, its text and the strings in it take up to 1 + 4 + 4 bytes for each of its own."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER_BYTES) or data[8:9] != b"{":
        refuse_other_formats(data[:64], where)
        if len(data) < 8:
            raise FormatError(f"{where}: holds {len(data)} bytes; expected 8 bytes of header length first; {AGAIN}")
        if length > len(data) - 8:
            raise FormatError(f"{where}: header of {length:,} bytes (offset 0), but only {len(data) - 8:,} bytes follow; {AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise FormatError(f"{where}: header of {length:,} bytes (offset 0); expected at most {MAX_HEADER_BYTES:,}; {AGAIN}")
        raise FormatError(f"{where}: header begins with {data[8 : 8 + min(8, length)]!r} (offset 8); expected {{; {AGAIN}")
    if length > (most := _most_header_bytes(data, 8, length, len(data))):
        raise FormatError(f"{where}: header of {length:,} bytes; expected at most {most:,} in a file of {len(data):,}; {AGAIN}")
    try:
        return str(memoryview(data)[8 : 8 + length], "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: header is not UTF-8 (offset {8 + error.start}); {AGAIN}") from None


def _most_header_bytes(data: mmap.mmap | bytes, begin: int, length: int, file_bytes: int) -> int:
    """How long the header that begins there may be for its text to cost no more memory than is allowed beside a file of so many bytes."""
    if 9 * length <= MEMORY_BYTES:
        return MAX_HEADER_BYTES
    largest = np.frombuffer(data, np.uint8, length, begin).max()  # the first byte of the widest character
    astral = largest >= 0xF0 or _ASTRAL.search(data, begin, begin + length)
    width = 4 if astral else 2 if largest >= 0x80 or data.find(b"\\u", begin, begin + length) >= 0 else 1
    return min(MAX_HEADER_BYTES, (MEMORY_BYTES + file_bytes) // (1 + 2 * width))


class _Header:
    """A place in the header's text, which moves on as what is expected there is found."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0
        self.escapes = "\\u" in text

    def error(self, problem: str) -> FormatError:
        found = shown(self.text[self.at : self.at + 24])
        return FormatError(f"{self.where}: {problem} (header character {self.at}, at {found!r}); {AGAIN}")

    def parse(self) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int, int]]]:
        """Metadata, and name -> (dtype, shape, begin, end), as far as each can be checked by itself."""
        metadata: dict[str, str] = {}
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name in self.keys(MAX_TENSORS):
            if name == "__metadata__":
                metadata = {key: self.string() for key in self.keys(MAX_METADATA)}
            else:
                entries[name] = self.entry(name)
        if self.at != len(self.text):
            raise self.error("something follows the header's closing brace")
        return metadata, entries

    def mark(self, allowed: str) -> str:
        found = _MARK.match(self.text, self.at)
        if not found or found[1] not in allowed:
            raise self.error(f"expected {' or '.join(allowed)}")
        self.at = found.end()
        return found[1]

    def string(self) -> str:
        if not self.text.startswith('"', self.at):
            raise self.error("expected a string in double quotes")
        try:
            value, self.at = _STRING.raw_decode(self.text, self.at)
        except ValueError:
            raise self.error("a string does not end, or holds a bad escape or a control character") from None
        if self.escapes and _SURROGATE.search(value):
            raise self.error("a string before here holds half of a surrogate pair")
        assert isinstance(value, str)
        return value

    def keys(self, limit: int) -> Iterator[str]:
        """The keys of one object, at most `limit`; whoever takes a key takes its value too, before the next."""
        self.mark("{")
        if self.text.startswith("}", self.at):
            self.mark("}")
            return
        seen: set[str] = set()
        more = ","
        while more == ",":
            if plain := _KEY.match(self.text, self.at):
                key, self.at = plain[1], plain.end()
            else:
                key = self.string()
                self.mark(":")
            if key in seen or len(seen) == limit:
                raise self.error(f"{shown(key)!r} appears twice" if key in seen else f"more than {limit:,} names")
            seen.add(key)
            yield key
            more = self.mark(",}")

    def entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor's description; the size that its shape and dtype give must be that of its offsets."""
        found = _ENTRY.match(self.text, self.at)
        a, of_a, b, of_b, c, of_c = found.groups() if found else [""] * 6
        fields = {a: of_a, b: of_b, c: of_c}
        if not found or len(fields) != 3:
            expected = '{"dtype": "...", "shape": [...], "data_offsets": [begin, end]}'
            raise self.error(f"tensor {shown(name)!r}: expected {expected} and no more")
        shape, offsets = self.numbers(name, fields["shape"]), self.numbers(name, fields["data_offsets"])
        if (dtype := fields["dtype"].strip('"')) not in DTYPES:
            raise self.error(f"tensor {shown(name)!r}: unknown dtype {shown(dtype)!r}; expected one of {', '.join(DTYPES)}")
        if len(shape) > MAX_DIMENSIONS:
            raise self.error(f"tensor {shown(name)!r}: {len(shape)} dimensions; expected at most {MAX_DIMENSIONS}")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self.error(f"tensor {shown(name)!r}: data_offsets {list(offsets)}; expected a begin and an end no smaller")
        size = DTYPES[dtype].itemsize * prod(shape)
        if size >= 1 << 63 or (size == 0 and prod(n for n in shape if n) >= 1 << 59):  # numpy refuses an empty one of such sides as well
            raise self.error(f"tensor {shown(name)!r}: shape {list(shape)} overflows a size of 63 bits")
        if size != offsets[1] - offsets[0]:
            held = f"data_offsets {list(offsets)} hold {offsets[1] - offsets[0]:,}"
            raise self.error(f"tensor {shown(name)!r}: shape {list(shape)} of {dtype} takes {size:,} bytes, but {held}")
        self.at = found.end()
        return dtype, shape, *offsets

    def numbers(self, name: str, text: str) -> tuple[int, ...]:
        if not _NUMBERS.fullmatch(text):
            raise self.error(f"tensor {shown(name)!r}: {shown(text[:40])}; expected whole numbers, not negative, of at most 19 digits")
        inside = text[1:-1].strip()
        return tuple(map(int, inside.split(","))) if inside else ()


def _check_tiling(entries: Mapping[str, tuple[Any, Any, int, int]], data_bytes: int, where: str) -> None:
    """That tensors follow one another without a gap or an overlap, from the first byte of the data section to the last."""
    at, before = 0, "the header"
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if end > data_bytes:
            raise FormatError(f"{where}: tensor {shown(name)!r} ends at {end:,}, but the data section has {data_bytes:,} bytes; {AGAIN}")
        if begin != at:
            problem = f"{begin - at:,} bytes after" if begin > at else f"an overlap of {at - begin:,} bytes with"
            raise FormatError(f"{where}: tensor {shown(name)!r} begins at {begin:,}, {problem} {shown(before)!r}; expected {at:,}; {AGAIN}")
        at, before = end, name
    if at != data_bytes:
        raise FormatError(f"{where}: {data_bytes - at:,} bytes after the last tensor (offset {at:,}) belong to none; {AGAIN}")


@dataclass(frozen=True)
class Item:
    """A tensor to write: `chunks` gives its bytes, row by row, as often as it is called."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write(path: PathLike, tensors: Mapping[str, Values], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays, or (dtype, array) pairs where numpy has no such dtype: ("BF16", uint16 bits). The same input gives the same bytes.

    Beside the target, synced, then renamed, so that `path` is either as it was or complete. Raises UsageError for what safetensors cannot
    hold, BitNetError where the disk refuses.
    """
    items = [_item(name, values) for name, values in tensors.items()]
    with system_errors(path, "written"):
        start, items = layout(items, metadata, shown(path))
        with new_file(path) as file:
            file.write(start)
            for item in items:
                for chunk in item.chunks():
                    file.write(chunk.data)


def layout(items: Iterable[Item], metadata: Mapping[str, str] | None, where: str) -> tuple[bytes, list[Item]]:
    """(the bytes before the tensors, the tensors in their order): what a file of these consists of.

    Larger items come first: with a header of whole 8 bytes each tensor is aligned to its item.
    """
    order = sorted(items, key=lambda item: (-DTYPES[item.dtype].itemsize, item.name))
    if len(order) >= MAX_TENSORS or not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise UsageError(f"{where}: {len(order):,} tensors, metadata of {type(metadata).__name__}; expected fewer, and only texts")
    description: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for item in order:
        description[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [begin, begin + item.nbytes]}
        begin += item.nbytes
    header = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > (most := _most_header_bytes(header, 0, len(header), 8 + len(header) + begin)):
        raise UsageError(
            f"{where}: names and texts take {len(header):,} bytes, and one safetensors of {begin:,} bytes of weights is read with {most:,} "
            "at most; write a folder, where tokenizer and configuration are files of their own"
        )
    return len(header).to_bytes(8, "little") + header, order


def _item(name: str, values: Values) -> Item:
    """One array to write, little-endian."""
    dtype, array = values if isinstance(values, tuple) else (None, values)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if dtype is None:
        dtype = next((known for known, form in DTYPES.items() if form == array.dtype and known not in ("BF16", "F8_E4M3", "F8_E5M2")), "")
    if name == "__metadata__" or DTYPES.get(dtype) != array.dtype or array.ndim > MAX_DIMENSIONS:
        raise UsageError(f"tensor {shown(name)!r}: cannot write {array.dtype} {list(array.shape)} as {dtype or 'any dtype'}")
    return Item(name, dtype, array.shape, lambda: [np.ascontiguousarray(array)])
