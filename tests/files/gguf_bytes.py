"""GGUF files made by hand, byte by byte, so that each can lie in one place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` is what it claims."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def number(kind: int, value: float) -> bytes:
    return struct.pack("<" + _FORMS[kind], value)


def value(kind: int, item: Any) -> bytes:
    """A value with its type before it."""
    return struct.pack("<I", kind) + (text(item) if kind == STRING else number(kind, item))


def array(kind: int, items: Sequence[Any], count: int | None = None) -> bytes:
    body = b"".join(text(item) if kind == STRING else number(kind, item) for item in items)
    return struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count) + body


def pair(key: str | bytes, encoded: bytes) -> bytes:
    return text(key) + encoded


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    """`dims` as the file has them: the inputs first."""
    head = text(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


def file(
    pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, magic: bytes = b"GGUF", version: int = 3,
    n_tensors: int | None = None, n_pairs: int | None = None, alignment: int = 32,
) -> bytes:  # fmt: skip
    """A whole file; the counts are what it claims."""
    counts = struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head = magic + struct.pack("<I", version) + counts + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment if data else 0) + data


def healthy(seed: int = 0) -> bytes:
    """A small file with every kind of value and some kinds of tensor: what mutations begin from."""
    rng = np.random.default_rng(seed)
    pairs = [
        pair("general.architecture", value(STRING, "llama")),
        pair("general.alignment", value(U32, 32)),
        pair("llama.block_count", value(U32, 1)),
        pair("llama.rope.freq_base", value(F32, 10000.0)),
        pair("tokenizer.ggml.add_bos_token", value(BOOL, True)),
        pair("tokenizer.ggml.tokens", array(STRING, ["<s>", "a", "b", "ü", ""])),
        pair("tokenizer.ggml.scores", array(F32, [0.0, -1.0, -2.0, -3.0, -4.0])),
        pair("tokenizer.ggml.token_type", array(I32, [3, 1, 1, 1, 1])),
        pair("wide", value(U64, 1 << 63)),
        pair("small", value(I8, -5)),
        pair("flags", array(BOOL, [True, False])),
    ]
    kinds = [(0, 4, 1), (1, 2, 1), (8, 34, 32), (12, 144, 256), (35, 66, 256), (34, 54, 256), (42, 18, 64), (41, 18, 128)]
    tensors, data = [], b""
    for i, (kind, nbytes, block) in enumerate(kinds):
        tensors.append(tensor(f"t{i}.weight", (256, 3), kind, len(data)))
        size = 256 * 3 // block * nbytes
        data += rng.integers(0, 256, size, np.uint8).tobytes() + b"\0" * (-size % 32)
    tensors.append(tensor("i2.weight", (128, 2), 36, len(data)))
    codes = (rng.integers(0, 3, (64, 4)) << np.array([0, 2, 4, 6])).sum(axis=1).astype(np.uint8)
    data += codes.tobytes() + struct.pack("<f", 0.5) + b"\0" * 28
    return file(pairs, tensors, data)
