"""Low-rank adapters (LoRA, arXiv:2106.09685) as they are in memory, whatever file they come from (peft.py, lora_gguf.py).

Beside a linear layer y = W x lie A [rank, in] and B [out, rank]: y = W x + scale * B (A x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files.tensor import Tensor


@dataclass(frozen=True)
class LowRank:
    """What stands beside one matrix."""

    scheme: str  # "f32", "f16" or "bf16", whose bits come as uint16
    a: NDArray[Any]  # [rank, in]
    b: NDArray[Any]  # [out, rank], rows in Hugging Face's order
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def dense(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A and B in float32."""
        return widened(self.scheme, self.a), widened(self.scheme, self.b)

    def codes(self) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.float32]]:
        """As the engine keeps it: A and B as integers up to 32,767, and float32 [rank], which A x is then multiplied by.

        Each row of A and column of B has a step of its own: a value moves by 2^-16 of the largest beside it at most. Where all of them are
        +-s or 0, as ternary factors are, they do not move; their integers are +-1 and 0, which the engine keeps in 8 bits. The scale of
        zeros alone is 0, for what it multiplies shares a step with its neighbours later (ternary.round_fours).
        """
        a, b = (side.astype(np.float64) for side in self.dense())
        rows, columns = _steps(a, 1), _steps(b, 0)
        scales = (self.scale * rows[:, 0] * columns[0]).astype(np.float32)
        return _counted(a, rows), _counted(b, columns), scales

    def delta(self) -> NDArray[np.float32]:
        """What it adds to the matrix, float32 [out, in]: scale * B A."""
        a, b = self.dense()
        return np.asarray((b @ a) * np.float32(self.scale), np.float32)


def _steps(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    sizes = np.abs(values)
    largest = np.asarray(sizes.max(axis=axis, keepdims=True))
    return largest if ((sizes == 0) | (sizes == largest)).all() else largest / 32767


def _counted(values: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.int16]:
    return np.rint(np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)).astype(np.int16)


def widened(scheme: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values in float32."""
    bits = (values.astype(np.uint32) << np.uint32(16)).view(np.float32) if scheme == "bf16" else values
    return np.asarray(bits, np.float32)


def stored_pair(name: str, a: Tensor, b: Tensor, shape: tuple[int, ...], where: str) -> tuple[str, NDArray[Any], NDArray[Any]]:
    """(scheme, A, B) beside the matrix `name` of this shape; both in float32 where they are stored in two ways.

    Raises FormatError for shapes that do not fit and for numbers that are none, UnsupportedModelError for other types.
    """
    rank = a.shape[0] if len(a.shape) == 2 else 0
    if rank < 1 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        raise FormatError(
            f"{where}: {name} has A {list(a.shape)} and B {list(b.shape)}, but that matrix of the base is {list(shape)}: expected "
            f"[rank, {shape[1]}] and [{shape[0]}, rank]; the adapter is for a model of other sizes"
        )
    for tensor in (a, b):
        if tensor.scheme not in ("f32", "f16", "bf16"):
            raise UnsupportedModelError(f"{tensor.where}: is stored as {tensor.scheme.upper()}; expected F32, F16 or BF16")
        if not np.isfinite(tensor.dense()).all():
            raise FormatError(f"{tensor.where}: holds NaN or infinity; the file is damaged or training diverged")
    return (a.scheme, a.raw(), b.raw()) if a.scheme == b.scheme else ("f32", a.dense(), b.dense())
