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

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import PathLike, json_object, read_file, safetensors, shown
from bitnet.files.tensor import MAX_CONFIG_BYTES, Tensor
from bitnet.models.config import LINEARS, ModelConfig, decoder_names, weight_shapes
from bitnet.models.fields import integer, number

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
_PLAIN_PATTERN = re.compile(r"\^?(?:\w|\\?\.)+\$?")  # others could take for ever to match


@dataclass(frozen=True)
class LowRank:
    """What stands beside one matrix."""

    scheme: str  # "f32", "f16" or "bf16", whose bits come as uint16
    a: NDArray[Any]  # [rank, in]
    b: NDArray[Any]  # [out, rank]
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def dense(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A and B in float32."""
        return widened(self.scheme, self.a), widened(self.scheme, self.b)

    def delta(self) -> NDArray[np.float32]:
        """What it adds to the matrix, float32 [out, in]: scale * B A."""
        a, b = self.dense()
        return np.asarray((b @ a) * np.float32(self.scale), np.float32)


@dataclass(frozen=True)
class PeftAdapter:
    path: Path
    config: dict[str, Any]
    parts: dict[str, LowRank]  # by the canonical name of the matrix: "layers.3.q"; rows in Hugging Face's order


def widened(scheme: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values in float32."""
    bits = (values.astype(np.uint32) << np.uint32(16)).view(np.float32) if scheme == "bf16" else values
    return np.asarray(bits, np.float32)


def is_adapter(path: PathLike) -> bool:
    """Whether a folder looks like an adapter."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def read_adapter(path: PathLike, config: ModelConfig) -> PeftAdapter:
    """The adapter in the folder `path`, for a base of this configuration.

    Raises `UnsupportedModelError` for what is no plain LoRA on q, k, v, o, gate, up and down, `FormatError` for damaged files and for
    shapes or modules that the base does not have.
    """
    folder, where = Path(path), shown(path)
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
    parts = {name: _part(name, pair, found, shapes[name.rsplit(".", 1)[-1]], config) for name, pair in sides.items()}
    _check_targets(found, set(parts), config, where)  # last: of an adapter for another model the sizes say more
    return PeftAdapter(folder, found, parts)


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


def _part(name: str, pair: Mapping[str, Tensor], found: Mapping[str, Any], shape: tuple[int, ...], config: ModelConfig) -> LowRank:
    if len(pair) != 2:
        raise FormatError(f"{next(iter(pair.values())).where}: stands alone; expected lora_A and lora_B of the layer")
    a, b = pair["A"], pair["B"]
    where = shown(Path(a.path).parent)
    rank = a.shape[0] if len(a.shape) == 2 else 0
    if rank < 1 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        raise FormatError(
            f"{where}: {name} has A {list(a.shape)} and B {list(b.shape)}, but that matrix of the base is {list(shape)}: expected "
            f"[rank, {shape[1]}] and [{shape[0]}, rank]; the adapter is for a model of other sizes"
        )
    if not found.get("rank_pattern") and rank != integer(dict(found), "r", where, default=8):
        raise FormatError(
            f"{where}: {name} has rank {rank}, but {CONFIG_FILE} says r = {found.get('r', 8)}; the two files are not of one adapter"
        )
    for tensor in (a, b):
        if tensor.scheme not in ("f32", "f16", "bf16"):
            raise UnsupportedModelError(f"{tensor.where}: is stored as {tensor.dtype}; expected F32, F16 or BF16")
        if not np.isfinite(tensor.dense()).all():
            raise FormatError(f"{tensor.where}: holds NaN or infinity; the file is damaged or training diverged")
    alpha = _alpha(found, next(theirs for theirs, ours in modules(config).items() if ours == name), where)
    scale = alpha / (math.sqrt(rank) if found.get("use_rslora") else rank)
    if a.scheme == b.scheme:
        return LowRank(a.scheme, a.raw(), b.raw(), scale)
    return LowRank("f32", a.dense(), b.dense(), scale)


def _alpha(found: Mapping[str, Any], module: str, where: str) -> float:
    """lora_alpha, or that of the first pattern that the module's name ends with; of regular expressions only plain names are read."""
    patterns = found.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{where}: alpha_pattern is {shown(repr(patterns)[:80])}; expected names with numbers")
    for pattern in patterns:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise UnsupportedModelError(
                f"{where}: alpha_pattern has the regular expression {shown(repr(pattern))}; this build reads plain names of modules"
            )
        plain = pattern.replace("\\", "").rstrip("$")
        if module == plain.lstrip("^") or (not plain.startswith("^") and module.endswith(f".{plain}")):
            return number(patterns, pattern, where)
    return number(dict(found), "lora_alpha", where, default=8.0)
