"""ggml's tensor types: how many values a block holds in how many bytes, and what the value formats mean.

Ids and layouts: github.com/ggml-org/ggml (ggml.h, ggml-common.h); 36 to 39 as bitnet.cpp numbers them, 142 and 143 of the Bonsai models. A
block is whole bytes; a row is whole blocks. The ternary and binary formats are codecs in packing.py; the others here give float32, computed
in float32 and in the order that the `gguf` package computes them, so the bits agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class GgmlType(NamedTuple):
    name: str  # lower case, as ggml prints it
    block: int  # values
    nbytes: int  # of a block


TYPES = {
    0: GgmlType("f32", 1, 4), 1: GgmlType("f16", 1, 2), 2: GgmlType("q4_0", 32, 18), 3: GgmlType("q4_1", 32, 20),
    6: GgmlType("q5_0", 32, 22), 7: GgmlType("q5_1", 32, 24), 8: GgmlType("q8_0", 32, 34), 9: GgmlType("q8_1", 32, 36),
    10: GgmlType("q2_k", 256, 84), 11: GgmlType("q3_k", 256, 110), 12: GgmlType("q4_k", 256, 144), 13: GgmlType("q5_k", 256, 176),
    14: GgmlType("q6_k", 256, 210), 15: GgmlType("q8_k", 256, 292), 16: GgmlType("iq2_xxs", 256, 66), 17: GgmlType("iq2_xs", 256, 74),
    18: GgmlType("iq3_xxs", 256, 98), 19: GgmlType("iq1_s", 256, 50), 20: GgmlType("iq4_nl", 32, 18), 21: GgmlType("iq3_s", 256, 110),
    22: GgmlType("iq2_s", 256, 82), 23: GgmlType("iq4_xs", 256, 136), 24: GgmlType("i8", 1, 1), 25: GgmlType("i16", 1, 2),
    26: GgmlType("i32", 1, 4), 27: GgmlType("i64", 1, 8), 28: GgmlType("f64", 1, 8), 29: GgmlType("iq1_m", 256, 56),
    30: GgmlType("bf16", 1, 2), 34: GgmlType("tq1_0", 256, 54), 35: GgmlType("tq2_0", 256, 66), 36: GgmlType("i2_s", 128, 32),
    39: GgmlType("mxfp4", 32, 17), 40: GgmlType("nvfp4", 64, 36), 41: GgmlType("q1_0", 128, 18), 42: GgmlType("q2_0", 64, 18),
    142: GgmlType("pq2_0", 128, 34), 143: GgmlType("ptq1_0", 128, 28),
}  # fmt: skip
I2_S, Q2_0 = 36, 42
I2_S_TAIL = 32  # bytes after all blocks of an I2_S tensor; the first four are its scale, float32
Q2_0_OLDER = GgmlType("q2_0", 128, 34)  # the same id in files of an older fork
NOT_PORTABLE = {38: "TL1", 39: "TL2"}  # in bitnet.cpp; 39 is MXFP4 upstream

# value formats that numpy holds as they are: ggml name -> dtype name of files.tensor.DTYPES
PLAIN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64", "i8": "I8", "i16": "I16", "i32": "I32", "i64": "I64"}
# formats of codes: ggml name -> packing.BLOCKS
CODES = {"i2_s": "i2_s", "tq1_0": "tq1_0", "tq2_0": "tq2_0", "q2_0": "q2_0", "pq2_0": "q2_0_128", "ptq1_0": "ptq1_0", "q1_0": "q1_0"}


def _half(blocks: U8, at: int) -> F32:
    """The f16 at byte `at` of every block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """[n, b] -> [n, 2b]: all low halves, then all high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _fifth_bits(blocks: U8, at: int) -> U8:
    """The 32 bits from byte `at`, as 0 or 16, [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def q8_0(blocks: U8) -> F32:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def q4_0(blocks: U8) -> F32:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)).astype(np.float32)


def q4_1(blocks: U8) -> F32:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def q5_0(blocks: U8) -> F32:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.view(np.int8) - np.int8(16)).astype(np.float32)


def q5_1(blocks: U8) -> F32:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _six_bit_scales(packed: U8) -> tuple[U8, U8]:
    """12 bytes of a K-quant -> (scales, minima), each [n, 8]: four of 6 bits whole, four in 4 low bits here and 2 high ones there."""
    d, m, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    two, low = np.uint8(2), np.uint8(15)
    scales = np.concatenate([d & np.uint8(63), (both & low) | ((d >> two) & np.uint8(0x30))], axis=1)
    minima = np.concatenate([m & np.uint8(63), (both >> np.uint8(4)) | ((m >> two) & np.uint8(0x30))], axis=1)
    return scales, minima


def _k_values(blocks: U8, codes: U8) -> F32:
    """codes [n, 8, 32] with the scales and minima in the first 16 bytes -> d * scale * code - dmin * minimum."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    d = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    m = (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return (d * codes.astype(np.float32) - m).reshape(len(blocks), 256)


def q4_k(blocks: U8) -> F32:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    return _k_values(blocks, ((packed >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & np.uint8(15)).reshape(-1, 8, 32))


def q5_k(blocks: U8) -> F32:
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = ((packed >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & np.uint8(15)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    return _k_values(blocks, low | (high << np.uint8(4)))


def q6_k(blocks: U8) -> F32:
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = blocks[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (low & np.uint8(15)).reshape(n, 8, 32) | ((high & np.uint8(3)) << np.uint8(4)).reshape(n, 8, 32)
    signed = (codes.view(np.int8) - np.int8(32)).reshape(n, 16, 16).astype(np.float32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return (scales[:, :, None] * signed).reshape(n, 256)


# uint8 [n, bytes of a block] -> float32 [n, values of a block]
VALUES: dict[str, Callable[[U8], F32]] = {
    "q8_0": q8_0, "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k,
}  # fmt: skip
