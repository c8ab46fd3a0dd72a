"""What every weight becomes: by the plain rules, or layer by layer over calibration text; and what was chosen, for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.calibrated import best_rows, best_threshold, output_error
from bitnet.convert.formats import Format
from bitnet.convert.gptq import ErrorFeedback
from bitnet.convert.layerwise import Product, plain_product, walk
from bitnet.convert.quantize import (
    GROUP,
    TABLES,
    Alpha,
    Ternarization,
    binary,
    fits,
    grouped,
    groups_of,
    integer,
    is_quantized,
    representable,
    ternarized,
)
from bitnet.convert.source import F32, Model, Weight, from_codes
from bitnet.errors import UsageError
from bitnet.files import shown
from bitnet.models import LINEARS, Checkpoint, latent_weights, quantization
from bitnet.packing import INTEGERS

_UNITS: tuple[str | int, ...] = ("tensor", "row", 128, 64)  # what may share a scale, each within those before it


@dataclass(frozen=True)
class Choice:
    """How one weight was chosen."""

    rule: str  # "threshold", "absmean", "gptq", "auto", "least error" or the scheme's name
    alpha: Alpha | None = None  # where there is one
    output_error: float | None = None  # with calibration text: norm of the outputs' change by their norm
    heads: tuple[float, ...] = ()  # the same by attention head


def choose(
    model: Model, form: Format, scheme: str | None, how: Ternarization, text: NDArray[np.int32] | None, notes: list[str],
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Weight], dict[str, Choice]]:  # fmt: skip
    """(every weight as `scheme` makes it, how those that changed were chosen); what has codes already keeps them.

    text: calibration text, int32 [sequences, tokens], or None.
    """
    wanted, choices = dict(model.weights), dict[str, Choice]()
    if scheme in (None, "fp16"):  # fp16 is made where weights are fitted to the format
        return wanted, {name: Choice("fp16") for name, weight in wanted.items() if scheme and is_quantized(weight)}
    feedback = ErrorFeedback() if how.method == "gptq" and scheme == "ternary" else None
    product: Product = plain_product if feedback is None else feedback.product

    def choose_one(weight: Weight, gram: F32 | None) -> Weight:
        name, alpha = weight.name, how.alpha_of(weight.name)
        if not _changes(weight, how):
            return weight
        stored, unit, head = scale_dtype(weight, form), how.unit(weight.kind), model.config.head_dim if weight.kind in "qkv" else 0
        taken: Alpha | None = None
        if scheme == "binary":
            made, rule = binary(weight, _binary_unit(weight, form), stored), "binary"
        elif scheme != "ternary":
            made, rule = integer(weight, str(scheme)), str(scheme)
        elif gram is None and (feedback is not None or alpha == "auto"):  # a table
            made, rule, taken = best_rows(weight, unit, stored), "least error", "auto" if alpha == "auto" else None
        elif feedback is not None:
            assert gram is not None
            made, rule = feedback.ternary(weight, gram, unit, stored), "gptq"
        elif alpha == "auto":
            assert gram is not None
            (made, taken), rule = best_threshold(weight, gram, unit, stored, head, product), "auto"
        else:
            made, rule, taken = ternarized(weight, how, stored), how.method, alpha if how.method == "threshold" else None
        wanted[name] = representable(weight, made)
        if gram is None:
            choices[name] = Choice(rule, taken)
        else:
            rows = weight.shape[0]
            error = output_error(weight.values(0, rows), made.values(0, rows), gram, plain_product, head)
            choices[name] = Choice(rule, taken, error.relative, error.heads)
        return made

    embedding = choose_one(model.weights["embedding"], None)
    if text is not None:
        walk(model, embedding, text, choose_one, product, lambda done, total: progress("calibrating", done, total))
    else:
        for name, weight in model.weights.items():
            if is_quantized(weight) and name != "embedding":
                choose_one(weight, None)
    _note(model, wanted, scheme, how, notes)
    return wanted, choices


def _changes(weight: Weight, how: Ternarization) -> bool:
    return is_quantized(weight) and weight.codes is None and how.alpha_of(weight.name) != "keep"


def stand_ins(model: Model, form: Format, scheme: str | None, how: Ternarization) -> dict[str, Weight]:
    """For every weight that `choose` will change one of its shape with as many scales: so what the format does not hold is refused, and
    the file's length known, before anything is computed."""
    if scheme in (None, "fp16"):
        return {}
    found = {}
    for name, weight in model.weights.items():
        if not _changes(weight, how):
            continue
        rows, inputs = weight.shape
        unit = _binary_unit(weight, form) if scheme == "binary" else how.unit(weight.kind) if scheme == "ternary" else GROUP
        shape = (1 if unit == "tensor" else rows, groups_of(weight, unit))
        scales = np.asarray(1 + (np.arange(shape[0])[:, None] + np.arange(shape[1])) % 2, np.float32)  # each differs from its neighbours
        found[name] = from_codes(name, weight.shape, str(scheme), weight.where, lambda a, b, n=inputs: np.ones((b - a, n), np.int8), scales)  # type: ignore[misc]
    return found


def check(model: Model, form: Format, scheme: str | None, how: Ternarization, notes: list[str]) -> None:
    """Raises UsageError for what `scheme` and `how` cannot mean for this model; a pattern that fits no layer of it is noted."""
    c, layers = model.config, {name: weight for name, weight in model.weights.items() if is_quantized(weight)}
    if scheme == "ternary" and form.weights == "q1_0" and any(_changes(weight, how) for weight in layers.values()):
        raise UsageError(f"{form.name} is binary and holds no zeros; choose another format, such as gguf-tq2_0, or --quantization binary")
    refuse_keeping_all(layers.values(), form, scheme, how)
    heads = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
    check_alphas(how, {name: heads.get(weight.kind, 0) for name, weight in layers.items()}, notes)
    for name, weight in layers.items():
        kept = how.alpha_of(name) == "keep"
        if scheme == "binary" and weight.scheme == "ternary" and weight.kind in LINEARS and not kept and _has_zeros(weight):
            raise UsageError(
                f"{weight.where}: is ternary already, and binary has no place for its zeros; leave --quantization out to keep it as it is"
            )


def check_alphas(how: Ternarization, heads: Mapping[str, int | None], notes: list[str]) -> None:
    """Raises UsageError for a list of alphas that are not one for each head; a pattern that fits no layer is noted.

    heads: of every layer, 0 where it has none, None where their number is not known.
    """
    notes += [f"pattern {shown(repr(p))} fits no layer of this model" for p, _ in how.alphas if not any(fits(p, name) for name in heads)]
    for name, n in heads.items():
        alpha = how.alpha_of(name)
        if isinstance(alpha, tuple) and n is not None and len(alpha) != n:
            wanted = f"{n}, one for each head" if n else "one number, for it has no heads"
            raise UsageError(f"alpha of {name}: is a list of {len(alpha)}; expected {wanted}")


def refuse_keeping_all(layers: Iterable[Weight], form: Format, scheme: str | None, how: Ternarization) -> None:
    """Raises UsageError where what is kept leaves nothing that the scheme changes, or a packed format nothing that it packs."""
    kept = any(alpha == "keep" for _, alpha in how.alphas)
    if kept and scheme == "fp16":
        raise UsageError("fp16 brings every weight into f16, and none can be kept; leave --keep out")
    if kept and not any(weight.codes is not None or _changes(weight, how) for weight in layers if form.dense or weight.kind in LINEARS):
        raise UsageError(f"every linear layer is kept as it is, so {form.name} would hold nothing {scheme}; keep fewer layers")


def _has_zeros(weight: Weight) -> bool:
    codes = weight.codes
    return codes is not None and any(bool((codes(first, last) == 0).any()) for first, last in weight.spans())


def dequantized(model: Model, scheme: str | None) -> Model:
    """int8, int4 and fp4 weights as the plain numbers that they stand for, where another scheme than theirs is asked for."""
    if scheme is None:
        return model
    plain = {
        name: replace(w, scheme="f32", codes=None, scales=None) if w.scheme in INTEGERS and w.scheme != scheme else w
        for name, w in model.weights.items()
    }
    return replace(model, weights=plain)


def _note(model: Model, wanted: dict[str, Weight], scheme: str | None, how: Ternarization, notes: list[str]) -> None:
    if scheme != "ternary":
        return
    had_codes = [w for w in model.weights.values() if w.codes is not None]
    if had_codes:
        notes.append(f"{len(had_codes)} weights of the source are ternary or binary already and stay what they are")
    linears = [w for name, w in model.weights.items() if w.kind in LINEARS and (w.codes is not None or wanted[name] is not w)]
    found = [_two_valued(w) for w in linears]
    units = [unit for unit in found if unit is not None]
    if not found or len(units) < len(found):
        return
    finest = max((unit for w, unit in zip(linears, units, strict=True) if w.codes is None), key=_UNITS.index, default="tensor")
    fine = how.scale if how.scale in _UNITS else 64 if 64 % int(how.scale) == 0 else "row"
    if _UNITS.index(fine) >= _UNITS.index(finest):
        notes.append(
            "weights of -s and +s yield no zeros for any alpha below 1: ternary formats hold them without a loss, and without a gain; "
            "only the weights that they were binarized from would (found none in the checkpoint)"
        )
    else:
        every, unit = (f"{finest} inputs", f"group:{finest}") if isinstance(finest, int) else (finest, finest)
        notes.append(
            f"weights of -s and +s, with an s for every {every}: what shares a scale here is more, so the small ones become zeros; "
            f"--scale {unit} keeps them as they are"
        )


def _two_valued(weight: Weight) -> str | int | None:
    """Over what all weights are -s and +s with one s, of the tensor, a row, 128 or 64 inputs the most; None where there is none.

    Looked up in the first rows.
    """
    rows, inputs = min(16, weight.shape[0]), weight.shape[1]
    if weight.codes is not None:
        return None if (weight.codes(0, rows) == 0).any() else "tensor"
    size = np.abs(weight.values(0, rows))
    if not (size > 0).all():
        return None
    if (size == size[0, 0]).all():
        return "tensor"
    parts = {"row": 1} | {group: inputs // group for group in (128, 64) if inputs % group == 0}
    return next((unit for unit, n in parts.items() if (grouped(size, n) == grouped(size, n)[:, :, :1]).all()), None)


def with_latent_weights(checkpoint: Checkpoint, notes: list[str]) -> Checkpoint:
    """`checkpoint` with the weights that it was binarized or ternarized from in the places of those, if it has them beside."""
    tensors, taken, others = dict(checkpoint.tensors), list[str](), list[str]()
    for name, its in latent_weights(checkpoint).items():
        latent, run = tensors.pop(its), tensors[name]
        padded = (-(-latent.shape[0] // 4) * 4, *latent.shape[1:]) if run.codec == "hf" and latent.shape else latent.shape
        if run.shape not in (latent.shape, padded):  # packed rows come in fours; read() compares with the model's own shape
            others.append(f"{latent.where} has shape {list(latent.shape)}, its layer {list(run.shape)}")
            continue
        if run.scale is not None:
            tensors.pop(run.scale.name, None)
        tensors[name] = latent
        taken.append(its)
    if others:
        notes.append(f"latent weights of {len(others)} layers are not taken, for they are of another shape (the first: {others[0]})")
    config = checkpoint.config
    if taken:
        notes.append(f"took the latent weights of {len(taken)} layers, which the checkpoint has beside those that it runs")
        if (q := quantization(config, shown(checkpoint.path))) is not None:  # which goes on to hold for the other layers
            mode = {"quantization_mode": "online" if q.online else "offline", "linear_class": "autobitlinear"}
            said = {"quant_method": "bitnet", **mode, "modules_to_not_convert": [*q.dense, *taken]}
            config = config | {"quantization_config": said}
    return replace(checkpoint, tensors=tensors, config=config)


def _binary_unit(weight: Weight, form: Format) -> str | int:
    """What shares a scale where weights become binary: a block of the format, else a row of a table, else the tensor."""
    return form.block or ("row" if weight.kind in TABLES or form.dense else "tensor")


def scale_dtype(weight: Weight, form: Format) -> str:
    """How the scales of a weight that becomes ternary will be stored, so that they are rounded once, here."""
    if form.dense:
        return form.weights
    if weight.kind in TABLES and (form.container in ("hf", "safetensors") or form.weights == "i2_s"):
        return weight.scheme if weight.scheme in ("f32", "bf16") else "f16"
    return "f16" if form.container == "mlx" else "reciprocal" if form.weights == "bitlinear" else form.scale
