"""Ordinary weights -> codes times scales, without calibration. Rules that look at a layer's inputs: calibrated.py, gptq.py.

- threshold: T = sign(W) where |W| > alpha * mean|W|, else 0, and scale = the mean of |W| over the weights that are kept. For a given T that
  is the scale of least squared error: |W - sT|^2 is smallest at s = sum(W T) / sum(T^2), and T is the sign of W where it is not 0
  (arXiv:1605.04711). absmean's scale, mean|W| over all weights, would be too small by the weights that became zeros.
- absmean (BitNet b1.58, arXiv:2402.17764): scale = mean|W|, T = clip(round(W / scale), -1, 1): a threshold of 0.5 mean|W|.

A scale holds for the whole tensor, for a row (an output), or for a group of a row's inputs; mean and threshold are taken over the same
weights. Alphas may differ by layer and, in a list, by attention head. The embedding and the head have a scale for every row at least: a row
is a token, and tokens differ in length.

int8, int4 and fp4 are in groups of 32 inputs with f16 scales, as GGUF's Q8_0 and Q4_0 hold the first two; binary has its format's scales.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.source import F32, I8, Weight, from_codes
from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, read_file, shown
from bitnet.models import LINEARS
from bitnet.packing import TWO_BIT, bf16_bits
from bitnet.ternary import quantize_binary, quantize_fp4, quantize_int4

SCHEMES = ("ternary", "binary", "int8", "int4", "fp4", "fp16")
METHODS = ("threshold", "absmean", "gptq")
TABLES = ("embedding", "head")
# The article's alphas by kind of layer. It leaves o_proj out; that one writes into the residual stream, as down_proj does, with no softmax
# behind it that would forgive an error as it does those of queries and keys: so it has the feed-forward's.
ALPHAS = {"embedding": 0.05, "head": 0.05, "q": 0.08, "k": 0.08, "v": 0.08, "o": 0.06, "gate": 0.06, "up": 0.06, "down": 0.06}
GROUP = 32  # of int8, int4 and fp4
SMALLEST = 1e-5  # absmean's scale, as BitNet models are trained; and that of weights that are nothing but zeros
TINY = np.finfo(np.float32).tiny  # a scale whose reciprocal is finite
MODULES = {
    "embedding": "embed_tokens", "head": "lm_head", **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip

Alpha: TypeAlias = float | str | tuple[float, ...]  # a number, "auto", "keep" (the layer stays as it is), or one for every head


@dataclass(frozen=True)
class Ternarization:
    """How weights become ternary."""

    method: str = "threshold"  # one of METHODS
    alpha: float | str | None = None  # of every layer, a number or "auto"; None: ALPHAS
    scale: str | int = "tensor"  # what shares a scale: "tensor", "row", or so many inputs of a row
    alphas: tuple[tuple[str, Alpha], ...] = ()  # (pattern of names, what holds for it); the first that matches, before `alpha`

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        if self.method != "threshold" and (self.alpha is not None or any(alpha != "keep" for _, alpha in self.alphas)):
            raise UsageError(f"{self.method} has no alpha: it sets its own thresholds; leave out one of the two")
        if self.scale not in ("tensor", "row") and not (isinstance(self.scale, int) and self.scale > 0 and self.scale % 32 == 0):
            raise UsageError(f"scale is {self.scale!r}; expected tensor, row, or group:N, a multiple of 32 inputs that share one")

    def alpha_of(self, name: str) -> Alpha:
        """Of the layer with this canonical name."""
        found = next((alpha for pattern, alpha in self.alphas if fits(pattern, name)), None)
        if found is not None:
            return found
        return ALPHAS[name.rsplit(".", 1)[-1]] if self.alpha is None else self.alpha

    @property
    def given(self) -> list[str]:
        """What of it differs from the defaults."""
        alphas = [alpha for _, alpha in self.alphas]
        found = {
            "alpha": self.alpha is not None or any(alpha != "keep" for alpha in alphas), "keep": "keep" in alphas,
            "method": self.method != "threshold", "scale": self.scale != "tensor",
        }  # fmt: skip
        return [name for name, given in found.items() if given]

    @property
    def calibrated(self) -> bool:
        """Whether it needs to know the layers' inputs."""
        listed = any(alpha == "auto" and pattern != "embedding" for pattern, alpha in self.alphas)  # of which the rows are what counts
        return self.method == "gptq" or self.alpha == "auto" or listed

    def unit(self, kind: str) -> str | int:
        """What shares a scale in a weight of this kind."""
        return "row" if self.scale == "tensor" and kind in TABLES else self.scale


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern means the layer with this canonical name."""
    return any(fnmatchcase(n, pattern) for n in _names(name))


def _names(name: str) -> tuple[str, ...]:
    """The names by which a pattern may call a layer: "layers.0.q", "q", and Hugging Face's, with its module and without."""
    kind = name.rsplit(".", 1)[-1]
    module = MODULES[kind]
    return (name, kind, f"model.{name.removesuffix(kind)}{module}", module, module.rsplit(".", 1)[-1])


def _check_alpha(what: str, alpha: Any) -> Alpha:
    if alpha in ("auto", "keep") and what != "alpha":
        return str(alpha)
    alpha = [_as_meant(a) for a in alpha] if isinstance(alpha, (list, tuple)) else _as_meant(alpha)
    if isinstance(alpha, (list, tuple)) and alpha and what != "alpha":
        if all(map(_is_number, alpha)):
            return tuple(map(float, alpha))
        bad = next(a for a in alpha if not _is_number(a))
        raise UsageError(f"{what} has {shown(repr(bad))} in its list; expected a finite number >= 0 there for every head")
    if not _is_number(alpha) and (alpha != "auto" or what != "alpha"):
        more = "" if what == "alpha" else ', "keep", or a list of one for every head'
        raise UsageError(f'{what} is {shown(repr(alpha))}; expected a finite number >= 0 (0.05 to 0.1 is usual), "auto"{more}')
    return "auto" if alpha == "auto" else float(alpha)


def _as_meant(alpha: Any) -> Any:
    """5e-2 as a number, which YAML 1.1 takes for a text."""
    return float(alpha) if isinstance(alpha, str) and _EXPONENT.fullmatch(alpha) else alpha


_EXPONENT = re.compile(r"[0-9]+(\.[0-9]*)?e[+-]?[0-9]{1,3}", re.IGNORECASE)


def _is_number(alpha: Any) -> bool:
    return isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 <= alpha <= sys.float_info.max


def read_alphas(path: PathLike) -> tuple[tuple[str, Alpha], ...]:
    """A file of alphas by pattern of layers' names, `{"layers.0.*": 0.1, "q_proj": "auto", "embedding": "keep"}`: JSON, or YAML with
    pyyaml.

    Raises UsageError for another content, and for YAML without pyyaml.
    """
    raw, where = read_file(path, 1 << 24), shown(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([key for key, _ in pairs], where)
        return dict(pairs)

    try:
        found = json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError):
        found = _yaml(raw, where)
    if not isinstance(found, dict) or not found or not all(isinstance(pattern, str) for pattern in found):
        raise UsageError(f'{where}: expected an object of patterns and alphas, such as {{"layers.0.*": 0.1, "*": 0.06}}')
    if isinstance(found.get("alphas"), dict):  # of a report
        found = found["alphas"]
        if not found:
            raise UsageError(f"{where}: is a report without alphas, for its method or scheme has none; ask for that again, or name alphas")
    check_patterns(found, where)
    return tuple((pattern, _check_alpha(f"{where}: alpha of {shown(repr(pattern))}", alpha)) for pattern, alpha in found.items())


def _refuse_twice(keys: list[Any], where: str) -> None:
    twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
    if twice is not None:
        raise UsageError(f"{where}: has {shown(repr(twice))} twice, and only one can hold; leave one of the two out")


def check_asked(quantization: str | None, ternarization: Ternarization | None, calibrated: bool) -> None:
    """Raises UsageError for a scheme that is none, and for what is asked of one that does not have it. `calibrated`: a text is given."""
    if quantization is not None and quantization not in SCHEMES:
        raise UsageError(f"quantization is {quantization!r}; expected one of {', '.join(SCHEMES)}")
    given = [] if ternarization is None else ternarization.given
    of_ternary = [name for name in given if name != "keep"]
    if of_ternary and quantization != "ternary":
        raise UsageError(f"{' and '.join(of_ternary)}: of quantization 'ternary' only; add it (--ternary), or leave that out")
    if ternarization is not None and quantization is None:
        what = "keep" if given else "ternarization"
        raise UsageError(f"{what}: of a quantization only, and none was asked for; add one (--ternary, --quantization), or leave that out")
    if calibrated and quantization in (None, "fp16"):
        raise UsageError("calibration text is for schemes that choose what weights become; add --ternary, or leave it out")


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raises UsageError for one that fits no layer of any model: a name that is misspelt."""
    unknown = next((p for p in patterns if not any(fnmatchcase(n, p) for n in _EXAMPLES)), None)
    if unknown is not None:
        raise UsageError(f"{where}: pattern {shown(repr(unknown))} fits no layer's name; names are as in layers.0.q, q_proj, embedding")


_EXAMPLES = [n for i in range(200) for kind in LINEARS for n in _names(f"layers.{i}.{kind}")] + [n for t in TABLES for n in _names(t)]


def _yaml(raw: bytes, where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UsageError(f"{where}: is no JSON, and to read YAML pyyaml must be installed (pip install pyyaml)") from None
    try:
        root = yaml.compose(raw, Loader=yaml.SafeLoader)
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        for node in (root, *(value for _, value in pairs)):  # the patterns, or a report's in it
            _refuse_twice([key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else [], where)
        return yaml.safe_load(raw)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:  # some of them of bad values
        raise UsageError(f"{where}: is neither JSON nor YAML ({shown(' '.join(str(error).split()))})") from None


def is_quantized(weight: Weight) -> bool:
    """Whether a scheme is for this one: the linear layers, the embedding and the head, but no vector."""
    return weight.kind in (*LINEARS, *TABLES)


def ternarized(weight: Weight, how: Ternarization, stored: str) -> Weight:
    """`weight` by `how`; its scales are rounded to `stored` ("f32", "f16", "bf16"), as they will lie in the file."""
    unit = how.unit(weight.kind)
    rows, inputs = weight.shape
    groups = groups_of(weight, unit)
    alpha = _by_row(weight, how.alpha_of(weight.name)) if how.method == "threshold" else None
    units = (1, 1) if unit == "tensor" else (rows, groups)
    sums, kept, counts = np.zeros(units), np.zeros(units), np.zeros(units)

    def place(first: int, last: int) -> slice:
        return slice(0, 1) if unit == "tensor" else slice(first, last)

    def add(to: NDArray[np.float64], first: int, last: int, values: NDArray[np.float64]) -> None:
        """values [rows, inputs] to the sums of their units."""
        summed = values.sum().reshape(1, 1) if unit == "tensor" else values.reshape(last - first, groups, -1).sum(axis=2)
        to[place(first, last)] += summed

    for first, last in weight.spans():
        add(sums, first, last, np.abs(finite(weight, first, last), dtype=np.float64))
    mean = sums / (rows * inputs / sums.size)

    def threshold(first: int, last: int) -> NDArray[np.float64]:
        """[rows or 1, groups, 1]"""
        assert alpha is not None
        return (alpha[first:last] if len(alpha) > 1 else alpha)[:, :, None] * mean[place(first, last), :, None]

    if alpha is None:
        exact = np.maximum(mean, SMALLEST).astype(np.float32)
    else:
        for first, last in weight.spans():
            size = np.abs(weight.values(first, last), dtype=np.float64)
            above = grouped(size, groups) > threshold(first, last)
            add(kept, first, last, np.where(above, grouped(size, groups), 0).reshape(size.shape))
            add(counts, first, last, above.reshape(size.shape).astype(np.float64))
        found = np.where(counts > 0, kept / np.maximum(counts, 1), mean)
        exact = np.where(found > 0, np.maximum(found, TINY), SMALLEST).astype(np.float32)

    def codes(first: int, last: int) -> I8:
        values = grouped(weight.values(first, last), groups)
        if alpha is None:
            trits = np.clip(np.rint(values / exact[place(first, last), :, None]), -1, 1).astype(np.int8)
        else:
            limit = threshold(first, last)
            trits = (values > limit).astype(np.int8) - (values < -limit).astype(np.int8)
        return np.asarray(trits.reshape(last - first, inputs), np.int8)

    return from_codes(weight.name, weight.shape, "ternary", weight.where, codes, rounded(exact, stored))


def groups_of(weight: Weight, unit: str | int) -> int:
    """Scales of a row. Raises UsageError where its inputs are no whole groups."""
    inputs = weight.shape[1]
    if isinstance(unit, int) and inputs % unit:
        raise UsageError(f"{weight.where}: has {inputs} inputs, which are no whole groups of {unit}; choose another scale")
    return inputs // unit if isinstance(unit, int) else 1


def _by_row(weight: Weight, alpha: Alpha) -> NDArray[np.float64]:
    """[1, 1], or where every head has its own [rows, 1]."""
    if isinstance(alpha, str):
        raise UsageError(f"{weight.name}: alpha {alpha!r} needs calibration text; name a file with --calibration")
    if isinstance(alpha, float):
        return np.full((1, 1), alpha)
    if weight.shape[0] % len(alpha):
        raise UsageError(f"{weight.name}: has {weight.shape[0]} outputs, and {len(alpha)} alphas for its heads; expected one a head")
    return np.repeat(np.array(alpha), weight.shape[0] // len(alpha))[:, None]


def kept_codes(trits: I8) -> Callable[[int, int], I8]:
    """Trits that were computed once, kept in two bits each: what is chosen by calibration cannot be made again row by row."""
    inputs = trits.shape[1]
    packed = TWO_BIT.pack(np.pad(trits, ((0, 0), (0, -inputs % 4))))
    return lambda first, last: np.ascontiguousarray(TWO_BIT.unpack(packed[first:last])[:, :inputs])


def binary(weight: Weight, unit: str | int, stored: str) -> Weight:
    """`weight` as signs times mean|W|, as ternary.quantize_binary; over the tensor, too, where `unit` says so."""
    rows, groups = weight.shape[0], groups_of(weight, unit)

    def codes(first: int, last: int) -> I8:
        return quantize_binary(weight.values(first, last))[0]

    if unit == "tensor":
        total = sum(float(np.abs(finite(weight, *span), dtype=np.float64).sum()) for span in weight.spans())
        scales = np.full((1, 1), max(total / (rows * weight.shape[1]), TINY), np.float32)
    else:
        scales = np.empty((rows, groups), np.float32)
        for first, last in weight.spans():
            scales[first:last] = quantize_binary(finite(weight, first, last), weight.shape[1] // groups)[1]
    return from_codes(weight.name, weight.shape, "binary", weight.where, codes, rounded(scales, stored))


def integer(weight: Weight, scheme: str) -> Weight:
    """`weight` as int8, int4 or fp4 in groups of 32 inputs with f16 scales."""
    rows, inputs = weight.shape
    if inputs % GROUP:
        raise UsageError(f"{weight.where}: has {inputs} inputs, which are no whole groups of {GROUP}; {scheme} needs those")
    scales = np.empty((rows, inputs // GROUP), np.float32)
    with np.errstate(over="ignore"):  # `representable` speaks of it
        for first, last in weight.spans():
            scales[first:last] = _integers(finite(weight, first, last), scheme)[1]

    def codes(first: int, last: int) -> I8:
        return _integers(weight.values(first, last), scheme)[0]

    return from_codes(weight.name, weight.shape, scheme, weight.where, codes, scales)


def _integers(values: F32, scheme: str) -> tuple[I8, F32]:
    """(codes [rows, in], scales [rows, groups])."""
    if scheme != "int8":
        return (quantize_int4 if scheme == "int4" else quantize_fp4)(values, GROUP)
    scales = rounded(np.abs(grouped(values, values.shape[1] // GROUP)).max(axis=2) / np.float32(127), "f16")
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    found = np.clip(np.rint(grouped(values, scales.shape[1]) * inverse[:, :, None]), -127, 127)
    return found.astype(np.int8).reshape(values.shape), scales


def rounded(scales: F32, stored: str) -> F32:
    """Scales as `stored` holds them: "f16", "bf16", "f32", or as the "reciprocal" of a float32."""
    if stored == "f16":
        with np.errstate(over="ignore"):
            return scales.astype(np.float16).astype(np.float32)
    if stored == "bf16":
        return (bf16_bits(scales).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if stored == "reciprocal":
        with np.errstate(all="ignore"):
            return np.asarray(np.float32(1) / divisor(scales), np.float32)
    return scales


def representable(weight: Weight, made: Weight) -> Weight:
    """`made`, which `weight` has become. Raises UnsupportedModelError where its scales are beyond what stores them.

    Weights that vanish because their scale does are refused where they are more than f16's rounding of the layer's largest, 2^-11 of it:
    the rows of tokens that never were trained may be 1e-23.
    """
    todo = "leave them as they are (--keep), or make them ternary in a format of float32 scales, such as hf, safetensors or gguf-i2_s"
    if made.scales is None:
        return made
    if not np.isfinite(made.scales).all():
        raise UnsupportedModelError(
            f"{made.where}: has weights so large that f16 does not hold their scale as {made.scheme} (65,504 at most); {todo}"
        )
    if (made.scales == 0).any():
        largest = vanished = np.float32(0)
        for first, last in weight.spans():
            size = np.abs(grouped(weight.values(first, last), made.scales.shape[1])).max(axis=2)  # [rows, groups]
            gone = (made.scales if len(made.scales) == 1 else made.scales[first:last]) == 0
            largest, vanished = max(largest, size.max()), max(vanished, np.where(gone, size, 0).max())
        if vanished > 2.0**-11 * largest:
            raise UnsupportedModelError(
                f"{made.where}: has weights so small ({vanished:.1e} at most) that f16 rounds their scale as {made.scheme} to 0 (its "
                f"smallest number is 5.96e-08); {todo}"
            )
    return made


def divisor(scales: F32) -> F32:
    """float32 whose reciprocal is `scales`, or the nearest to that: the weight_scale of linear class bitlinear."""
    with np.errstate(all="ignore"):
        best = np.asarray(np.float32(1) / scales, np.float32)
        for candidate in (np.nextafter(best, np.float32(0)), np.nextafter(best, np.float32(np.inf))):
            better = np.abs(np.float32(1) / candidate - scales) < np.abs(np.float32(1) / best - scales)
            best = np.where(better, candidate, best)
    return np.asarray(best, np.float32)


def grouped(values: NDArray[Any], groups: int) -> NDArray[Any]:
    """[rows, inputs] -> [rows, groups, inputs of a group]."""
    return values.reshape(len(values), groups, -1)


def finite(weight: Weight, first: int, last: int) -> F32:
    values: F32 = weight.values(first, last)
    if not np.isfinite(values).all():
        raise FormatError(f"{weight.where}: holds NaN or infinity; the file is damaged or training diverged")
    return values
