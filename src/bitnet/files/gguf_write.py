"""GGUF files, written: the counterpart of gguf.py."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import UsageError
from bitnet.files.ggml import I2_S_TAIL, TYPES, GgmlType
from bitnet.files.gguf import DEFAULT_ALIGNMENT

VERSION = 3
IDS = {kind.name: number for number, kind in TYPES.items()}  # ggml's name of a type -> its id

_STRING, _ARRAY = 8, 9
_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_ARRAYS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}  # numpy kind and size


@dataclass(frozen=True)
class Item:
    """A tensor to write: `chunks` gives its bytes, block by block, as often as it is called."""

    name: str
    type: str  # a name of ggml.TYPES
    shape: tuple[int, ...]  # rows first
    chunks: Callable[[], Iterable[NDArray[Any]]]

    @property
    def kind(self) -> GgmlType:
        return TYPES[IDS[self.type]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.block * self.kind.nbytes + (I2_S_TAIL if self.type == "i2_s" else 0)


def layout(items: Iterable[Item], metadata: Mapping[str, Any]) -> tuple[bytes, list[tuple[Item, int]]]:
    """(the bytes before the tensors, the tensors in their order, each with the zero bytes that follow it)."""
    order = list(items)
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(order), len(metadata))
    head += b"".join(_text(key) + _value(key, value) for key, value in metadata.items())
    at = 0
    padded = []
    for item in order:
        head += _text(item.name) + struct.pack(f"<I{len(item.shape)}Q", len(item.shape), *item.shape[::-1])
        head += struct.pack("<IQ", IDS[item.type], at)
        fill = -item.nbytes % DEFAULT_ALIGNMENT
        padded.append((item, fill))
        at += item.nbytes + fill
    return head + bytes(-len(head) % DEFAULT_ALIGNMENT), padded


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """A value with its type before it: whole numbers as u32 where they fit, others as f32, as every key that is in use has them."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        values = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False))
        kind = _ARRAYS.get(f"{values.dtype.kind}{values.dtype.itemsize}")
        if kind is not None and values.ndim == 1:
            return struct.pack("<IIQ", _ARRAY, kind, len(values)) + values.tobytes()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, bool | int | float | np.number | np.bool_):
        kind = _kind(value)
        return struct.pack("<I", kind) + struct.pack(_FORMS[kind], value)
    raise UsageError(f"metadata {key!r}: GGUF has no type for {type(value).__name__}")


def _kind(value: Any) -> int:  # of one number
    if isinstance(value, bool | np.bool_):
        return 7
    if isinstance(value, float | np.floating):
        return 6
    whole = int(value)
    if whole < 0:
        return 5 if whole >= -(1 << 31) else 11
    return 4 if whole < 1 << 32 else 10
