"""Model families: one adapter per Hugging Face `model_type`, from a checkpoint's config and names to the canonical model.

An adapter is a module with two functions: `config(hf)` reads the family's config.json into a `ModelConfig`, and
`names(config)` maps every canonical name (native/model.h) to the name of a tensor in the checkpoint. No graph here: the
forward pass exists once, in native/forward.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from bitnet.errors import UnsupportedModelError
from bitnet.models import bitnet, llama
from bitnet.models.config import ModelConfig

__all__ = ["Adapter", "ModelConfig", "Quantization", "adapter_for", "quantization"]


class Adapter(Protocol):
    """What a family's module offers."""

    def config(self, hf: dict[str, Any], where: str) -> ModelConfig: ...
    def names(self, config: ModelConfig) -> dict[str, str]: ...


_ADAPTERS: dict[str, Any] = {"bitnet": bitnet, "llama": llama}


def adapter_for(hf: dict[str, Any], where: str) -> Adapter:
    """The adapter of config.json's `model_type`; `UnsupportedModelError` names the families that there are."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _ADAPTERS:
        raise UnsupportedModelError(
            f"{where}: model_type is {kind!r}; this build runs {', '.join(sorted(_ADAPTERS))}. Another family would run as noise"
        )
    adapter: Adapter = _ADAPTERS[kind]
    return adapter


@dataclass(frozen=True)
class Quantization:
    """How the checkpoint's linear layers are meant to run."""

    online: bool  # dense master weights that are ternarized by absmean at load
    dense: tuple[str, ...]  # modules that stay dense


def quantization(hf: dict[str, Any], where: str) -> Quantization | None:
    """config.json's quantization_config, or None for a model of dense weights; anything but BitNet's is refused."""
    found = hf.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != "bitnet":
        raise UnsupportedModelError(
            f"{where}: quantization_config has quant_method {method!r}; this build reads 'bitnet' and dense weights"
        )
    mode, linear = found.get("quantization_mode", "offline"), found.get("linear_class", "bitlinear")
    if mode not in ("online", "offline") or linear not in ("bitlinear", "autobitlinear"):
        raise UnsupportedModelError(
            f"{where}: quantization_mode {mode!r} with linear_class {linear!r}; expected online or offline, bitlinear or autobitlinear"
        )
    if found.get("use_rms_norm"):
        raise UnsupportedModelError(
            f"{where}: quantization_config.use_rms_norm puts a norm into every linear layer, which this build does not run"
        )
    dense = found.get("modules_to_not_convert") or ()
    if not isinstance(dense, (list, tuple)) or not all(isinstance(d, str) for d in dense):
        raise UnsupportedModelError(f"{where}: modules_to_not_convert is not a list of names")
    return Quantization(online=mode == "online" and linear == "autobitlinear", dense=tuple(dense))
