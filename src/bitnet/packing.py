"""How codes lie in bytes: one small numpy codec for each storage format, and one table of them.

A code is t + 1, so 0, 1, 2 stand for -1, 0, +1; two bits hold it, and the fourth value, 3, stands for nothing.

"hf" is the layout that `transformers` calls BitNet (integrations/bitnet.py, `pack_weights`). A weight [out, in] is cut into four bands of
R = ceil(out/4) rows, and bits 2i..2i+1 of byte P[r, c] hold the code of W[i*R + r, c]. So a byte holds four rows that lie far apart, and
where out is no multiple of 4 the last band is short: its missing codes are 0, as `transformers` writes them, and unpack as rows of -1.

The others are GGUF's (BLOCKS): I2_S of bitnet.cpp, TQ1_0, TQ2_0, Q2_0 and Q1_0 of llama.cpp, PQ2_0 (Q2_0 in blocks of 128) and PTQ1_0 of
the Bonsai models. There a row is whole blocks, each with its scale; I2_S has one scale for the tensor, after all codes;
a build of bitnet.cpp for Arm once wrote stretches of 16 bytes instead of 32 under the same name (i2_s_arm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

I8 = NDArray[np.int8]
U8 = NDArray[np.uint8]

CHUNK_BYTES = 1 << 17  # packed bytes worked on at once: they and the four bands made of them stay in the second-level cache


class Codec(NamedTuple):
    """`pack`: int8 trits [out, in] -> uint8 bytes; `unpack`: uint8 bytes -> int8 trits, padding rows included."""

    pack: Callable[[NDArray[np.int8]], NDArray[np.uint8]]
    unpack: Callable[[NDArray[np.uint8]], NDArray[np.int8]]


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> the bits of bf16, rounded half to even; for finite values, of which those beyond bf16 become infinity."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def pack_hf(trits: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Trits -1, 0, +1, int8 [out, in] -> uint8 [ceil(out/4), in]. Raises ValueError for another shape or another value."""
    if trits.ndim != 2:
        raise ValueError(f"expected trits [out, in], found {trits.ndim} dimensions")
    if trits.size and not (trits.min() >= -1 and trits.max() <= 1):
        raise ValueError(f"expected values of -1, 0 and +1, found {trits.min()} to {trits.max()}")
    rows = -(-trits.shape[0] // 4)
    packed = np.zeros((rows, trits.shape[1]), np.uint8)
    for i in range(4):
        band = trits[i * rows : (i + 1) * rows]
        packed[: len(band)] |= (band.astype(np.uint8) + np.uint8(1)) << np.uint8(2 * i)  # -1 is 255 as uint8, and 255 + 1 is 0
    return packed


def unpack_hf(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """uint8 [R, in] -> trits, int8 [4R, in]. Raises ValueError for another shape or dtype, and where a byte holds a code of 3."""
    if packed.ndim != 2 or packed.dtype != np.uint8:
        raise ValueError(f"expected uint8 bytes [R, in], found {packed.dtype} {list(packed.shape)}")
    rows, columns = packed.shape
    codes = np.empty((4 * rows, columns), np.uint8)
    step = max(1, CHUNK_BYTES // max(1, columns))
    for top in range(0, rows, step):
        chunk = packed[top : top + step]
        threes = chunk & (chunk >> np.uint8(1)) & np.uint8(0x55)  # the low bit of each pair stays where both are set
        if threes.any():
            row, column = np.argwhere(threes)[0]
            raise ValueError(f"byte [{top + row}, {column}] is 0x{chunk[row, column]:02X}, which holds a code of 3; expected 0, 1 and 2")
        for i in range(4):
            band = codes[i * rows + top : i * rows + top + len(chunk)]
            np.right_shift(chunk, np.uint8(2 * i), out=band)
            np.bitwise_and(band, np.uint8(3), out=band)
            np.subtract(band, np.uint8(1), out=band)  # 0 - 1 is 255, the int8 -1
    return codes.view(np.int8)


class TwoBitBlocks(NamedTuple):
    """A format of two-bit codes, as native code reads it (native/repack.h)."""

    codes: int  # in a block
    bytes: int  # of a block
    first_byte: int  # of the codes
    run: int  # code k * run + p of a stretch lies in byte p
    descending: bool  # at bits 6 - 2k; else at bits 2k


@dataclass(frozen=True)
class BlockCodec:
    """A GGUF format: blocks of `block` codes in `nbytes` bytes, with a scale d as f16 or (`scale_at` None) elsewhere. A weight is code *
    d."""

    block: int
    nbytes: int
    scale_at: int | None  # byte of the scale in a block
    parts: tuple[tuple[int, int, Layout], ...]  # (first byte, bytes, layout) of the codes, in the order of the codes

    def unpack(self, blocks: U8) -> I8:
        """uint8 [n, nbytes] -> codes, int8 [n, block]: trits, but +2 where a two-bit code is 3."""
        return np.concatenate([layout.unpack(blocks[:, at : at + size]) for at, size, layout in self.parts], axis=1)

    def scales(self, blocks: U8) -> NDArray[np.float32]:
        """uint8 [n, nbytes] -> float32 [n]."""
        assert self.scale_at is not None
        stored: NDArray[np.float32] = np.ascontiguousarray(blocks[:, self.scale_at : self.scale_at + 2]).view("<f2").astype(np.float32)
        return stored[:, 0]

    def two_bit(self) -> TwoBitBlocks | None:
        """Where the codes lie, if they are all of two bits in one place."""
        at, _, layout = self.parts[0]
        if len(self.parts) != 1 or not isinstance(layout, Bits) or layout.per_byte != 4:
            return None
        return TwoBitBlocks(self.block, self.nbytes, at, layout.run, descending=layout.shifts[0] > layout.shifts[-1])

    def pack(self, codes: I8, scales: NDArray[np.float32] | None = None) -> U8:
        """codes int8 [n, block], scales [n] that f16 holds exactly -> uint8 [n, nbytes]."""
        blocks = np.zeros((len(codes), self.nbytes), np.uint8)
        first = 0
        for at, size, layout in self.parts:
            count = size * layout.per_byte
            blocks[:, at : at + size] = layout.pack(codes[:, first : first + count])
            first += count
        if self.scale_at is not None:
            assert scales is not None
            blocks[:, self.scale_at : self.scale_at + 2] = np.asarray(scales, "<f2").reshape(-1, 1).view(np.uint8)
        return blocks


@dataclass(frozen=True)
class Bits:
    """Codes in fields of 8 / len(shifts) bits, plus `lowest`: code k * `run` + p of a stretch lies in byte p at bit shifts[k]."""

    run: int  # bytes of a stretch
    shifts: tuple[int, ...]
    factor: int = 1  # code = lowest + factor * field
    lowest: int = -1

    @property
    def per_byte(self) -> int:
        return len(self.shifts)

    def unpack(self, packed: U8) -> I8:
        shifts = np.array(self.shifts, np.uint8).reshape(-1, 1)
        mask = np.uint8((1 << (8 // self.per_byte)) - 1)
        fields = (packed.reshape(len(packed), -1, 1, self.run) >> shifts) & mask
        codes = fields.reshape(len(packed), -1).view(np.int8)
        codes *= np.int8(self.factor)
        codes += np.int8(self.lowest)
        return codes

    def pack(self, codes: I8) -> U8:
        fields = codes - np.int8(self.lowest)
        if self.factor != 1:
            fields //= np.int8(self.factor)
        parts = fields.view(np.uint8).reshape(len(codes), -1, self.per_byte, self.run)
        packed = np.zeros((len(codes), parts.shape[1], self.run), np.uint8)
        for k, shift in enumerate(self.shifts):
            packed |= parts[:, :, k] << np.uint8(shift)
        return packed.reshape(len(codes), -1)


@dataclass(frozen=True)
class Trits:
    """Up to five base-3 digits in a byte, as the fraction v / 243 of 256, rounded up: digit k of every byte, then digit k + 1 of every
    byte."""

    per_byte: int

    def unpack(self, packed: U8) -> I8:
        return np.take(_DIGITS[:, : self.per_byte], packed, axis=0).swapaxes(1, 2).reshape(len(packed), -1)

    def pack(self, codes: I8) -> U8:
        digits = (codes + np.int8(1)).astype(np.uint16).reshape(len(codes), self.per_byte, -1)
        powers = np.array([81, 27, 9, 3, 1], np.uint16)[: self.per_byte].reshape(-1, 1)
        value = (digits * powers).sum(axis=1, dtype=np.uint16)
        return np.asarray((value * np.uint16(256) + np.uint16(242)) // np.uint16(243), np.uint16).astype(np.uint8)


# trit of digit k of a byte, int8 [256, 5]: ((b * 3^k mod 256) * 3) >> 8, less 1
_DIGITS = (((np.arange(256)[:, None] * 3 ** np.arange(5)) % 256 * 3 >> 8) - 1).astype(np.int8)
_PAIRS = (0, 2, 4, 6)
TWO_BIT = Bits(1, _PAIRS)  # codes in order, the first in the lowest bits: MLX's 2-bit words, too, which are little-endian
_SIGNS = Bits(1, tuple(range(8)), factor=2)

Layout = Bits | Trits
BLOCKS = {
    "i2_s": BlockCodec(128, 32, None, ((0, 32, Bits(32, (6, 4, 2, 0))),)),
    "i2_s_arm": BlockCodec(128, 32, None, ((0, 32, Bits(16, (6, 4, 2, 0))),)),
    "tq2_0": BlockCodec(256, 66, 64, ((0, 64, Bits(32, _PAIRS)),)),
    "tq1_0": BlockCodec(256, 54, 52, ((0, 32, Trits(5)), (32, 16, Trits(5)), (48, 4, Trits(4)))),
    "q2_0": BlockCodec(64, 18, 0, ((2, 16, Bits(1, _PAIRS)),)),
    "q2_0_128": BlockCodec(128, 34, 0, ((2, 32, Bits(1, _PAIRS)),)),
    "ptq1_0": BlockCodec(128, 28, 26, ((0, 16, Trits(5)), (16, 8, Trits(5)), (24, 2, Trits(4)))),
    "q1_0": BlockCodec(128, 18, 0, ((2, 16, _SIGNS),)),
}
CODECS = {"hf": Codec(pack_hf, unpack_hf)}


@dataclass(frozen=True)
class Integers:
    """Our own format of integers in a safetensors file: rows of bytes; of several codes a byte the first column in the lowest bits."""

    dtype: str  # of the stored tensor: "I8" or "U8"
    values: tuple[
        int, ...
    ] = ()  # of the 16 codes of half a byte, the four of two bits or the two of one; empty: whole bytes, which are the integers

    @property
    def per_byte(self) -> int:
        return {0: 1, 16: 2, 4: 4, 2: 8}[len(self.values)]

    def unpack(self, packed: U8) -> I8:
        """uint8 [rows, bytes] -> int8 [rows, in]"""
        if not self.values:
            return packed.view(np.int8)
        if self.per_byte > 2:
            return (_SIGNS if self.per_byte == 8 else TWO_BIT).unpack(packed)
        halves = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(len(packed), -1)
        return np.array(self.values, np.int8)[halves]

    def pack(self, codes: I8) -> U8:
        """int8 [rows, in], of them no others than `values` -> uint8 [rows, bytes]"""
        if not self.values:
            return np.ascontiguousarray(codes).view(np.uint8)
        if self.per_byte > 2:
            return (_SIGNS if self.per_byte == 8 else TWO_BIT).pack(codes)
        places = np.zeros(256, np.uint8)
        places[np.array(self.values[::-1], np.int8).view(np.uint8)] = np.arange(
            len(self.values) - 1, -1, -1, dtype=np.uint8
        )  # 0 is 0, not -0
        fields = places[codes.view(np.uint8)]
        return np.asarray(fields[:, ::2] | (fields[:, 1::2] << np.uint8(4)), np.uint8)


INTEGERS = {
    "int8": Integers("I8"),
    "int4": Integers("U8", tuple(range(-8, 8))),
    "fp4": Integers("U8", (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)),  # E2M1, doubled: the sign is the highest bit
}
# of a safetensors file; binary and ternary as they are trained, with float32 scales of a row or of groups
STORED = {**INTEGERS, "binary": Integers("U8", (-1, 1)), "ternary": Integers("U8", (-1, 0, 1, 2))}
