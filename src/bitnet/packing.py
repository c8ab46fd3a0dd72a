"""How codes lie in bytes: one small numpy codec for each storage format, and one table of them.

A code is t + 1, so 0, 1, 2 stand for -1, 0, +1; two bits hold it, and the fourth value, 3, stands for nothing.

"hf" is the layout that `transformers` calls BitNet (integrations/bitnet.py, `pack_weights`). A weight [out, in] is cut into four bands of
R = ceil(out/4) rows, and bits 2i..2i+1 of byte P[r, c] hold the code of W[i*R + r, c]. So a byte holds four rows that lie far apart, and
where out is no multiple of 4 the last band is short: its missing codes are 0, as `transformers` writes them, and unpack as rows of -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 17  # packed bytes worked on at once: they and the four bands made of them stay in the second-level cache


class Codec(NamedTuple):
    """`pack`: int8 trits [out, in] -> uint8 bytes; `unpack`: uint8 bytes -> int8 trits, padding rows included."""

    pack: Callable[[NDArray[np.int8]], NDArray[np.uint8]]
    unpack: Callable[[NDArray[np.uint8]], NDArray[np.int8]]


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


CODECS = {"hf": Codec(pack_hf, unpack_hf)}
