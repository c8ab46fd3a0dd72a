"""What a model's weights look like, per kind of matrix over the layers, and what in them no training leaves behind.

A matrix W [out, in] whose inputs have variance 1 gives outputs of standard deviation rms(W) sqrt(in): its gain. Trained models have
gains of about 0.3 to 10 (measured: 0.6 to 1.2 in gemma-3-270m, 3.7 to 10 in the embedded model). A scale that divides where it should
multiply turns s into 1/s and is visible there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError
from bitnet.evaluate.finding import FAILED, OK, WARNING, Finding
from bitnet.files.tensor import Tensor
from bitnet.models import LINEARS, Canonical, Checkpoint

MATRICES = (*LINEARS, "embedding", "head")
SAMPLED_ROWS = 1024  # of a matrix, spread over it, where each row is looked at
SAMPLED_VALUES = 1 << 22  # of a dense matrix, in rows
GAIN = (1 / 30, 30.0)
SCALES_APART = 100.0  # between the layers of one kind
MOSTLY = 0.5  # share of three values that makes a dense tensor look like a ternary one that was spoilt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Matrix:
    """One matrix in numbers."""

    name: str
    kind: str  # of MATRICES
    scheme: str
    zeros: float  # shares
    plus: float
    minus: float
    scale: float | None  # of ternary and binary: the mean
    n_scales: int
    gain: float
    most: int  # the largest code; 1 unless Q2_0 holds +2
    same_rows: float  # share of rows that another one repeats
    empty_rows: float  # share of rows of zeros
    spoilt: bool  # dense, and all but a part of it three values


def matrices(checkpoint: Checkpoint, model: Canonical, progress: Progress | None = None) -> Iterator[Matrix | Finding]:
    """Every matrix in numbers, or what is wrong with one that cannot be read."""
    places = [(ours.rpartition(".")[2], theirs) for ours, theirs in model.names.items()]
    places = [(kind, theirs) for kind, theirs in places if kind in MATRICES]
    for done, (kind, theirs) in enumerate(places):
        try:
            yield _matrix(kind, checkpoint.tensors[theirs])
        except BitNetError as error:
            yield Finding(f"{kind} weights", FAILED, str(error), _advice(str(error)))
        if progress:
            progress(done + 1, len(places))


def _advice(error: str) -> str:
    if "one scale for the tensor" in error:
        return "several scales, as training in shards leaves them: merge them by requantizing, or take the model's masters"
    return "download or convert the file again"


def _matrix(kind: str, tensor: Tensor) -> Matrix:
    rows, inputs = tensor.shape
    if tensor.scheme in ("ternary", "binary"):
        codes, scales = tensor.codes(), tensor.scales()
        mean = float(np.abs(scales).mean(dtype=np.float64)) if np.isfinite(scales).all() else float("nan")
        used = float(np.square(codes, dtype=np.int32).mean())
        power = float(np.square(scales, dtype=np.float64).mean()) * used
        shares, most, spoilt = _shares(codes), int(codes.max(initial=0)), False
        sample: NDArray[Any] = codes[:: max(1, rows // SAMPLED_ROWS)]
        n_scales = scales.size
    else:
        values = _sampled(tensor)
        power = float(np.square(values, dtype=np.float64).mean())
        shares, most, mean, n_scales = _shares(values), 1, None, 0
        sample, spoilt = values[:: max(1, len(values) // SAMPLED_ROWS)], kind in LINEARS and _spoilt(values)
    same, empty = _rows(sample)
    return Matrix(tensor.name, kind, tensor.scheme, *shares, mean, n_scales, float(np.sqrt(power * inputs)), most, same, empty, spoilt)


def _shares(values: NDArray[Any]) -> tuple[float, float, float]:
    """Of zeros, of what is above, and of what is below."""
    n = max(1, values.size)
    return float((values == 0).sum() / n), float((values > 0).sum() / n), float((values < 0).sum() / n)


def _sampled(tensor: Tensor) -> NDArray[np.float32]:
    """Rows of a dense matrix: all, or of a large one 16 runs of neighbours."""
    rows, inputs = tensor.shape
    if rows * inputs <= SAMPLED_VALUES:
        return tensor.dense()
    run = max(1, SAMPLED_VALUES // inputs // 16)
    return np.concatenate([tensor.dense_rows(at, min(rows, at + run)) for at in range(0, rows, max(run, rows // 16))])


def _spoilt(values: NDArray[np.float32]) -> bool:
    """Whether most values are 0 or one magnitude, and the rest is not: masters have no such, ternary weights nothing else."""
    magnitudes, counts = np.unique(np.abs(values[: SAMPLED_ROWS // 4]), return_counts=True)
    common = np.sort(counts)[-2:].sum() if 0 in magnitudes else counts.max()
    return bool(len(magnitudes) > 2 and common > MOSTLY * counts.sum() and np.sort(counts)[-2:].min() > 0.05 * counts.sum())


def _rows(sample: NDArray[Any]) -> tuple[float, float]:
    """Shares of the rows that are copies of an earlier one, and that are all zeros."""
    filled = sample[sample.any(axis=1)]
    different = len({row.tobytes() for row in filled})
    return (len(filled) - different) / max(1, len(sample)), 1 - len(filled) / max(1, len(sample))


def findings(found: list[Matrix], quiet: bool = False) -> Iterator[Finding]:
    """What is odd about the numbers; one line of OK if nothing is, unless `quiet`."""
    odd = [finding for matrix in found for finding in _of_one(matrix)]
    odd += [finding for kind in LINEARS for finding in _of_kind(kind, [m for m in found if m.kind == kind])]
    yield from grouped(odd)
    if not odd and not quiet:
        yield Finding("weights", OK, f"{len(found)} matrices: finite, of plausible size, no rows copied or empty")


def _of_one(m: Matrix) -> Iterator[Finding]:
    at = repr(m.name)
    if not np.isfinite(m.gain):
        yield Finding(
            f"{m.kind} weights", FAILED, f"{at} holds NaN or infinity, or its scale does", "download it again; or training diverged"
        )
    elif m.gain == 0:
        what = "its scale is 0" if m.zeros < 1 else "all weights are 0"
        yield Finding(f"{m.kind} weights", FAILED, f"{at}: {what}", "the file is damaged or the conversion broke off; convert again")
    elif m.kind in LINEARS and not GAIN[0] <= m.gain <= GAIN[1]:
        detail = f"{at}: rms * sqrt(inputs) is {m.gain:.3g}, trained models have 0.3 to 10"
        yield Finding("weight scales", WARNING, detail, "a scale may divide where it should multiply, or the reverse (linear_class)")
    if m.scheme == "ternary" and m.most > 1:
        yield Finding(f"{m.kind} weights", WARNING, f"{at} holds +2 beside -1, 0 and +1", "it is no ternary tensor; it runs as int8")
    if m.spoilt:
        detail = f"{at}: mostly three values, but not only"
        yield Finding(f"{m.kind} weights", WARNING, detail, "ternary weights were changed after training; convert the original again")
    if m.same_rows > 0.02 and m.kind in LINEARS:
        yield Finding(
            f"{m.kind} weights", WARNING, f"{at}: {m.same_rows:.0%} of its rows are copies", "a conversion may have repeated them"
        )
    untrained = m.same_rows + m.empty_rows
    if m.kind in ("embedding", "head") and untrained > 0.02:
        detail = f"{at}: {untrained:.0%} of its rows are empty or copies: tokens that were never trained"
        yield Finding(f"{m.kind} rows", WARNING, detail, "harmless unless the tokenizer uses them")


def _of_kind(kind: str, layers: list[Matrix]) -> Iterator[Finding]:
    scales = [m.scale for m in layers if m.scale and np.isfinite(m.scale)]
    if scales and max(scales) > SCALES_APART * min(scales):
        detail = f"scales run from {min(scales):.3g} to {max(scales):.3g} over the layers"
        yield Finding(f"{kind} scale", WARNING, detail, "some are damaged or of another convention; compare with the original")


def grouped(odd: list[Finding]) -> Iterator[Finding]:
    """One line for each kind of finding, with the first as its example."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in odd:
        groups.setdefault((finding.what, finding.status, finding.advice), []).append(finding)
    for (what, status, advice), members in groups.items():
        more = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
        yield Finding(what, status, members[0].detail + more, advice)


def table(found: list[Matrix]) -> list[str]:
    """Per kind of matrix: smallest, median and largest of its layers."""
    rows = [("matrix", "stored as", "n", "zeros, %", "+ / -, %", "scale", "rms * sqrt(inputs)")]
    for kind in MATRICES:
        for scheme in sorted({m.scheme for m in found if m.kind == kind}):
            some = [m for m in found if m.kind == kind and m.scheme == scheme]
            signs = f"{100 * np.mean([m.plus for m in some]):.0f} / {100 * np.mean([m.minus for m in some]):.0f}"
            zeros = _spread([100 * m.zeros for m in some], ".0f")
            scales = _spread([m.scale for m in some if m.scale is not None], ".3g")
            gains = _spread([m.gain for m in some if kind in LINEARS], ".3g")
            rows.append((kind, scheme, str(len(some)), zeros, signs, scales, gains))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _spread(values: list[float], form: str) -> str:
    """ "min .. median .. max", one number where they are the same, "-" where there is none."""
    if not values:
        return "-"
    three = [format(float(v), form) for v in (min(values), float(np.median(values)), max(values))]
    return three[0] if len(set(three)) == 1 else " .. ".join(three)
