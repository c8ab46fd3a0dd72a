"""Low-rank adapters (LoRA, arXiv:2106.09685) as PEFT lays them out: adapter_config.json and adapter_model.safetensors in one folder.

Beside a linear layer y = W x lie A [rank, in] and B [out, rank]: y = W x + scale * B (A x), where scale is alpha / rank, or with use_rslora
alpha / sqrt(rank). Tensors are called base_model.model.MODULE.lora_A.weight and lora_B.weight, modules as Hugging Face calls them,
whatever file the base comes from. What else PEFT can put into an adapter changes the model in other ways, and is refused, never ignored
(huggingface.co/docs/peft: LoraConfig, "PEFT checkpoint format").
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, json_object, read_file, safetensors, shown
from bitnet.files.tensor import MAX_CONFIG_BYTES, Tensor
from bitnet.models import lora_gguf
from bitnet.models.config import LINEARS, ModelConfig, decoder_names, weight_shapes
from bitnet.models.fields import integer, number
from bitnet.models.low_rank import LowRank, stored_pair
from bitnet.models.patterns import suffix_pattern

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# of LoraConfig: what is read here, what only training uses, and where the model comes from
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "init_lora_weights", "lora_dropout", "fan_in_fan_out", "inference_mode", "task_type",
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "megatron_core", "runtime_config", "eva_config",
    "qalora_group_size", "ensure_weight_tying", "velora_config",
}  # fmt: skip
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base's weights as they are
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MOST_PATTERNS = 1000


@dataclass(frozen=True)
class StoredAdapter:
    path: Path
    parts: dict[str, LowRank]  # by the canonical name of the matrix: "layers.3.q"; rows in Hugging Face's order


def is_adapter(path: PathLike) -> bool:
    """Whether a folder looks like an adapter."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def read_adapter(path: PathLike, config: ModelConfig) -> StoredAdapter:
    """The adapter in the folder `path`, or in llama.cpp's GGUF of that name (lora_gguf.py), for a base of this configuration.

    Raises `UnsupportedModelError` for what is no plain LoRA on q, k, v, o, gate, up and down, `FormatError` for damaged files and for
    shapes or modules that the base does not have.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UsageError(f"adapter is {path!r}; expected an adapter's folder as PEFT saves it, or llama.cpp's .gguf")
    folder, where = Path(path), shown(path)
    if folder.is_file():
        return StoredAdapter(folder, lora_gguf.read(folder, config))
    if not folder.exists():
        raise FormatError(f"{where}: no such folder or file; expected an adapter's folder as PEFT saves it, or llama.cpp's .gguf")
    if not is_adapter(folder):
        raise FormatError(f"{where}: holds no {CONFIG_FILE}; expected an adapter's folder as PEFT saves it")
    found = json_object(read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES), f"{where}/{CONFIG_FILE}")
    _refuse_others(found, where)
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise FormatError(
            f"{where}: has adapter_model.bin, a pickle that could run any code; save it again with PEFT, which writes safetensors"
        )
    sides = _sides(safetensors.read_stored(folder / WEIGHTS_FILE).tensors, config, where)
    shapes = weight_shapes(config)
    theirs = {ours: module for module, ours in modules(config).items()}
    ranks, alphas = _Setting(found, "rank_pattern", "r", where), _Setting(found, "alpha_pattern", "lora_alpha", where)
    parts = {}
    for name, pair in sides.items():
        rank, alpha = int(ranks.of(theirs[name])), alphas.of(theirs[name])
        scheme, a, b = stored_pair(name, pair["A"], pair["B"], shapes[name.rsplit(".", 1)[-1]], where)
        if len(a) != rank:
            raise FormatError(f"{where}: {name} has rank {len(a)}, but {CONFIG_FILE} says r = {rank}; the two files are not of one adapter")
        parts[name] = LowRank(scheme, a, b, alpha / (math.sqrt(rank) if found.get("use_rslora") else rank))
    _check_targets(found, set(parts), config, where)  # last: of an adapter for another model the sizes say more
    return StoredAdapter(folder, parts)


def modules(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of every linear layer -> ours: "model.layers.0.self_attn.q_proj" -> "layers.0.q"."""
    names = decoder_names(config)
    return {names[ours].removesuffix(".weight"): ours for ours in (f"layers.{i}.{p}" for i in range(config.n_layers) for p in LINEARS)}


def _refuse_others(found: Mapping[str, Any], where: str) -> None:
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{where}: peft_type is {shown(repr(kind))}; this build runs LORA")
    if (start := found.get("init_lora_weights")) not in _KEEPS_BASE:
        raise UnsupportedModelError(
            f"{where}: init_lora_weights is {shown(repr(start))}, which changes the base's own weights; "
            "have PEFT convert it to plain LoRA as it saves"
        )
    if (bias := found.get("bias", "none")) != "none":
        raise UnsupportedModelError(
            f"{where}: bias is {shown(repr(bias))}: it trained biases too; this build runs adapters with bias 'none'"
        )
    other = next((key for key, value in found.items() if key not in _KNOWN and value not in (None, False) and value not in ({}, [])), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{where}: {shown(other)} is {shown(repr(found[other])[:80])}; this build runs plain LoRA, "
            "and without it the adapter would not be itself"
        )


def _sides(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, dict[str, Tensor]]:
    """Canonical name -> {"A": tensor, "B": tensor}."""
    known, sides = modules(config), dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in known:
            raise UnsupportedModelError(
                f"{where}: tensor {shown(name)!r} belongs to no linear layer ({', '.join(LINEARS)}) of this {config.architecture} model of "
                f"{config.n_layers} layers; the adapter is for another model, or does more than plain LoRA"
            )
        sides.setdefault(known[match["module"]], {})[match["side"]] = tensor
    if not sides:
        raise FormatError(f"{where}: {WEIGHTS_FILE} holds no tensor; expected lora_A and lora_B of one linear layer or more")
    alone = next((next(iter(pair.values())) for pair in sides.values() if len(pair) != 2), None)
    if alone is not None:
        raise FormatError(f"{alone.where}: stands alone; expected lora_A and lora_B of the layer")
    return {name: sides[name] for name in known.values() if name in sides}  # in the model's order


def _check_targets(found: Mapping[str, Any], have: set[str], config: ModelConfig, where: str) -> None:
    """A list of target modules must be what the weights are. (One text is a regular expression, and all that it matched was saved.)"""
    targets = found.get("target_modules")
    if not isinstance(targets, list) or any(found.get(key) for key in ("exclude_modules", "layers_pattern")):
        return
    only = found.get("layers_to_transform")
    listed = [only] if isinstance(only, int) else only or []
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        raise FormatError(f"{where}: layers_to_transform is {shown(repr(only)[:80])}; expected numbers of layers")
    layers = set(listed) if only is not None and only != [] else None
    for module, ours in modules(config).items():
        targeted = any(module == target or module.endswith(f".{target}") for target in targets)
        targeted = targeted and (layers is None or int(ours.split(".")[1]) in layers)
        if targeted != (ours in have):
            what = "has no weights for" if targeted else "has weights for"
            why = "target_modules name it" if targeted else "target_modules do not name it"
            raise FormatError(
                f"{where}: {WEIGHTS_FILE} {what} {module}, but {why}; the two files are not of one adapter, or the base is another model"
            )


class _Setting:
    """A number of all modules, and of those that a pattern fits, which PEFT looks up in this order: the first that fits the name's end."""

    def __init__(self, found: dict[str, Any], patterns_key: str, key: str, where: str) -> None:
        patterns = found.get(patterns_key) or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise FormatError(f"{where}: {patterns_key} is {shown(repr(patterns)[:80])}; expected names with numbers")
        whole = key == "r"
        self._plain = integer(found, key, where, default=8) if whole else number(found, key, where, default=8.0)
        self._patterns = [
            (suffix_pattern(p, f"{where}: {patterns_key}: {shown(repr(p)[:80])}"), (integer if whole else number)(patterns, p, where))
            for p in patterns
        ]

    def of(self, module: str) -> float:
        return next((value for fits, value in self._patterns if fits(module)), self._plain)
