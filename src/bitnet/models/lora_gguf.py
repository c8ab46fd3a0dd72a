"""Low-rank adapters as llama.cpp keeps them: one GGUF of general.type "adapter" and adapter.type "lora".

Beside the tensor NAME of the base (`blk.3.attn_q.weight`) lie NAME.lora_a [rank, in] and NAME.lora_b [out, rank]; the scale is
adapter.lora.alpha / rank, or 1 where there is no alpha or it is 0. Rows of B lie as the base's in GGUF do: those of llama's queries and
keys by rope's pairs. (llama.cpp: src/llama-adapter.cpp and .h, convert_lora_to_gguf.py.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError
from bitnet.files import PathLike, gguf, is_gguf, shown
from bitnet.files.tensor import Tensor
from bitnet.models.config import LINEARS, ModelConfig, weight_shapes
from bitnet.models.fields import number
from bitnet.models.gguf import ARCHITECTURES, names
from bitnet.models.low_rank import LowRank, stored_pair

ALPHA, TYPE, KIND = "adapter.lora.alpha", "general.type", "adapter.type"


def read(path: PathLike, config: ModelConfig) -> dict[str, LowRank]:
    """The adapter in this file by the canonical name of the matrix, in the model's order; rows of B in Hugging Face's.

    Raises UnsupportedModelError for what is no plain LoRA of the layers' matrices, FormatError for damaged files and for shapes or tensors
    that the base does not have.
    """
    where = shown(path)
    if not is_gguf(path):
        raise FormatError(f"{where}: is a file, and no GGUF; expected llama.cpp's adapter in one, or an adapter's folder as PEFT saves it")
    file = gguf.read(path)
    _check(file.metadata, config, where)
    known = {theirs: ours for ours, theirs in names(config).items() if ours.rsplit(".", 1)[-1] in LINEARS}
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        base, _, side = name.rpartition(".")
        if side not in ("lora_a", "lora_b") or base not in known:
            raise UnsupportedModelError(
                f"{where}: tensor {shown(name)!r} belongs to no linear layer ({', '.join(LINEARS)}) of this {config.architecture} model of "
                f"{config.n_layers} layers; the adapter is for another model, or does more than plain LoRA"
            )
        sides.setdefault(known[base], {})[side] = tensor
    if not sides:
        raise FormatError(f"{where}: holds no tensor; expected lora_a and lora_b of one matrix or more")
    alpha = 0.0 if not file.metadata.get(ALPHA) else number(file.metadata, ALPHA, where)
    shapes, found = weight_shapes(config), dict[str, LowRank]()
    for ours in (ours for ours in known.values() if ours in sides):
        if len(sides[ours]) != 2:
            raise FormatError(f"{next(iter(sides[ours].values())).where}: stands alone; expected lora_a and lora_b of the matrix")
        kind = ours.rsplit(".", 1)[-1]
        scheme, a, b = stored_pair(ours, sides[ours]["lora_a"], sides[ours]["lora_b"], shapes[kind], where)
        if by_pairs(config, kind):
            b = turned(b, config.head_dim, by_pairs=False)
        found[ours] = LowRank(scheme, a, b, alpha / len(a) if alpha else 1.0)
    return found


def is_lora(path: PathLike) -> bool:
    """Whether this is such a file, of whatever model."""
    try:
        return is_gguf(path) and gguf.read(path).metadata.get(KIND) == "lora"
    except BitNetError:
        return False


def by_pairs(config: ModelConfig, kind: str) -> bool:
    """Whether GGUF keeps the rows of such a matrix by rope's pairs, whatever file the base itself was read from."""
    return config.architecture == "llama" and kind in ("q", "k")


def turned(b: NDArray[Any], head: int, by_pairs: bool) -> NDArray[Any]:
    """Rows of heads of `head` rows in the other order: by rope's pairs, or by the halves that rotate together."""
    split = (2, head // 2) if by_pairs else (head // 2, 2)
    return np.ascontiguousarray(b.reshape(-1, *split, b.shape[1]).swapaxes(1, 2).reshape(b.shape))


def _check(metadata: dict[str, Any], config: ModelConfig, where: str) -> None:
    if metadata.get(TYPE) != "adapter":
        raise FormatError(f"{where}: {TYPE} is {shown(repr(metadata.get(TYPE)))}; expected an adapter, this may be a model")
    if metadata.get(KIND) != "lora":
        raise UnsupportedModelError(f"{where}: {KIND} is {shown(repr(metadata.get(KIND)))}; this build runs lora")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or ARCHITECTURES.get(architecture) != config.architecture:
        raise FormatError(f"{where}: is for architecture {shown(repr(architecture))}; the base is a {config.architecture} model")
    other = next((key for key in metadata if key.startswith("adapter.alora.")), None)
    if other is not None:
        raise UnsupportedModelError(f"{where}: {shown(other)} makes it work from certain tokens on only; this build runs plain LoRA")
