"""Model families: one adapter per Hugging Face `model_type`, from a checkpoint's config and names to the canonical model.

An adapter is a module with two functions: `config(hf, where)` reads the family's config.json into a `ModelConfig`, and
`names(config, present)` maps every canonical name (native/model.h) to the name of a tensor in the checkpoint. No graph here: the
forward pass exists once, in native/forward.cpp. GGUF files come in through the same adapters (models/gguf.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from bitnet.errors import FormatError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, hf, is_gguf, shown
from bitnet.files.hf import Checkpoint
from bitnet.files.tensor import Tensor
from bitnet.models import bitnet, gemma3_text, gguf, llama, qwen2, qwen3
from bitnet.models.config import LINEARS, ModelConfig

__all__ = [
    "LINEARS", "Canonical", "Checkpoint", "ModelConfig", "Quantization", "adapter_for", "canonical", "latent_weights", "open_checkpoint",
    "quantization",
]  # fmt: skip


class Adapter(Protocol):
    """What a family's module offers."""

    def config(self, hf: dict[str, Any], where: str) -> ModelConfig: ...
    def names(self, config: ModelConfig, present: Container[str]) -> dict[str, str]: ...


_COMPARED = 1 << 22  # bytes at once
_ADAPTERS: dict[str, Any] = {"bitnet": bitnet, "gemma3_text": gemma3_text, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}
# Tensors that a checkpoint may carry and that change nothing: rope's frequencies follow from the config, a tied head is the embedding.
_REDUNDANT = ("rotary_emb.inv_freq", "rope_freqs.weight")
_FLOATS = ("f32", "f64", "f16", "bf16")
LATENT = ("latent_weight", "weight_latent", "weight_fp", "master_weight")  # beside X.weight, as X.latent_weight: what it was trained from


@dataclass(frozen=True)
class Quantization:
    """How the checkpoint's linear layers are meant to run: as BitNet, with ternary weights and int8 activations per token."""

    online: bool  # dense master weights that are ternarized by absmean at load
    dense: tuple[str, ...] = ()  # modules that stay dense

    def stays_dense(self, name: str) -> bool:
        """Whether the weight of this name is of a module that stays dense."""
        return name in self.dense or name.removesuffix(".weight") in self.dense


@dataclass(frozen=True)
class Canonical:
    """A checkpoint in our terms."""

    config: ModelConfig
    names: dict[str, str]  # canonical name -> tensor's name in the checkpoint; every one of them is there
    quantization: Quantization | None  # None: trained without quantized activations


def open_checkpoint(path: PathLike, i2_s: str = "x86") -> Checkpoint:
    """Open a folder or file of any format that this build reads; what it is is read from its bytes. No tensor's bytes are read.

    `i2_s`: "arm" to read GGUF's I2_S tensors as a build of bitnet.cpp for Arm wrote them, which the file does not tell.
    """
    if i2_s not in ("x86", "arm"):
        raise UsageError(f"i2_s is {i2_s!r}; expected 'x86', or 'arm' for a file that a build of bitnet.cpp for Arm wrote")
    found = gguf.open_checkpoint(path) if is_gguf(path) else hf.open_checkpoint(path)
    return gguf.as_written_on_arm(found) if i2_s == "arm" else found


def adapter_for(config: dict[str, Any], where: str) -> Adapter:
    """The adapter of config.json's `model_type`; `UnsupportedModelError` names the families that there are."""
    first = "BitnetForCausalLM" in (config.get("architectures") or ())  # 1bitLLM's models call themselves llama
    kind = "bitnet" if first else config.get("model_type")
    if not isinstance(kind, str) or kind not in _ADAPTERS:
        raise UnsupportedModelError(
            f"{where}: model_type is {shown(repr(kind))}; this build runs {', '.join(sorted(_ADAPTERS))}. Another family would run as noise"
        )
    adapter: Adapter = _ADAPTERS[kind]
    return adapter


def canonical(checkpoint: Checkpoint) -> Canonical:
    """The model that a checkpoint holds. Raises `UnsupportedModelError` for what would run as noise, `FormatError` for what is missing."""
    where, tensors = shown(checkpoint.path), checkpoint.tensors
    adapter = adapter_for(checkpoint.config, where)
    config = adapter.config(checkpoint.config, where)
    if checkpoint.layout == "gguf":
        config = gguf.adjust(config, checkpoint)
        names = gguf.names(config)
        quantized = Quantization(online=True) if config.architecture == "bitnet" else None
    else:
        names = adapter.names(config, tensors)
        quantized = quantization(checkpoint.config, where)
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(
            f"{where}: tensor {missing[0]!r}{more} not found; a {config.architecture} model of {config.n_layers} layers has it"
        )
    head = "lm_head.weight" if config.tied else ""
    if head in tensors and not _same(tensors[head], tensors[names["embedding"]]):
        raise FormatError(
            f"{where}: config.json says that the head is the embedding (tie_word_embeddings), and {head} is another matrix; "
            f"set that to false, or remove {head}"
        )
    for name in (theirs for ours, theirs in names.items() if ours.rsplit(".", 1)[-1] in LINEARS):
        _check_linear(tensors[name], quantized, checkpoint.layout)
    known = {*names.values(), head, *_scales(checkpoint, names.values()), *latent_weights(checkpoint).values()}
    stray = [name for name in tensors if name not in known and not name.endswith(_REDUNDANT)]
    if stray:
        what = "biases" if stray[0].endswith(".bias") else "tensors that such a model does not have"
        raise UnsupportedModelError(
            f"{where}: has {what} ({len(stray)}, the first {shown(stray[0])!r}) beside those of a {config.architecture} model of "
            f"{config.n_layers} layers; to run without them would be noise"
        )
    return Canonical(config, names, quantized)


def latent_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Names of weights -> names of those that they were binarized or ternarized from, where the checkpoint has them beside."""
    parts = ((name.rpartition(".")[0], name) for name in checkpoint.tensors if name.rpartition(".")[2] in LATENT)
    found = {f"{module}.weight": name for module, name in parts} if checkpoint.layout == "hf" else {}
    return {weight: name for weight, name in found.items() if weight in checkpoint.tensors}


def _scales(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[str]:
    """The tensors that scale one of these: Hugging Face's of packed ternary, and those that llama.cpp may keep beside a weight.

    Raises UnsupportedModelError for one beside a weight whose values are not scaled anywhere here: without it the model would be noise.
    """
    for name in names:
        tensor, beside = checkpoint.tensors[name], f"{name.removesuffix('.weight')}.scale"
        if tensor.scale is not None:
            yield tensor.scale.name
        elif checkpoint.layout == "gguf" and beside in checkpoint.tensors:
            if tensor.scheme not in ("ternary", "binary"):
                raise UnsupportedModelError(
                    f"{checkpoint.tensors[beside].where}: scales a weight that is stored as {tensor.scheme}; this build multiplies only "
                    "ternary and binary weights by such a scale"
                )
            yield beside


def _check_linear(tensor: Tensor, quantized: Quantization | None, layout: str) -> None:
    """Raises FormatError for a linear layer that is stored in another way than the configuration says."""
    if quantized is None:
        if layout == "hf" and tensor.codec == "hf":
            raise FormatError(f"{tensor.where}: packed ternary, but config.json has no quantization_config that says so")
    elif not quantized.online and tensor.scheme in _FLOATS and not quantized.stays_dense(tensor.name):
        raise FormatError(
            f"{tensor.where}: {tensor.dtype} without a weight_scale; quantization_mode offline needs packed ternary ones (uint8)"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored alike, byte by byte."""
    if (one.shape, one.scheme, one.nbytes) != (other.shape, other.scheme, other.nbytes):
        return False
    a, b = (memoryview(tensor.data)[tensor.offset : tensor.offset + tensor.nbytes] for tensor in (one, other))
    same = all(a[at : at + _COMPARED] == b[at : at + _COMPARED] for at in range(0, one.nbytes, _COMPARED))
    for tensor in (one, other):
        tensor.forget_pages()
    return same


def quantization(hf: dict[str, Any], where: str) -> Quantization | None:
    """config.json's quantization_config, or None for a model of dense weights; anything but BitNet's is refused."""
    found = hf.get("quantization_config")
    if found is None:
        first = "BitnetForCausalLM" in (hf.get("architectures") or ())
        return Quantization(online=True, dense=("lm_head",)) if first else None
    if isinstance(found, dict) and "quant_method" not in found and {"group_size", "bits"} <= found.keys():
        if found["bits"] != 2:
            raise UnsupportedModelError(
                f"{where}: MLX's weights of {shown(repr(found['bits']))} bits; of MLX's formats this build reads 2 bits"
            )
        return Quantization(online=False) if hf.get("model_type") == "bitnet" else None  # MLX's, which quantizes weights only
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method == "bitnet-integer":  # ours: packed integers, which say in the file what they are
        return None
    if method != "bitnet":
        raise UnsupportedModelError(
            f"{where}: quantization_config has quant_method {shown(repr(method))}; this build reads 'bitnet' and dense weights"
        )
    mode, linear = found.get("quantization_mode", "offline"), found.get("linear_class", "bitlinear")
    if mode not in ("online", "offline") or linear not in ("bitlinear", "autobitlinear"):
        raise UnsupportedModelError(
            f"{where}: quantization_mode {shown(repr(mode))} with linear_class {shown(repr(linear))}; expected online or offline, "
            "bitlinear or autobitlinear"
        )
    if found.get("use_rms_norm"):
        raise UnsupportedModelError(
            f"{where}: quantization_config.use_rms_norm puts a norm into every linear layer, which this build does not run"
        )
    dense = found.get("modules_to_not_convert") or ()
    if not isinstance(dense, (list, tuple)) or not all(isinstance(d, str) for d in dense):
        raise UnsupportedModelError(f"{where}: modules_to_not_convert is not a list of names")
    return Quantization(online=mode == "online" and linear == "autobitlinear", dense=tuple(dense))
