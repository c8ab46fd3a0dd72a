"""A checkpoint's weights, read by rows: what each is, not how it is stored.

Rows come in Hugging Face's order, whatever the file's: GGUF keeps the rows of llama's queries and keys by pairs of rope's rotation.
What a tensor means is what the engine runs (bitnet/weights.py): masters that
are ternarized at load are ternary here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet import ternary
from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files.tensor import Tensor
from bitnet.models import LINEARS, Canonical, Checkpoint, ModelConfig, canonical
from bitnet.models.config import weight_shapes
from bitnet.packing import INTEGERS

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
Rows = Callable[[int, int], NDArray[Any]]  # (first, last) -> those rows

CHUNK = 1 << 21  # values worked on at once
_FLOATS = ("f32", "f64", "f16", "bf16")
_MAPPED_BYTES = 64 << 20  # of files, after which their pages are given back


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    name: str  # canonical: "layers.0.q", "embedding", "final_norm", ...
    shape: tuple[int, ...]
    scheme: str  # "ternary", "binary", "int8", "int4", "fp4": codes times scales; else its values' type: "f32", "q6_k", ...
    where: str  # what a message begins with
    values: Rows  # float32
    codes: Rows | None = None  # int8
    scales: F32 | None = None  # [1, 1], [rows, 1] or [rows, groups] of equal runs of a row's inputs
    stored: Rows | None = None  # uint8, the bytes of whole rows as `scheme` has them; of a matrix without codes
    offset: float = 0.0  # added to the values where they are used: 1 for gemma's norms in Hugging Face's files

    @property
    def kind(self) -> str:
        """ "q", "embedding", "attn_norm", ..."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where a row or more does."""
        assert self.scales is not None
        return self.shape[1] // self.scales.shape[1] if self.scales.shape[1] > 1 else 0

    def spans(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """All rows, in runs of about CHUNK values and of `multiple` rows (the last may be shorter)."""
        rows = self.shape[0]
        step = max(1, CHUNK // max(1, math.prod(self.shape[1:])) // multiple) * multiple
        return ((first, min(rows, first + step)) for first in range(0, rows, step))


@dataclass(frozen=True)
class Model:
    """A checkpoint in our terms, weight by weight in the order of the model."""

    checkpoint: Checkpoint
    canonical: Canonical
    weights: dict[str, Weight]

    @property
    def config(self) -> ModelConfig:
        return self.canonical.config


def read(checkpoint: Checkpoint) -> Model:
    """Of packed weights only the scales are read yet; masters that are ternarized at load are read once, for theirs.

    Raises as `models.canonical` does, and FormatError where a tensor has not the shape that the configuration gives it.
    """
    found = canonical(checkpoint)
    shapes = weight_shapes(found.config)
    weights = {ours: _weight(ours, checkpoint.tensors[theirs], shapes, found, checkpoint) for ours, theirs in found.names.items()}
    return Model(checkpoint, found, weights)


def from_codes(name: str, shape: tuple[int, ...], scheme: str, where: str, codes: Rows, scales: F32) -> Weight:
    """A weight that is codes times scales."""

    def values(first: int, last: int) -> F32:
        return scaled(codes(first, last), scales if len(scales) == 1 else scales[first:last])

    return Weight(name, shape, scheme, where, values, codes, scales)


def scaled(codes: I8, scales: F32) -> F32:
    """codes [rows, in] times scales [1 or rows, groups], float32."""
    rows, groups = codes.shape[0], scales.shape[1]
    return np.asarray(codes.reshape(rows, groups, -1) * scales[:, :, None], np.float32).reshape(codes.shape)


def permuted(rows: Rows, head: int, by_pairs: bool) -> Rows:
    """`rows`, of heads of `head` rows, in the other order: by rope's pairs (GGUF), or by the halves that rotate together (Hugging Face)."""
    split = (2, head // 2) if by_pairs else (head // 2, 2)

    def read(first: int, last: int) -> NDArray[Any]:
        begin, end = first // head, -(-last // head)
        whole = rows(begin * head, end * head)
        turned = whole.reshape(end - begin, *split, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        return np.ascontiguousarray(turned[first - begin * head : last - begin * head])

    return read


def _weight(name: str, tensor: Tensor, shapes: dict[str, tuple[int, ...]], model: Canonical, checkpoint: Checkpoint) -> Weight:
    kind, config = name.rsplit(".", 1)[-1], model.config
    shape = shapes[kind]
    padded = (-(-shape[0] // 4) * 4, *shape[1:])  # Hugging Face's packed ternary comes in fours of rows
    if tensor.shape != shape and not (tensor.codec == "hf" and tensor.shape == padded):
        raise FormatError(f"{tensor.where}: has shape {list(tensor.shape)}; the model's configuration makes it {list(shape)}")

    def rows(read: Rows) -> Rows:
        """In Hugging Face's order, and the file's pages given back in time."""
        turned = permuted(read, config.head_dim, by_pairs=False) if config.rope_interleaved and _turns(kind) else read
        count = 0

        def counted(first: int, last: int) -> NDArray[Any]:
            nonlocal count
            out = turned(first, last)
            count += tensor.nbytes * (last - first) // max(1, shape[0])
            if count >= _MAPPED_BYTES or last == shape[0]:
                tensor.forget_pages()
                count = 0
            return out

        return counted

    if tensor.scheme in ("ternary", "binary", *INTEGERS):
        scales = _scales(tensor, checkpoint)
        tensor.forget_pages()  # every block has been touched for its scale
        if config.rope_interleaved and _turns(kind) and len(scales) > 1:
            every = scales
            scales = permuted(lambda first, last: every[first:last], config.head_dim, by_pairs=False)(0, shape[0])
        return from_codes(name, shape, tensor.scheme, tensor.where, rows(tensor.code_rows), simplest(scales))
    if tensor.scheme == "bool" or (tensor.scheme[:1] in "iu" and tensor.scheme[1:].isdigit()):
        raise UnsupportedModelError(
            f"{tensor.where}: holds {tensor.scheme} without a scale that says what they stand for; expected f32, f16, bf16 or packed ones"
        )
    values = rows(tensor.dense_rows)
    if kind in LINEARS and tensor.scheme in _FLOATS and _online(tensor, model):
        return _ternarized(name, shape, tensor, values, checkpoint.layout)
    if kind.endswith("norm"):
        return Weight(name, shape, tensor.scheme, tensor.where, values, offset=config.norm_offset)
    stored = rows(tensor.row_bytes) if len(shape) == 2 else None
    return Weight(name, shape, tensor.scheme, tensor.where, values, stored=stored)


def _turns(kind: str) -> bool:
    """Whether a weight's rows are the outputs that rope rotates."""
    return kind in ("q", "k", "q_bias", "k_bias")


def _online(tensor: Tensor, model: Canonical) -> bool:
    """Whether these are masters that are ternarized at load."""
    q = model.quantization
    return q is not None and q.online and not q.stays_dense(tensor.name)


def _ternarized(name: str, shape: tuple[int, ...], tensor: Tensor, values: Rows, layout: str) -> Weight:
    """Masters by absmean, as the engine loads them; GGUF's weights of three values are what they are."""

    def whole() -> tuple[I8, np.float32]:
        master = values(0, shape[0])
        if not np.isfinite(master).all():
            raise FormatError(f"{tensor.where}: holds NaN or infinity; the file is damaged or training diverged")
        most = np.abs(master).max(initial=np.float32(0))
        if layout == "gguf" and ((master == 0) | (np.abs(master) == most)).all():
            return np.sign(master).astype(np.int8), most
        return ternary.absmean(master)

    kept: list[I8] = []

    def codes(first: int, last: int) -> I8:
        if first == 0 or not kept:
            kept[:] = [whole()[0]]
        found = kept[0][first:last]
        if last == shape[0]:
            kept.clear()
        return found

    return from_codes(name, shape, "ternary", tensor.where, codes, np.full((1, 1), whole()[1], np.float32))


def _scales(tensor: Tensor, checkpoint: Checkpoint) -> F32:
    """The tensor's scales, times the one that llama.cpp may keep beside it (`blk.0.attn_q.scale`)."""
    scales = tensor.scales()
    scales = scales.reshape(1, 1) if scales.ndim == 1 else scales
    extra = checkpoint.tensors.get(f"{tensor.name.removesuffix('.weight')}.scale") if checkpoint.layout == "gguf" else None
    if extra is not None:
        if math.prod(extra.shape) != 1:
            raise FormatError(f"{extra.where}: has shape {list(extra.shape)}; expected one scale for the tensor")
        scales = scales * extra.dense().reshape(())
    if not np.isfinite(scales).all():
        raise FormatError(f"{tensor.where}: what is stored with it gives a scale that is no finite number; the file is damaged")
    return scales


def simplest(scales: F32) -> F32:
    """The same scales, once where all are equal, and one a row where those of every row are."""
    if (scales == scales.flat[0]).all():
        return np.ascontiguousarray(scales[:1, :1])
    if (scales == scales[:, :1]).all():
        return np.ascontiguousarray(scales[:, :1])
    return scales
