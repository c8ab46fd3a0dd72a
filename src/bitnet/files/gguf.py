"""GGUF: a header, pairs of key and value, descriptions of tensors, then the tensors' bytes (github.com/ggml-org/ggml, docs/gguf.md).

Nothing in the file is believed: a count is at most what the bytes that remain could hold, a length ends before the file does, a product
does not wrap, and tensors lie side by side in the data section, aligned, without overlap. Only then is there a tensor to ask for. Arrays
of numbers and tensors stay in the mapped file; strings are made one by one, within a bound of memory.

Q2_0 has two meanings under one id: blocks of 64 upstream, of 128 in files of an older fork. The room that the tensors have tells: all of
them fit one or the other. Where both fit (tensors so small that padding hides the difference), upstream's is taken.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import GGUF_MAGIC, MEMORY_BYTES, PathLike, map_file, shown
from bitnet.files.ggml import CODES, I2_S, I2_S_TAIL, NOT_PORTABLE, PLAIN, Q2_0, Q2_0_OLDER, TYPES, GgmlType
from bitnet.files.tensor import Tensor

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_PAIRS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 20  # of all arrays; the largest vocabularies with their merges have about 700,000
MAX_NAME = 1024  # bytes of a key or a tensor's name
MAX_DIMENSIONS = 4
AGAIN = "the file is damaged: download or save it again"

_COUNT = struct.Struct("<Q")
_WORD = struct.Struct("<I")
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"), 5: np.dtype("<i4"),
    6: np.dtype("<f4"), 7: np.dtype("u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_PAIR, _SMALLEST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # bytes


@dataclass(frozen=True)
class GgufFile:
    path: str
    version: int
    metadata: dict[str, Any]  # str, int, float, bool, a numpy array of numbers or bools, or a list of str
    tensors: dict[str, Tensor]


def read(path: PathLike) -> GgufFile:
    """Names, shapes and metadata, and no tensor's bytes.

    Raises FormatError for a file that is not exactly what it says, UnsupportedModelError for a version or a type that this build does not
    know.
    """
    return parse(map_file(path), os.fspath(path))


def parse(data: mmap.mmap, path: str) -> GgufFile:
    """`read` of bytes that are already there: a mapped file, or anything else that gives its bytes alike."""
    reader = _Reader(data, shown(path))
    version, n_tensors, n_pairs = reader.header()
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = reader.name("key")
        if key in metadata:
            raise reader.error(f"key {shown(key)!r} appears twice")
        metadata[key] = reader.value(key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    powers = isinstance(alignment, int) and not isinstance(alignment, bool) and alignment > 0 and alignment & (alignment - 1) == 0
    if not powers or not 8 <= alignment <= MAX_ALIGNMENT:
        raise reader.error(f"general.alignment is {shown(alignment)}; expected a power of two from 8 to {MAX_ALIGNMENT}")
    entries: dict[str, _Entry] = {}
    for _ in range(n_tensors):
        name = reader.name("tensor name")
        if name in entries:
            raise reader.error(f"tensor {shown(name)!r} appears twice")
        entries[name] = reader.entry(name, str(metadata.get("general.architecture", "")))
    start = -(-reader.at // alignment) * alignment
    _place(entries, start, len(data), alignment, reader.where)
    return GgufFile(path, version, metadata, {name: _tensor(name, entry, path, data, start) for name, entry in entries.items()})


@dataclass(slots=True)
class _Entry:
    shape: tuple[int, ...]  # the other way round than in the file: rows first
    type: int
    kind: GgmlType
    offset: int  # from the start of the data section

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.block * self.kind.nbytes + (I2_S_TAIL if self.type == I2_S else 0)


class _Reader:
    """A place in the file, which moves on as what is expected there is found."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.at, self.end = data, where, 0, len(data)
        self.strings = 0  # in arrays, so far
        self.budget = MEMORY_BYTES + len(data)  # bytes of memory left for texts

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.where}: {problem} (offset {self.at:,}); {AGAIN}")

    def header(self) -> tuple[int, int, int]:
        """(version, tensors, metadata pairs)."""
        if bytes(self.data[:4]) != GGUF_MAGIC:
            raise FormatError(f"{self.where}: begins with {bytes(self.data[:4])!r}; expected a GGUF file, which begins with GGUF")
        self.at = 4
        version = self.word("version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            how = f"is a big-endian file of version {swapped}" if swapped in VERSIONS else f"is of GGUF version {version}"
            raise UnsupportedModelError(
                f"{self.where}: {how}; this build reads little-endian versions 2 and 3: convert it with llama.cpp's tools"
            )
        n_tensors, n_pairs = self.count("tensors"), self.count("metadata pairs")
        for what, n, smallest, most in (
            ("metadata pairs", n_pairs, _SMALLEST_PAIR, MAX_PAIRS),
            ("tensors", n_tensors, _SMALLEST_TENSOR, MAX_TENSORS),
        ):
            if n > most or n * smallest > self.end - self.at:
                raise self.error(f"{n:,} {what}, but only {self.end - self.at:,} bytes follow, and expected at most {most:,}")
        return version, n_tensors, n_pairs

    def _number(self, form: struct.Struct, what: str) -> int:
        if self.end - self.at < form.size:
            raise self.error(f"ends within {what}; {form.size} bytes expected, {self.end - self.at} left")
        found = int(form.unpack_from(self.data, self.at)[0])
        self.at += form.size
        return found

    def word(self, what: str) -> int:
        return self._number(_WORD, what)

    def count(self, what: str) -> int:
        return self._number(_COUNT, f"the number of {what}")

    def string_bytes(self, what: str) -> bytes:
        length = self._number(_COUNT, f"the length of {what}")
        if length > self.end - self.at:
            raise self.error(f"{what} of {length:,} bytes, but only {self.end - self.at:,} follow")
        found = bytes(self.data[self.at : self.at + length])
        self.at += length
        return found

    def name(self, what: str) -> str:
        raw = self.string_bytes(what)
        if not 1 <= len(raw) <= MAX_NAME:
            raise self.error(f"{what} of {len(raw):,} bytes; expected 1 to {MAX_NAME}")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} {shown(raw[:40])} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.word(f"the type of {shown(key)!r}")
        if kind == _STRING:
            raw = self.string_bytes(f"the text of {shown(key)!r}")
            if 4 * len(raw) > self.budget:  # up to four bytes a character
                raise self.error(f"text of {shown(key)!r} has {len(raw):,} bytes; with the others it would take too much memory")
            found = raw.decode(errors="replace")
            self.budget -= sys.getsizeof(found)
            return found
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _NUMBERS:
            raise self.error(f"{shown(key)!r} is of type {kind}; expected a metadata type from 0 to 12")
        values = self.numbers(key, kind, 1)
        return bool(values[0]) if kind == _BOOL else values[0].item()

    def array(self, key: str) -> Any:
        kind = self.word(f"the type of {shown(key)!r}'s items")
        n = self.count(f"items of {shown(key)!r}")
        if kind == _STRING:
            return self.text(key, n)
        if kind not in _NUMBERS:
            nested = ": arrays of arrays are not used by any model" if kind == _ARRAY else ""
            raise self.error(f"{shown(key)!r} holds items of type {kind}{nested}; expected numbers or texts")
        values = self.numbers(key, kind, n)
        return values.view(np.bool_) if kind == _BOOL else values

    def numbers(self, key: str, kind: int, n: int) -> Any:
        dtype = _NUMBERS[kind]
        if n > (self.end - self.at) // dtype.itemsize:
            raise self.error(f"{shown(key)!r} has {n:,} items of {dtype.itemsize} bytes, but only {self.end - self.at:,} bytes follow")
        values = np.frombuffer(self.data, dtype, n, self.at)
        if kind == _BOOL and n and values.max() > 1:
            raise self.error(f"{shown(key)!r} holds a bool of {values.max()}; expected 0 or 1")
        self.at += n * dtype.itemsize
        return values

    def text(self, key: str, n: int) -> list[str]:
        """An array of strings. Bytes that are no UTF-8 become U+FFFD: vocabularies of real files hold such pieces, which no text can
        match."""
        self.strings += n
        if n * 8 > self.end - self.at or self.strings > MAX_STRINGS:
            raise self.error(
                f"{shown(key)!r} has {n:,} texts, but only {self.end - self.at:,} bytes follow, and expected at most {MAX_STRINGS:,}"
            )
        data, at, end, unpack, size_of = self.data, self.at, self.end, _COUNT.unpack_from, sys.getsizeof
        found = []
        budget = self.budget - n * 8  # the list's places
        for _ in range(n):
            length = unpack(data, at)[0] if end - at >= 8 else end
            at += 8
            if length > end - at or 4 * length > budget:
                self.at = at - 8
                room = f"only {max(0, end - at):,} follow" if length > end - at else "all texts together would take too much memory"
                raise self.error(f"{shown(key)!r} has a text of {length:,} bytes, but {room}")
            item = data[at : at + length].decode(errors="replace")
            budget -= size_of(item)
            found.append(item)
            at += length
        self.at, self.budget = at, budget
        return found

    def entry(self, name: str, architecture: str) -> _Entry:
        """One tensor's description, as far as it can be checked by itself."""
        what = f"tensor {shown(name)!r}"
        n_dimensions = self.word(f"the dimensions of {what}")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{what} has {n_dimensions:,} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.count(f"{what}'s values in a dimension") for _ in range(n_dimensions))[::-1]
        number = self.word(f"the type of {what}")
        offset = self.count(f"{what}'s offset")
        if min(shape) < 1 or max(shape) >= 1 << 40 or prod(shape) >= 1 << 44:
            raise self.error(f"{what} has shape {list(shape)}; expected sizes of 1 or more, and no more values than a model has")
        if number in NOT_PORTABLE and (number not in TYPES or architecture.startswith("bitnet")):
            raise UnsupportedModelError(
                f"{self.where}: {what} is of type {NOT_PORTABLE[number]} ({number}), tiled for one CPU and one matrix shape by its "
                "writer; expected a portable type: convert the model again to I2_S or TQ2_0"
            )
        if number not in TYPES:
            raise UnsupportedModelError(
                f"{self.where}: {what} is of ggml type {number}, unknown to this build; convert it to Q8_0 or TQ2_0"
            )
        entry = _Entry(shape, number, TYPES[number], offset)
        run = prod(shape) if number == I2_S else shape[-1]
        if run % entry.kind.block:
            raise self.error(f"{what} has {run:,} values a row; expected a multiple of {entry.kind.block} for {entry.kind.name}")
        return entry


def _place(entries: dict[str, _Entry], start: int, size: int, alignment: int, where: str) -> None:
    """That every tensor is aligned, in the file and beside the others; and which Q2_0 this is."""
    order = sorted(entries, key=lambda name: entries[name].offset)
    room = {name: entries[after].offset - entries[name].offset for name, after in pairwise(order)}
    if order:
        room[order[-1]] = size - start - entries[order[-1]].offset
    two_bit = [(name, entry) for name, entry in entries.items() if entry.type == Q2_0]

    def fits(name: str, entry: _Entry, kind: GgmlType) -> bool:
        nbytes = prod(entry.shape) // kind.block * kind.nbytes
        spare = room[name] - nbytes
        return entry.shape[-1] % kind.block == 0 and spare >= 0 and (spare < alignment or name == order[-1])

    if not all(fits(name, entry, TYPES[Q2_0]) for name, entry in two_bit) and all(fits(name, e, Q2_0_OLDER) for name, e in two_bit):
        for _, entry in two_bit:
            entry.kind = Q2_0_OLDER
    for name in order:
        entry, what = entries[name], f"{where}: tensor {shown(name)!r}"
        if entry.offset % alignment:
            raise FormatError(f"{what} begins at offset {entry.offset:,} of the data; expected a multiple of {alignment}; {AGAIN}")
        if entry.nbytes > room[name]:
            if name == order[-1] or start + entry.offset + entry.nbytes > size:
                missing = start + entry.offset + entry.nbytes - size
                raise FormatError(
                    f"{what} ends {missing:,} bytes after the file does, which has {size:,}; the download is not complete: {AGAIN}"
                )
            raise FormatError(f"{what} takes {entry.nbytes:,} bytes, but the next tensor begins {room[name]:,} bytes after it; {AGAIN}")


def _tensor(name: str, entry: _Entry, path: str, data: mmap.mmap, start: int) -> Tensor:
    kind, offset = entry.kind, start + entry.offset
    if kind.name in PLAIN:
        return Tensor(name, entry.shape, PLAIN[kind.name], kind.name, path, data, offset)
    codec = CODES.get(kind.name, "")
    if kind is Q2_0_OLDER:
        codec = "q2_0_128"
    scheme = "binary" if codec == "q1_0" else "ternary" if codec else kind.name
    return Tensor(name, entry.shape, "U8", scheme, path, data, offset, codec=codec, kind=kind)
