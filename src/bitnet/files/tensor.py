"""One named array of a file, which stays in the file until it is asked for; and how packed weights find their scale.

A tensor is stored as plain numbers, as Hugging Face's packed ternary (a matrix of bytes with its scale beside it), as MLX's two-bit words
(with scales and biases beside them), as our own integers (X.weight with X.weight_int8_scale, _int4_scale, _fp4_scale, _binary_scale
or _ternary_scale beside it, floats [rows, groups]), or in GGUF's blocks."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import json_object, read_file, shown
from bitnet.files.ggml import I2_S_TAIL, VALUES, GgmlType
from bitnet.packing import BLOCKS, CODECS, STORED, TWO_BIT, TwoBitBlocks

# name in the file -> how numpy holds the stored values. numpy has no bfloat16 and no 8-bit floats: their bits come as whole numbers.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
MAX_CONFIG_BYTES = 16 << 20
CACHED_VALUES = 1 << 16
LINEAR_CLASSES = ("bitlinear", "autobitlinear")


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A reader makes these after it has checked that the bytes named here are in the file, so only values can still be wrong."""

    name: str
    shape: tuple[int, ...]  # of dense(); a ternary tensor stored as [R, in] has the shape (4R, in), padding rows included
    dtype: str  # of the stored values, a key of DTYPES; "U8" for packed ternary
    scheme: str  # "ternary"; "int8", "int4", "fp4" with scales beside them; or the dtype in small letters: "f32", "f16", "bf16", "u8", ...
    path: str
    data: mmap.mmap  # the whole file
    offset: int  # of this tensor's first byte in the file
    scale: Tensor | None = None  # of ternary: what is stored as `weight_scale`
    linear_class: str = ""  # of ternary: whether the scale divides ("bitlinear") or multiplies ("autobitlinear")
    codec: str = ""  # of Hugging Face's ternary: a key of packing.CODECS; "mlx"; of packing.STORED; of GGUF's: of packing.BLOCKS
    kind: GgmlType | None = None  # of GGUF's block formats, whose stored values are bytes
    bias: Tensor | None = None  # of MLX's ternary, where it is -scale: a weight is code * scale + bias with codes 0, 1, 2

    @property
    def where(self) -> str:
        return f"{shown(self.path)}: tensor {shown(self.name)!r}"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of raw()."""
        if self.kind is not None:
            tail = I2_S_TAIL if self.codec.startswith("i2_s") else 0
            return (prod(self.shape) // self.kind.block * self.kind.nbytes + tail,)
        if self.codec == "mlx":
            return (self.shape[0], self.shape[1] // 16)
        if self.codec in STORED:
            return (self.shape[0], self.shape[1] // STORED[self.codec].per_byte)
        return (self.shape[0] // 4, *self.shape[1:]) if self.scheme == "ternary" else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes that the values take in the file."""
        return prod(self.stored_shape) * DTYPES[self.dtype].itemsize

    def raw(self) -> NDArray[Any]:
        """The stored values, read-only, without a copy (but copied where they lie unaligned); of a block format its bytes, [nbytes].

        BF16 and 8-bit floats come as their bits.
        """
        dtype, shape = DTYPES[self.dtype], self.stored_shape
        if prod(shape) == 0:
            return np.empty(shape, dtype)
        values = np.frombuffer(self.data, dtype, prod(shape), self.offset)
        return np.require(values, requirements="A").reshape(shape)

    def row_bytes(self, first: int, last: int) -> NDArray[np.uint8]:
        """raw()[first:last] as bytes, [last - first, bytes of a row], without a copy; of a block format whose rows are whole blocks."""
        size = self._row_size()
        return np.frombuffer(self.data, np.uint8, (last - first) * size, self.offset + first * size).reshape(last - first, size)

    def forget_pages(self) -> None:
        """Give the memory of the whole file's mapped pages back to the system, which keeps the file in its cache."""
        if hasattr(self.data, "madvise"):  # not on every system, nor of bytes that are no file
            self.data.madvise(mmap.MADV_DONTNEED)

    @property
    def scale_group(self) -> int:
        """Inputs that share a scale in packed ternary or binary weights; 0 where all do."""
        if (self.codec == "mlx" or self.codec in STORED) and self.scale is not None:
            return self.shape[1] // self.scale.shape[1]
        blocks = BLOCKS.get(self.codec)
        return 0 if blocks is None or blocks.scale_at is None else blocks.block

    def two_bit_blocks(self) -> TwoBitBlocks | None:
        """How two-bit codes lie in row_bytes(); None where they are none, and where a block holds more than one row."""
        if self.kind is None or not self.codec or prod(self.shape[1:]) % self.kind.block:
            return None
        return BLOCKS[self.codec].two_bit()

    def _row_size(self) -> int:
        """Bytes of a stored row."""
        if self.kind is not None:
            return prod(self.shape[1:]) // self.kind.block * self.kind.nbytes
        return prod(self.stored_shape[1:]) * DTYPES[self.dtype].itemsize

    def dense(self) -> NDArray[np.float32]:
        """float32 values of `shape`; of a ternary tensor trits * scales. No copy is made of stored float32."""
        if self.scale is not None and self.kind is None:
            return self._scaled(self.codes(), 0)
        if self.kind is None:
            return self._plain(slice(None))
        out = np.empty(self.shape, np.float32)
        flat = out.reshape(-1, self.kind.block)
        for first, last in self._pieces(0, len(flat)):
            flat[first:last] = self._decoded(first, last)
        return out

    def dense_rows(self, first: int, last: int) -> NDArray[np.float32]:
        """dense()[first:last], made without the rest: for walking a large matrix."""
        if self.scale is not None and self.kind is None:
            return self._scaled(self.code_rows(first, last), first)
        if self.kind is None:
            return self._plain(slice(first, last))
        row = prod(self.shape[1:])
        begin, end = first * row // self.kind.block, -(-last * row // self.kind.block)
        values = self._decoded(begin, end).reshape(-1)[first * row - begin * self.kind.block :]
        return values[: (last - first) * row].reshape(last - first, *self.shape[1:])

    def trits(self) -> NDArray[np.int8]:
        """int8 -1, 0, +1 of `shape`. Raises FormatError for another scheme, and where a stored code is none of the three."""
        codes = self.codes()
        if self.codec.startswith("q2_0") and codes.max(initial=0) > 1:
            raise FormatError(f"{self.where}: holds a code of 3, which stands for +2 scales; expected -1, 0 and +1 of a ternary tensor")
        return codes

    def code_rows(self, first: int, last: int) -> NDArray[np.int8]:
        """codes()[first:last], made without the rest."""
        self._expect_codes()
        if self.kind is None and self.codec == "hf":
            return self._banded_rows(first, last)
        if self.codec in STORED:
            codes = STORED[self.codec].unpack(self.row_bytes(first, last))
            return self._checked(codes) if self.codec == "ternary" else codes
        if self.kind is None:
            return self._checked(TWO_BIT.unpack(self.row_bytes(first, last)))
        row, block = prod(self.shape[1:]), self.kind.block
        begin, end = first * row // block, -(-last * row // block)
        codes = np.empty(((end - begin), block), np.int8)
        for at, stop in self._pieces(begin, end):
            codes[at - begin : stop - begin] = BLOCKS[self.codec].unpack(self._blocks(at, stop))
        codes = codes.reshape(-1)[first * row - begin * block :][: (last - first) * row].reshape(last - first, *self.shape[1:])
        return codes if self.codec.startswith("q2_0") else self._checked(codes)

    def _banded_rows(self, first: int, last: int) -> NDArray[np.int8]:
        """Of Hugging Face's bytes, in which the codes of row r lie in byte r mod R at the bits of band r div R."""
        bands, packed = self.shape[0] // 4, self.raw()
        out = np.empty((last - first, *self.shape[1:]), np.uint8)
        for band in range(4):
            begin, end = max(first, band * bands), min(last, (band + 1) * bands)
            if begin < end:
                rows = out[begin - first : end - first]
                np.right_shift(packed[begin - band * bands : end - band * bands], np.uint8(2 * band), out=rows)
                np.bitwise_and(rows, np.uint8(3), out=rows)
        out -= np.uint8(1)
        return self._checked(out.view(np.int8))

    def _checked(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        if codes.max(initial=0) > 1:
            raise FormatError(f"{self.where}: holds a code of 3; expected 0, 1 and 2. The file is damaged or packed in another layout")
        return codes

    def _scaled(self, codes: NDArray[np.int8], first: int) -> NDArray[np.float32]:
        """Codes of the rows from `first` on, times their scales."""
        with np.errstate(all="ignore"):
            scales = self.scales()
            if scales.size == 1:
                return codes * scales
            groups = scales[first : first + len(codes), :, None]
            return np.asarray(codes.reshape(len(codes), groups.shape[1], -1) * groups, np.float32).reshape(codes.shape)

    def codes(self) -> NDArray[np.int8]:
        """int8 of `shape`, a weight being code * scale: the trits; in Q2_0 also +2. Raises FormatError for a scheme without codes."""
        self._expect_codes()
        if self.codec != "hf":
            return self.code_rows(0, self.shape[0])
        try:
            return CODECS[self.codec].unpack(self.raw())
        except ValueError as error:
            raise FormatError(f"{self.where}: {error}; the file is damaged or packed in another layout") from None

    def scales(self) -> NDArray[np.float32]:
        """float32 [1], one scale for the tensor, or [rows, groups] of equal runs of a row's inputs.

        Raises FormatError for a scheme without codes or another number of stored scales.
        """
        self._expect_codes()
        if self.kind is not None:
            if self.codec.startswith("i2_s"):
                return self.raw()[-I2_S_TAIL:][:4].view("<f4").astype(np.float32)
            return BLOCKS[self.codec].scales(self._blocks(0, prod(self.shape) // self.kind.block)).reshape(*self.shape[:-1], -1)
        scale = self.scale
        assert scale is not None
        if self.bias is not None:
            values = scale.dense()
            if not np.array_equal(self.bias.dense(), -values):
                raise UnsupportedModelError(
                    f"{self.bias.where}: is not -scale everywhere, so these are no ternary weights; of MLX's formats this build reads those"
                )
            return values
        if self.codec in STORED:
            return scale.dense()
        if prod(scale.shape) != 1:
            raise FormatError(f"{scale.where}: has shape {list(scale.shape)}; expected [1], one scale for the tensor")
        values = scale.dense().reshape(1)
        if self.linear_class == "autobitlinear":
            return values
        with np.errstate(all="ignore"):
            return (1 / values).astype(np.float32, copy=False)

    def _plain(self, rows: slice) -> NDArray[np.float32]:
        if self.dtype.startswith("F8"):
            raise UnsupportedModelError(f"{self.where}: has dtype {self.dtype}, which this build lists but does not compute with")
        with np.errstate(all="ignore"):  # NaN and infinity, stored or beyond float32, are for the caller to judge
            raw = self.raw() if rows == slice(None) else self.raw()[rows]
            if self.dtype == "BF16":
                raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
            if self.dtype == "BOOL":
                raw = raw.view(np.uint8) != 0
            return np.asarray(raw, np.float32)

    def _blocks(self, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of some blocks, [last - first, bytes of a block]."""
        assert self.kind is not None
        size = self.kind.nbytes
        return np.frombuffer(self.data, np.uint8, (last - first) * size, self.offset + first * size).reshape(-1, size)

    def _decoded(self, first: int, last: int) -> NDArray[np.float32]:
        """The values of some blocks, [last - first, block]."""
        with np.errstate(all="ignore"):
            if self.scheme in VALUES:
                return VALUES[self.scheme](self._blocks(first, last))
            if self.codec:
                codec, blocks = BLOCKS[self.codec], self._blocks(first, last)
                scales = self.scales() if codec.scale_at is None else codec.scales(blocks)[:, None]
                return codec.unpack(blocks) * scales
        raise UnsupportedModelError(f"{self.where}: is stored as {self.scheme}, which this build lists but does not compute with")

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Blocks in runs whose values stay in the second-level cache."""
        assert self.kind is not None
        step = max(1, CACHED_VALUES // self.kind.block)
        return ((first, min(end, first + step)) for first in range(begin, end, step))

    def as_ternary(self, scale: Tensor, linear_class: str, codec: str) -> Tensor:
        """This tensor of packed bytes [R, in] as the ternary one that it holds."""
        shape = (4 * self.shape[0], *self.shape[1:])
        return replace(self, shape=shape, scheme="ternary", scale=scale, linear_class=linear_class, codec=codec)

    def _expect_codes(self) -> None:
        if self.scale is None and not (self.kind is not None and self.codec):
            raise FormatError(f"{self.where}: is stored as {self.scheme}; expected packed ternary weights with a weight_scale beside them")


def pair_ternary(tensors: dict[str, Tensor], metadata: Mapping[str, str], folder: Path) -> dict[str, Tensor]:
    """The same names, packed weights as ternary; how their scale is meant stands in the config (metadata, else config.json beside)."""
    pairs = {}
    for name, weight in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if name.endswith("weight") and weight.dtype == "U8" and len(weight.shape) == 2 and scale and scale.dtype in ("F32", "F16", "BF16"):
            pairs[name] = scale
    if not pairs:
        return _pair_integers(_pair_mlx(tensors))
    linear_class = _linear_class(metadata, folder, shown(next(iter(pairs.values())).path))
    return {name: t.as_ternary(pairs[name], linear_class, "hf") if name in pairs else t for name, t in tensors.items()}


def _pair_mlx(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """MLX's two-bit words with their scales and biases as ternary weights, and without those two under names of their own."""
    found, parts = dict(tensors), []
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        scale, bias = tensors.get(f"{layer}.scales"), tensors.get(f"{layer}.biases")
        if weight.dtype != "U32" or len(weight.shape) != 2 or scale is None or bias is None or layer == name:
            continue
        rows, columns = weight.shape[0], weight.shape[1] * 16  # if of two bits; else the shape will not be the model's
        fits = len(scale.shape) == 2 and scale.shape == bias.shape and scale.shape[0] == rows and scale.shape[1] > 0
        if fits and columns / scale.shape[1] in (32, 64, 128) and {scale.dtype, bias.dtype} <= {"F32", "F16", "BF16"}:
            found[name] = replace(weight, shape=(rows, columns), scheme="ternary", codec="mlx", scale=scale, bias=bias)
            parts += [scale.name, bias.name]
    return {name: tensor for name, tensor in found.items() if name not in parts}


def _pair_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our own packed integers, which stand with their scales under a name that says what they are."""
    found, parts = dict(tensors), []
    for name, weight in tensors.items():
        for codec, integers in STORED.items():
            scale = tensors.get(f"{name}_{codec}_scale")
            if scale is None or weight.dtype != integers.dtype or len(weight.shape) != 2 or len(scale.shape) != 2:
                continue
            rows, columns = weight.shape[0], weight.shape[1] * integers.per_byte
            if scale.shape[0] == rows and scale.shape[1] and columns % scale.shape[1] == 0 and scale.dtype in ("F32", "F16", "BF16"):
                found[name] = replace(weight, shape=(rows, columns), scheme=codec, codec=codec, scale=scale)
                parts.append(scale.name)
    return {name: tensor for name, tensor in found.items() if name not in parts}


def _linear_class(metadata: Mapping[str, str], folder: Path, path: str) -> str:
    if "config" in metadata:
        raw, where = metadata["config"].encode(), f'{path}: metadata "config"'
    elif "quantization_config" in metadata:  # of weights that were written without the rest of a config
        raw, where = b'{"quantization_config": ' + metadata["quantization_config"].encode() + b"}", f"{path}: metadata"
    elif os.path.lexists(folder / "config.json"):
        raw, where = read_file(folder / "config.json", MAX_CONFIG_BYTES), shown(folder / "config.json")
    else:
        return "bitlinear"
    quantization = json_object(raw, where).get("quantization_config") or {}
    found = quantization.get("linear_class", "bitlinear") if isinstance(quantization, dict) else quantization
    if found not in LINEAR_CLASSES:
        raise UnsupportedModelError(f"{where}: linear_class is {shown(repr(found))}; expected {' or '.join(LINEAR_CLASSES)}")
    return str(found)
