"""A .safetensors without a configuration, made ternary: each matrix for itself, known by the name that it has.

Without config.json nobody knows how many heads there are or how rope turns, so nothing is run, calibrated or brought into another
program's layout. But rules that look at a matrix alone need no more than its name: q_proj, embed_tokens, lm_head, ... What is written is
packed as Hugging Face's layers are, and says so in its metadata: with the model's config.json beside it, the file runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitnet.convert import hf
from bitnet.convert.calibrated import best_rows
from bitnet.convert.choice import Choice, check_alphas, refuse_keeping_all, scale_dtype
from bitnet.convert.fit import Loss, fit
from bitnet.convert.formats import Format
from bitnet.convert.quantize import MODULES, TABLES, Ternarization, representable, ternarized
from bitnet.convert.source import Weight
from bitnet.convert.verify import NotTheSameError, Progress, refuse_not_finite
from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, is_gguf, safetensors, shown
from bitnet.files.safetensors import Item
from bitnet.files.tensor import Tensor
from bitnet.models import Checkpoint
from bitnet.models.gguf import as_written_on_arm

_KINDS = {module.rsplit(".", 1)[-1]: kind for kind, module in MODULES.items()}  # "q_proj" -> "q"


def tensors_alone(source: PathLike) -> dict[str, Tensor] | None:
    """The tensors of a file that has no configuration, in it or beside it: by our names ("layers.0.q") where they have known ones.

    None where there is a configuration, and where no name is known. Raises `FormatError` for two tensors of one name.
    """
    path = Path(source)
    if path.is_dir() or not path.exists() or is_gguf(path) or os.path.lexists(path.parent / "config.json"):
        return None
    file = safetensors.read(path)
    found: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        ours = _our_name(name) if len(tensor.shape) == 2 else name
        if ours in found and "config" not in file.metadata:
            raise FormatError(
                f"{path}: without a config.json {shown(found[ours].name)} and {shown(name)} both are {ours}; put the model's there"
            )
        found[ours] = tensor
    return found if "config" not in file.metadata and any(ours != tensor.name for ours, tensor in found.items()) else None


def _our_name(name: str) -> str:
    parts = name.split(".")
    kind = _KINDS.get(parts[-2], "") if parts[-1] == "weight" and len(parts) > 1 else ""
    layer = parts[parts.index("layers") + 1] if "layers" in parts[:-1] else ""
    return kind if kind in TABLES else f"layers.{layer}.{kind}" if kind and layer.isdecimal() else name


def check(
    source: PathLike, tensors: Mapping[str, Tensor], quantization: str, calibrated: bool, tokenizer_json: PathLike | None, i2_s: str
) -> None:
    """Raises UsageError for what cannot be done, or would mean nothing, without a configuration."""
    where = f"{shown(source)}: has no config.json"
    if quantization != "ternary":
        raise UsageError(f"{where}, without which its weights become ternary only; put it there, or choose ternary")
    if tokenizer_json is not None:
        raise UsageError(f"{where}, so no tokenizer is written; put config.json there, or leave --tokenizer out")
    if calibrated:
        raise UsageError(f"{where}, and without it the model cannot run over calibration text; put it there")
    if i2_s != "x86":
        as_written_on_arm(Checkpoint(Path(source), {}, dict(tensors), None, {}))


def made_ternary(
    tensors: Mapping[str, Tensor], form: Format, how: Ternarization, requantize: bool, source: str, notes: list[str]
) -> tuple[dict[str, Weight], dict[str, Weight], dict[str, Choice], list[Loss]]:
    """(the weights as they are, as they shall be written, how those that changed were chosen, what requantizing has cost)."""
    if form.container != "safetensors" or form.dense or form.integer:
        raise UsageError(f"{source}: has no config.json, which {form.name} needs; put it there, or write a .safetensors")
    kinds = [Weight(n, t.shape, t.scheme, t.where, t.dense_rows) for n, t in tensors.items() if n != t.name]
    refuse_keeping_all(kinds, form, "ternary", how)
    check_alphas(how, {weight.name: None if weight.kind in "qkv" else 0 for weight in kinds}, notes)
    before, after, choices, losses = {}, {}, {}, []
    for name, tensor in tensors.items():
        if tensor.scheme not in ("f32", "f16", "bf16") or not tensor.shape:
            raise UnsupportedModelError(f"{tensor.where}: is {tensor.scheme}; without a config.json F32, F16 and BF16 are read")
        if 0 in tensor.shape:
            raise FormatError(f"{tensor.where}: has shape {list(tensor.shape)}, which holds nothing; expected weights")
        weight = before[name] = Weight(name, tensor.shape, tensor.scheme, tensor.where, tensor.dense_rows)
        if name != tensor.name and (alpha := how.alpha_of(name)) != "keep":
            choices[name] = Choice(how.method, alpha if how.method == "threshold" else None)
            stored = scale_dtype(weight, form)
            if alpha == "auto":  # of the embedding: Ternarization.calibrated
                choices[name], made = Choice("least error", alpha), best_rows(weight, how.unit(weight.kind), stored)
            else:
                made = ternarized(weight, how, stored)
            weight = representable(weight, made)
        after[name], loss = fit(weight, form, requantize, [tensor.scheme, "bf16", "f16", "f32"], beside=False, plain=True)
        losses += [loss] if loss is not None else []
    return before, after, choices, losses


def items(tensors: Mapping[str, Tensor], weights: Mapping[str, Weight], form: Format) -> tuple[bytes, list[Item]]:
    """What the file consists of."""
    config = {"quant_method": "bitnet", "linear_class": form.weights, "quantization_mode": "offline"}
    dense = [tensors[n].name.removesuffix(".weight") for n, w in weights.items() if w.codes is None and n != tensors[n].name]
    config_text = json.dumps(config | {"modules_to_not_convert": dense})
    parts = hf.items(weights.values(), {name: tensor.name for name, tensor in tensors.items()}, form)
    return safetensors.layout(parts, {"format": "pt", "quantization_config": config_text}, "the target")


def verify(path: Path, tensors: Mapping[str, Tensor], weights: Mapping[str, Weight], progress: Progress) -> None:
    """That the file holds these weights. Raises NotTheSameError."""
    found = safetensors.read(path).tensors
    total, done = sum(w.shape[0] for w in weights.values()), 0
    for name, weight in weights.items():
        other = found[tensors[name].name]
        for first, last in weight.spans():
            values = weight.values(first, last)
            refuse_not_finite(weight, values)
            if not np.array_equal(values, other.dense_rows(first, last)[: last - first]):
                raise NotTheSameError(f"{other.where}: differs from what was to be written between rows {first} and {last}")
        done += weight.shape[0]
        progress("verifying", done, total)


def note(source: str, target: PathLike) -> str:
    """What the user of such a file must know."""
    return (
        f"{source} has no config.json, so {shown(target)} holds the weights alone; with the model's config.json and tokenizer.json beside "
        "it, it runs. Beside the source they would have become part of the file"
    )
