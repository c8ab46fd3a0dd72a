"""From a checkpoint's tensors to the native model's: what each becomes, checked and repacked one at a time.

As stored, nothing is lost: ternary weights stay ternary and binary ones binary; f16, bf16 and f32 stay what they are and meet float32
activations. Block formats of other programs (Q4_K and its kin) become int8 with a scale per 32 inputs. On request everything that is not
packed becomes int8, int4, fp4, binary or ternary, as ternary.py defines them, row by row while it is read. Integer weights meet int8
activations. Ternary and binary ones with one step per token, as BitNet models are trained; the others, whose models were trained without,
with one step per 32 inputs: outliers in a few of gemma's channels make one step per token cost ten times as much (docs/log.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet import ternary
from bitnet._native import Matrix, release_freed_memory
from bitnet.engine import CODECS, Engine, check_binary_steps, check_codec, chosen_codec, new_native
from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files.tensor import Tensor
from bitnet.machine import require_memory
from bitnet.models import LINEARS, Canonical, Checkpoint, ModelConfig, canonical
from bitnet.models.config import weight_shapes
from bitnet.packing import INTEGERS

HEADS = ("stored", "int8", "int4")
QUANTIZED = {"int8": 32, "int4": 32, "fp4": 32, "binary": 0, "ternary": 0}  # -> inputs that share a scale and a step; 0: a whole row's
WEIGHTS = ("stored", "f16", *QUANTIZED)
_FLOATS = ("f32", "f64", "f16", "bf16")
_INTEGERS = tuple(INTEGERS)  # with the scales of their own file: they run as those very integers
_BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
PANEL_ROWS = 16  # of a matrix, which lie side by side in memory: rows are filled in whole panels
_CHUNK = 1 << 20  # values of a tensor worked on at once
_MAPPED_BYTES = 16 << 20  # of files, after which their pages are given back


def check_weights(weights: str, activation_group: int | None, head: str) -> None:
    """Raises `UsageError` for an option that is none."""
    if head not in HEADS:
        raise UsageError(f"head is {head!r}; expected one of {', '.join(HEADS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if activation_group is None:
        return
    whole = isinstance(activation_group, int) and not isinstance(activation_group, bool)
    if not whole or not 0 <= activation_group <= 65536 or activation_group % 16:
        raise UsageError(f"activation_group is {activation_group!r}; expected 0 (one step per token) or a multiple of 16, such as 32")
    if activation_group and weights == "f16":
        raise UsageError("activation_group has no meaning with weights='f16', whose activations stay float32")


def load_engine(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    head: str = "stored",
    weights: str = "stored",
    activation_group: int | None = None,
    codec: str = "auto",
    model: Canonical | None = None,
    model_elsewhere: Callable[[ModelConfig, int], Any] | None = None,
) -> Engine:
    """Repack a checkpoint's weights for this machine.

    `weights`: of the linear layers, "stored" as in the file (block formats as int8); one of `QUANTIZED` for all that are not packed ternary
    or binary ("ternary" changes nothing of a ternary model); or "f16" with float32 activations, the exact path of models that were trained
    so. Embedding and head are `head`'s: "stored" likewise, "int8" with a scale per row, or "int4" with one per 32 inputs.
    `activation_group`: inputs that share an int8 step, a multiple of 16; 0 for one step per token; None for what the weights want.
    `codec`: how ternary layers lie in memory, "t2", "b3" or "auto" (engine.chosen_codec); the results are the same bits.
    `model`: the checkpoint as somebody reads it who doubts what it says of itself (evaluate/trials.py).
    `model_elsewhere`: makes what stands for the native model, of a configuration and an activation group (train/device.py).
    Raises `UnsupportedModelError` for what this build does not compute, `FormatError` where names or shapes are not what the config says,
    `UsageError` for options that would not run a BitNet model as it was trained, and for codec "b3" with groups of activations.
    """
    check_weights(weights, activation_group, head)
    check_codec(codec)
    model = model or canonical(checkpoint)
    weights = as_stored_if_ternary(weights, checkpoint, model)
    config, tensors, where = model.config, checkpoint.tensors, str(checkpoint.path)
    if model.quantization and (weights not in ("stored", "int8") or activation_group):
        raise UsageError(f"{where}: is a BitNet model, trained with int8 activations per token; it runs as trained only (weights='stored')")
    shapes = weight_shapes(config)
    for ours, theirs in model.names.items():
        _check_shape(tensors[theirs], shapes[_kind(ours)], where)
        _check_scheme(tensors[theirs])
    require_memory(where, sum(_native_bytes(_kind(ours), tensors[theirs], model, weights) for ours, theirs in model.names.items()))
    layers = [tensors[theirs] for ours, theirs in model.names.items() if _kind(ours) in LINEARS]
    packed = [tensor for tensor in layers if tensor.scheme == "ternary"]
    binary = weights == "binary" or any(tensors[theirs].scheme == "binary" for theirs in model.names.values())
    if weights not in ("stored", "f16", "int8") and all(tensor.scheme in ("ternary", "binary") for tensor in layers):
        raise UsageError(f"{where}: its layers are packed {layers[0].scheme} already; leave weights={weights!r} out")
    if activation_group is None:
        first = [_becomes(tensors[model.names[f"layers.0.{part}"]], weights) for part in LINEARS]
        activation_group = 0 if model.quantization else max(QUANTIZED.get(scheme, 0) for scheme in first)
    if binary and weights != "f16":
        check_binary_steps(activation_group)
    release_freed_memory()  # of tokenizers and parsed JSON: the peak shall be the weights
    native = model_elsewhere(config, activation_group) if model_elsewhere else new_native(config, threads, activation_group)
    scale_group = min((tensor.scale_group for tensor in packed), default=0)
    ternary_codec = chosen_codec(codec, native.isa, activation_group if packed or weights == "ternary" else 0, scale_group)
    schemes = set()
    with ThreadPoolExecutor(native.threads) as pool:
        load = _Loader(native, model, checkpoint, weights, CODECS[ternary_codec], pool)
        for ours, theirs in model.names.items():
            tensor, kind = tensors[theirs], _kind(ours)
            if kind in LINEARS:
                schemes.add(load.linear(ours, tensor, shapes[kind]))
            elif kind in ("embedding", "head"):
                load.table(ours, tensor, shapes[kind], head if ours == "head" or config.tied else "stored")
            else:
                offset = config.norm_offset if kind.endswith("norm") else 0.0
                native.set_vector(ours, np.ascontiguousarray(_finite(tensor) + np.float32(offset), np.float32))
    if codec != "auto" and "ternary" not in schemes:
        raise UsageError(f"{where}: has no ternary layers in this way to run it; codec {codec!r} is for them, leave it out")
    scheme = next(scheme for scheme in ("ternary", "binary", "int4", "fp4", "int8", "dense") if scheme in schemes)
    runs = getattr(native, "codec", ternary_codec) if scheme == "ternary" else scheme
    return Engine(config, native, runs, head)


def as_stored_if_ternary(weights: str, checkpoint: Checkpoint, model: Canonical) -> str:
    """`weights`, but "stored" where it asks for ternary layers and the checkpoint's are so already."""
    if weights != "ternary":
        return weights
    layers = [checkpoint.tensors[theirs] for ours, theirs in model.names.items() if _kind(ours) in LINEARS]
    return "stored" if model.quantization or all(tensor.scheme == "ternary" for tensor in layers) else weights


def layer_norms(c: ModelConfig) -> list[str]:
    """The norms that a layer of this model has."""
    norms = ["attn_norm", "ffn_norm"]
    norms += ["attn_sub_norm", "ffn_sub_norm"] if c.sub_norms else []
    norms += ["post_attn_norm", "post_ffn_norm"] if c.post_norms else []
    return norms + (["q_norm", "k_norm"] if c.qk_norms else [])


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _check_shape(tensor: Tensor, expected: tuple[int, ...], where: str) -> None:
    found = tensor.shape
    if tensor.dtype == "U8" and tensor.scheme == "u8":
        raise FormatError(f"{where}: tensor {tensor.name!r} is packed (U8) but has no {tensor.name}_scale beside it; expected one float")
    padded = (-(-expected[0] // 4) * 4, *expected[1:])  # Hugging Face's packed ternary comes in fours of rows
    if found != expected and not (tensor.scheme == "ternary" and found == padded):
        raise FormatError(f"{where}: tensor {tensor.name!r} has shape {list(found)}; the model's configuration makes it {list(expected)}")


def _check_scheme(tensor: Tensor) -> None:
    known = (*_FLOATS, *_BLOCKS, *_INTEGERS, "ternary", "binary") if len(tensor.shape) == 2 else _FLOATS
    if tensor.scheme not in known:
        raise UnsupportedModelError(f"{tensor.where}: stored as {tensor.scheme}; this build computes with {', '.join(known)}")


def _becomes(tensor: Tensor, weights: str) -> str:
    """What `weights` makes of a linear layer, BitNet's apart: its own scheme, f16, or one of `QUANTIZED`."""
    if weights == "f16":
        return "f16"
    if tensor.scheme in ("ternary", "binary", *_INTEGERS) or (tensor.scheme in _FLOATS and weights == "stored"):
        return tensor.scheme
    return "int8" if weights == "stored" else weights


def scheme_bits(scheme: str, inputs: int) -> float:
    """Bits a weight of a linear layer with so many inputs, scales included."""
    bits, scale = {"f16": (16, 0), "bf16": (16, 0), "int8": (8, 32), "int4": (4, 16), "fp4": (4, 16), "binary": (1, 32), "ternary": (2, 0)}[
        scheme
    ]
    return bits + scale / (QUANTIZED.get(scheme) or inputs)


def _native_bytes(kind: str, tensor: Tensor, model: Canonical, weights: str) -> int:
    """About what the tensor will take."""
    size = math.prod(tensor.shape)
    if kind not in LINEARS:
        return tensor.nbytes if tensor.scheme in _FLOATS else size
    scheme = "ternary" if model.quantization and model.quantization.online else _becomes(tensor, weights)
    return tensor.nbytes if scheme in _FLOATS and scheme != "f16" else int(size * scheme_bits(scheme, tensor.shape[1]) / 8)


def _finite(tensor: Tensor) -> NDArray[np.float32]:
    return _all_finite(tensor, tensor.dense())


def _all_finite(tensor: Tensor, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise _not_finite(tensor)
    return values


def _not_finite(tensor: Tensor) -> FormatError:
    return FormatError(f"{tensor.where}: holds NaN or infinity; the file is damaged or training diverged")


class _Loader:
    """Sets one matrix after another; what it holds is the same for all."""

    def __init__(
        self, native: Any, model: Canonical, checkpoint: Checkpoint, weights: str, ternary_scheme: str, pool: ThreadPoolExecutor
    ) -> None:
        self.ternary_scheme = ternary_scheme  # native, of the linear layers
        self.native, self.quantization, self.weights, self.pool = native, model.quantization, weights, pool
        self.layout, self.tensors = checkpoint.layout, checkpoint.tensors
        self.filling = ""  # which linear layer
        self.mapped_bytes = 0  # of files, since they were last given back

    def table(self, name: str, tensor: Tensor, shape: tuple[int, ...], scheme: str) -> None:
        """The embedding or the head."""
        self.filling = name
        if self.weights == "f16" and scheme == "stored" and tensor.scheme not in _FLOATS:
            self._set_f16(name, tensor, shape)
        elif tensor.scheme in ("ternary", "binary") and scheme == "stored":
            self._set_codes(name, tensor, shape, "ternary")
        elif tensor.scheme in _INTEGERS and scheme == "stored":
            self._set_integers(name, tensor, shape)
        elif tensor.scheme in _FLOATS and scheme == "stored":
            self._set_floats(name, tensor, shape)
        elif scheme == "int4":
            self._set_quantized(name, tensor, shape, "int4", QUANTIZED["int4"])
        else:
            self._set_quantized(name, tensor, shape, "int8", 0 if scheme == "int8" else QUANTIZED["int8"])

    def linear(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
        """One linear layer; returns the scheme that it runs in: one of `QUANTIZED`, or "dense"."""
        self.filling = name
        q = self.quantization
        if tensor.scheme in ("ternary", "binary"):
            if self.weights == "f16":
                return self._set_f16(name, tensor, shape)
            return self._set_codes(name, tensor, shape, self.ternary_scheme)
        if tensor.scheme in _INTEGERS and self.weights != "f16":
            return self._set_integers(name, tensor, shape)
        if q is not None and not q.stays_dense(tensor.name) and tensor.scheme in _FLOATS:
            return self._set_ternarized(name, tensor, shape)
        scheme = _becomes(tensor, self.weights)
        if scheme == "ternary":
            return self._set_ternarized(name, tensor, shape)
        if scheme in QUANTIZED:
            return self._set_quantized(name, tensor, shape, scheme, QUANTIZED[scheme])
        return self._set_f16(name, tensor, shape) if self.weights == "f16" else self._set_floats(name, tensor, shape)

    def _set_codes(self, name: str, tensor: Tensor, shape: tuple[int, ...], ternary_scheme: str) -> str:
        """Ternary or binary weights as they are stored. Q2_0 can hold +2 as a code, which is then int8 with the same scales."""
        scales = self._scales(tensor)
        if not np.isfinite(scales).all():
            raise FormatError(
                f"{tensor.where}: what is stored beside it gives a scale of {scales[~np.isfinite(scales)][0]}; expected finite numbers"
            )
        if scales.size == 1 or (scales == scales.flat[0]).all():
            scales = np.full((shape[0], 1), scales.flat[0], np.float32)
        scheme = "ternary" if tensor.scheme == "ternary" else "binary"
        matrix = self._matrix(ternary_scheme if scheme == "ternary" else "binary", shape, scales.shape[1])
        if scheme == "binary" or not self._fill_stored(matrix, tensor):
            codes = np.ascontiguousarray(tensor.codes()[: shape[0]])
            if codes.max() > 1:
                scheme, matrix = "int8", self._matrix("int8", shape, scales.shape[1])
            matrix.fill_codes(0, codes)
        matrix.set_scales(0, np.ascontiguousarray(scales, np.float32))
        self.native.set_matrix(name, matrix)
        return scheme

    def _set_integers(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
        """Integers and their scales as they are stored."""
        scales = np.ascontiguousarray(tensor.scales(), np.float32)
        if not np.isfinite(scales).all():
            raise _not_finite(tensor)
        matrix = self._matrix(tensor.scheme, shape, scales.shape[1])
        for first, last in _spans(shape):
            matrix.fill_codes(first, np.ascontiguousarray(tensor.code_rows(first, last)))
            self._was_read(tensor, tensor.nbytes * (last - first) // shape[0])
        matrix.set_scales(0, scales)
        self.native.set_matrix(name, matrix)
        return tensor.scheme

    def _fill_stored(self, matrix: Any, tensor: Tensor) -> bool:
        """Codes as they lie in the file; False where there are others than of trits, or a layout that native code does not read."""
        found: bool
        if tensor.codec == "hf":
            stored = tensor.stored_shape[0]
            found = matrix.fill_banded(tensor.row_bytes(0, stored))
            self._was_read(tensor, tensor.nbytes)
            return found
        layout = tensor.two_bit_blocks()
        if layout is None:
            return False
        for first, last in _spans(tensor.shape):
            blocks = tensor.row_bytes(first, last)
            found = matrix.fill_two_bit(first, blocks, **layout._asdict())
            self._was_read(tensor, blocks.nbytes)
            if not found:
                return False
        return True

    def _scales(self, tensor: Tensor) -> NDArray[np.float32]:
        """The tensor's scales, times the one that llama.cpp may keep beside it (`blk.0.attn_q.scale`)."""
        extra = self.tensors.get(f"{tensor.name.removesuffix('.weight')}.scale") if self.layout == "gguf" else None
        if extra is None:
            return tensor.scales()
        if math.prod(extra.shape) != 1:
            raise FormatError(f"{extra.where}: has shape {list(extra.shape)}; expected one scale for the tensor")
        return tensor.scales() * _finite(extra).reshape(())

    def _ternarized(self, tensor: Tensor) -> tuple[NDArray[np.int8], np.float32]:
        """Master weights by absmean. GGUF writers ternarize before they write: weights of three values are what they are."""
        values = _finite(tensor)
        most = np.abs(values).max(initial=np.float32(0))
        if self.layout == "gguf" and ((values == 0) | (np.abs(values) == most)).all():
            return np.sign(values).astype(np.int8), most
        return ternary.absmean(values)

    def _set_floats(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
        self._set_values(name, tensor, shape, self._matrix("f32" if tensor.scheme == "f64" else tensor.scheme, shape))
        return "dense"

    def _set_quantized(self, name: str, tensor: Tensor, shape: tuple[int, ...], scheme: str, group: int) -> str:
        """`group`: inputs that share a scale; 0 for one scale per row. Quantized as ternary.quantize_int8 and its kin say."""
        self._set_values(name, tensor, shape, self._matrix(scheme, shape, -(-shape[1] // group) if group else 1))
        return scheme

    def _set_ternarized(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
        """By absmean, one scale for the tensor."""
        trits, scale = self._ternarized(tensor)
        matrix = self._matrix(self.ternary_scheme, shape)
        matrix.fill_codes(0, trits)
        matrix.set_scales(0, np.full((shape[0], 1), scale, np.float32))
        self.native.set_matrix(name, matrix)
        return "ternary"

    def _set_values(self, name: str, tensor: Tensor, shape: tuple[int, ...], matrix: Any) -> None:
        """Values into a matrix of their own scheme, or quantized into one of int8, int4, fp4 or binary."""
        finite = True
        if tensor.scheme in ("f32", "f16", "bf16"):
            for first, last in _spans(shape):
                stored = tensor.row_bytes(first, last)
                finite = finite and matrix.fill_values(first, tensor.scheme, stored)
                self._was_read(tensor, stored.nbytes)
        else:
            for first, values in self._made(tensor, shape, lambda values: values):
                finite = finite and matrix.fill_values(first, "f32", values.view(np.uint8))
        if not finite:
            raise _not_finite(tensor)
        self.native.set_matrix(name, matrix)

    def _set_f16(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
        if tensor.scheme == "f16":
            return self._set_floats(name, tensor, shape)

        def halves(values: NDArray[np.float32]) -> NDArray[np.float16]:
            with np.errstate(over="ignore"):
                bits = _all_finite(tensor, values).astype(np.float16)
            if not np.isfinite(bits).all():
                raise UnsupportedModelError(f"{tensor.where}: holds values beyond f16's 65,504; expected a scheme that can hold them")
            return bits

        matrix = self._matrix("f16", shape)
        for first, bits in self._made(tensor, shape, halves):
            matrix.fill_values(first, "f16", bits.view(np.uint8))
        self.native.set_matrix(name, matrix)
        return "dense"

    def _matrix(self, scheme: str, shape: tuple[int, ...], n_groups: int = 1) -> Any:
        elsewhere = getattr(self.native, "Matrix", None)
        if elsewhere is not None:
            return elsewhere(self.native, scheme, shape[0], shape[1], n_groups)
        return Matrix(self.native, scheme, shape[0], shape[1], n_groups, self.filling)

    def _made(
        self, tensor: Tensor, shape: tuple[int, ...], make: Callable[[NDArray[np.float32]], NDArray[Any]]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, what `make` gives of the dense rows), in order; other threads are some runs ahead, and no more."""
        whole = tensor.dense() if tensor.codec == "hf" else None  # its bytes hold rows that lie far apart

        def work(first: int, last: int) -> NDArray[Any]:
            return np.ascontiguousarray(make(whole[first:last] if whole is not None else tensor.dense_rows(first, last)))

        ahead: deque[tuple[int, Future[NDArray[Any]]]] = deque()
        for first, last in _spans(shape):
            ahead.append((first, self.pool.submit(work, first, last)))
            if len(ahead) > self.native.threads:
                at, future = ahead.popleft()
                yield at, future.result()
            self._was_read(tensor, tensor.nbytes * (last - first) // shape[0])
        for at, future in ahead:
            yield at, future.result()

    def _was_read(self, tensor: Tensor, nbytes: int) -> None:
        """Mapped pages count as this process's memory: they are given back in time, but not so often that it costs."""
        self.mapped_bytes += nbytes
        if self.mapped_bytes >= _MAPPED_BYTES:
            tensor.forget_pages()
            self.mapped_bytes = 0


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """All rows, in runs of about _CHUNK values and of whole panels."""
    step = max(1, _CHUNK // shape[1] // PANEL_ROWS) * PANEL_ROWS
    return ((first, min(shape[0], first + step)) for first in range(0, shape[0], step))
