"""What quantizing has done to a model, weight by weight: as a table, as JSON, and as a picture."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.choice import Choice
from bitnet.convert.formats import Format
from bitnet.convert.quantize import TABLES
from bitnet.convert.source import Weight
from bitnet.convert.target import MODEL_FILES
from bitnet.errors import BitNetError, UsageError
from bitnet.files import PathLike, place_of, read_file, shown
from bitnet.files.ggml import TYPES
from bitnet.files.gguf_write import IDS
from bitnet.files.replacing import new_file
from bitnet.files.tensor import MAX_CONFIG_BYTES
from bitnet.models import LINEARS
from bitnet.packing import INTEGERS

DESTROYED = 2.0  # times the perplexity: what was learned is gone
NOTICEABLE = 1.05
ENOUGH = 256  # tokens: with some 3 nats of deviation for each, their mean is known to 0.2, and ln 2 = 0.69 stands out
MOVED = 0.2  # of their norm: what weights of a model that was not trained for it seldom survive
REPORT_BYTES, LAYER_BYTES = 1 << 18, 1 << 12  # of both files at most: the picture and what does not grow, and a layer's numbers
KINDS = ("embedding", *LINEARS, "head")
_MATPLOTLIB = "the picture needs matplotlib, which is not installed (pip install matplotlib): the report has its numbers"


@dataclass(frozen=True)
class Layer:
    """One weight before and after."""

    name: str
    shape: tuple[int, ...]
    rule: str
    alpha: Any  # a number, of rows their mean, or one for every attention head; None where the rule has none
    zeros: float  # share of its weights
    bits_per_weight: float  # in the file, scales included
    weight_error: float  # norm of the change by the norm
    output_error: float | None  # the same of its outputs over the calibration text
    head_output_errors: tuple[float, ...]

    @property
    def kind(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def measure(plain: Mapping[str, Weight], written: Mapping[str, Weight], choices: Mapping[str, Choice], form: Format) -> list[Layer]:
    """Reads every weight that was chosen, as it was and as it is written."""
    layers = []
    for name, choice in choices.items():
        before, after = plain[name], written[name]
        zeros, change, total = 0, 0.0, 0.0
        for first, last in before.spans():
            was, is_ = before.values(first, last), after.values(first, last)
            zeros += int((is_ == 0).sum())
            change += float(np.square(was - is_, dtype=np.float64).sum())
            total += float(np.square(was, dtype=np.float64).sum())
        layers.append(
            Layer(
                name, before.shape, choice.rule, choice.alpha, zeros / math.prod(before.shape), stored_bits(after, form),
                math.sqrt(change / total) if total else 0.0, choice.output_error, choice.heads,
            )
        )  # fmt: skip
    return layers


def stored_bits(weight: Weight, form: Format) -> float:
    """Bits of the file per weight."""
    if weight.codes is None:
        kind = TYPES[IDS[weight.scheme]] if weight.scheme in IDS else TYPES[IDS["f32"]]
        return 8 * kind.nbytes / kind.block
    size = math.prod(weight.shape)
    if form.container == "gguf":
        kind = TYPES[IDS[form.weights]]
        return 8 * kind.nbytes / kind.block + (256 / size if form.weights == "i2_s" else 0)
    if form.integer:
        return 8 / INTEGERS[form.integer].per_byte + 16 * (weight.scales.size if weight.scales is not None else 0) / size
    return 2.25 if form.container == "mlx" else 2 + 32 / size


def means(layers: list[Layer]) -> list[dict[str, Any]]:
    """By kind of weight and for all: shares and bits weighted by weights, errors as the root of the mean square."""
    rows = []
    for kind in (*KINDS, "all"):
        mine = [layer for layer in layers if kind in (layer.kind, "all")]
        if not mine:
            continue
        count = np.array([layer.weights for layer in mine], np.float64)

        def mean(values: list[float], weight: Any = count) -> float:
            return float((np.array(values) * weight).sum() / weight.sum())

        outputs = [layer.output_error for layer in mine if layer.output_error is not None]
        rows.append({
            "kind": kind, "tensors": len(mine), "weights": int(count.sum()), "zeros": mean([layer.zeros for layer in mine]),
            "bits_per_weight": mean([layer.bits_per_weight for layer in mine]),
            "weight_error": math.sqrt(mean([layer.weight_error**2 for layer in mine])),
            "output_error": math.sqrt(sum(e**2 for e in outputs) / len(outputs)) if outputs else None,
        })  # fmt: skip
    return rows


def table(layers: list[Layer]) -> list[str]:
    """For the terminal; nothing where nothing was quantized."""
    if not layers:
        return []
    calibrated = any(layer.output_error is not None for layer in layers)
    lines = [f"{'':10} {'tensors':>7} {'weights':>13} {'zeros':>7} {'bits/weight':>11} {'weight error':>12}" + " output error" * calibrated]
    for row in means(layers):
        line = f"{row['kind']:10} {row['tensors']:>7} {row['weights']:>13,} {row['zeros']:>7.1%} {row['bits_per_weight']:>11.2f} "
        line += f"{row['weight_error']:>12.3f}"
        lines.append(line + (f" {row['output_error']:>12.3f}" if row["output_error"] is not None else " " * 13 * calibrated).rstrip())
    return lines


def verdict(
    layers: list[Layer], scheme: str, before: float | None = None, after: float | None = None, tokens: int = 0, vocabulary: int = 0
) -> str:
    """In a line: whether the model lives. before, after: perplexities on the same text of so many tokens, if they were measured;
    vocabulary: the perplexity of chance. Both are 0 where they are not known."""
    heal = "train it further as a ternary model (bitnet train), which heals what conversion breaks"
    if scheme in ("int4", "fp4"):
        heal = "take int8"
    elif scheme in ("int8", "fp16"):
        heal = "keep it as it is, or take bf16 (--format hf-dense-bf16, gguf-bf16)"
    elif scheme == "binary":
        heal = "take int4, or train a binary or ternary model (bitnet train)"
    elif scheme == "ternary":
        heal += ", or take --quantization int4"
    if before is not None and after is not None:
        change = f"perplexity {_short(before)} -> {_short(after)} ({_short(after / before)} x)" + (
            f" over {tokens:,} tokens" if tokens else ""
        )
        if 0 < tokens < ENOUGH:
            return f"{change}: too few to say what {scheme} costs; --evaluate a longer text"
        if vocabulary and not before < vocabulary:
            return f"{change}: the source itself is no better than chance here, so this says nothing about what {scheme} costs"
        if not after < DESTROYED * before:
            return f"{change}: {scheme} destroys this model. {heal[0].upper()}{heal[1:]}"
        return f"{change}: {scheme} {'costs this model something' if after > NOTICEABLE * before else 'keeps this model'}"
    moved = means(layers)[-1]["weight_error"]
    if moved > MOVED:
        return (
            f"{scheme} moved these weights by {moved:.0%} of their norm, which a model not trained for it seldom survives: measure it "
            f"with --evaluate FILE. If it did not, {heal}"
        )
    return f"{scheme} moved these weights by {moved:.1%} of their norm; --evaluate FILE measures what that costs"


def _short(number: float) -> str:
    return f"{number:,.2f}" if number < 1e9 else f"{number:.1e}"


def record(layers: list[Layer]) -> dict[str, Any]:
    """As plain values. "alphas" is what --alpha-config takes."""
    alphas = {layer.name: layer.alpha for layer in layers if layer.alpha is not None}
    return {"means": means(layers), "layers": [asdict(layer) for layer in layers], "alphas": alphas}


def check_place(path: Path, target: Path, in_folder: bool) -> None:
    """Raises UsageError, before anything is done, where the report and its picture cannot go or another file would be lost. `in_folder`:
    whether the target is a folder."""
    folder, model = path.absolute().parent, place_of(target)
    if len(os.fsencode(path.name)) > 255:
        raise UsageError(
            f"{shown(path.name)}: is a name of {len(os.fsencode(path.name))} bytes; expected at most 255: name another --report"
        )
    if path.name in ("", ".."):
        raise UsageError(f"{shown(path)}: is a folder; the report is a file of JSON, name one (TARGET.report.json is the default)")
    picture = path.with_suffix(".png")
    if path.suffix.lower() == ".png" or place_of(path) == model:
        what = "the picture's name" if path.suffix.lower() == ".png" else "the target itself"
        raise UsageError(f"{shown(path)}: is {what}; the report is JSON, name it so (TARGET.report.json is the default)")
    if place_of(picture) == model:
        raise UsageError(f"{shown(path)}: its picture {shown(picture)} would be the target itself; name another --report")
    within = in_folder and folder.resolve() == model
    if within and (MODEL_FILES.fullmatch(path.name) or path.name.startswith("adapter_")):
        raise UsageError(f"{shown(path)}: is the name of a file of the model in it; name another --report")
    if not within and not (folder.is_dir() and os.access(folder, os.W_OK)):
        why = "which is read-only; make it writable" if folder.is_dir() else "which does not exist; make it"
        raise UsageError(f"{shown(path)}: the report cannot be written in {shown(folder)}, {why}, or name another --report")
    refuse_others(path)


def refuse_others(path: Path) -> None:
    """Raises UsageError where something else lies in the place of the report or its picture."""
    for file, looks in ((path, _is_report), (path.with_suffix(".png"), _is_png)):
        if os.path.lexists(file) and not (file.is_file() and looks(file)):
            raise UsageError(f"{shown(file)}: is in the way of the report, and is none; move it, or name another --report")


def _is_report(path: Path) -> bool:
    try:
        return {"means", "layers", "verdict"} <= set(json.loads(read_file(path, MAX_CONFIG_BYTES)))
    except (ValueError, BitNetError, TypeError, RecursionError):
        return False


def _is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def write_json(path: PathLike, values: Mapping[str, Any]) -> None:
    """A file of the report."""
    with new_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def draw(layers: list[Layer], path: Path, title: str) -> str | None:
    """The picture: every kind's errors and zeros over the layers. Returns why there is none, if so."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return _MATPLOTLIB
    matplotlib.use("Agg")
    pyplot, ticker = importlib.import_module("matplotlib.pyplot"), importlib.import_module("matplotlib.ticker")
    shown = [("zeros", "zeros, share of the weights"), ("weight_error", "weight error, share of the norm")]
    if any(layer.output_error is not None for layer in layers):
        shown.append(("output_error", "output error, share of the norm"))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(1.1 + 4.2 * len(shown), 3.6), dpi=110, squeeze=False, layout="constrained")
    for axis, (key, label) in zip(axes[0], shown, strict=True):
        for kind in KINDS:
            mine = [(layer, getattr(layer, key)) for layer in layers if layer.kind == kind and getattr(layer, key) is not None]
            if mine and kind in TABLES:
                axis.axhline(mine[0][1], label=kind, linestyle=":" if kind == "head" else "--", color="#777777", linewidth=1)
            elif mine:
                places = [int(layer.name.split(".")[1]) for layer, _ in mine]
                axis.plot(places, [value for _, value in mine], label=kind, marker="o", markersize=2.5, linewidth=1)
        axis.set(xlabel="layer", ylim=(0, None))
        axis.set_title(label, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with new_file(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)
    return None
