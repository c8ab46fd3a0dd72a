"""Models to train from: whatever this program reads, as a model of transformers; and new ones by a recipe's shape.

Of a model with packed ternary or binary layers these stay what they are (`FrozenTernaryLinear`), unless they shall train: then they
become floats, the values that are stored, or, where absmean makes them ternary again, masters that it takes back to these.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

from bitnet.chat import find_template
from bitnet.convert.formats import FORMATS
from bitnet.convert.hf import config_of, names_of
from bitnet.convert.source import read
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.files.hf import Checkpoint
from bitnet.models import LINEARS, adapter_for, open_checkpoint
from bitnet.train.layers import FrozenTernaryLinear
from bitnet.train.recipe import Shape

MOST_EAGER = 1024  # tokens of context up to which attention may be plain products


# What models call the token that ends a text, of those whose tokenizer.json comes alone.
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


def new_model(shape: Shape, vocab_size: int, context: int, seed: int, begin_id: int = 0, end_id: int = 0) -> Any:
    """A BitNetForCausalLM or LlamaForCausalLM, initialized from the seed; every linear layer is torch's own."""
    torch.manual_seed(seed)
    kind: Any
    made: Any
    kind, made = (LlamaConfig, LlamaForCausalLM) if shape.architecture == "llama" else (BitNetConfig, BitNetForCausalLM)
    config = kind(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=begin_id,
        eos_token_id=end_id,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        **{k: v for k, v in vars(shape).items() if k not in ("rope_theta", "architecture")},
    )
    config._attn_implementation = "sdpa"
    return made(config)


def begin_of(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text."""
    encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    return list(encoding.ids[: mask.index(0)]) if 0 in mask else []


def end_of(tokenizer: Tokenizer, where: str) -> int:
    """The id of the token that ends a text, by its usual names. Raises `UsageError` where there is none of them."""
    found = next((number for name in _ENDS if (number := tokenizer.token_to_id(name)) is not None), None)
    if found is None:
        raise UsageError(f"{where}: has no token that ends a text; expected one of {', '.join(_ENDS)}: add it to the tokenizer")
    return int(found)


class Base:
    """A model that training starts from: `model` (of transformers, float32), `tokenizer`, `checkpoint` (None if only transformers reads
    it), `template` (of its chats, if it has one), `begin` (ids that begin a text), `end` (the id that ends one), and `scales`, float32
    [1 or out, groups], of modules whose packed weights are to train, by name; these hold the values that the codes stand for."""

    def __init__(self, source: str, packed: bool = True) -> None:
        """`packed`: whether packed layers stay packed, and do not train. Raises what the readers raise."""
        from bitnet.source import resolve

        self.path: Path = resolve(source)
        self.checkpoint: Checkpoint | None = None
        self.scales: dict[str, Any] = {}
        try:
            self.checkpoint = open_checkpoint(self.path)
            self.model, self.scales = _as_transformers(self.checkpoint, packed)
            self.tokenizer = _tokenizer(self.checkpoint, self.model.config.vocab_size)
            self.template = find_template(self.checkpoint.tokenizer_config, self.checkpoint.chat_template, self.checkpoint.gguf_metadata)
        except UnsupportedModelError:
            if not (self.path / "config.json").is_file():
                raise
            self.checkpoint = None
            self.model, self.tokenizer, self.template = _from_transformers(self.path)
        bad = next((n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise FormatError(f"{self.path}: {bad} holds NaN or infinity; the file is damaged or its training diverged")
        ends = self.model.config.eos_token_id
        self.end: int | None = ends[0] if isinstance(ends, list) else ends
        self.begin: list[int] = begin_of(self.tokenizer) or ([self.end] if self.end is not None else [])

    def grow(self, layers: int | None, context: int | None) -> None:
        """More layers, more places, and at first the same logits: behind its original stands a copy of a layer, evenly over the depth,
        whose o_proj and down_proj are zero. Raises `UsageError` for fewer layers, where nothing grows, and for a base that cannot."""
        config = self.model.config
        old, most = config.num_hidden_layers, getattr(config, "max_position_embeddings", None) or sys.maxsize
        longer = context is not None and context > most
        if layers is not None and layers < old:
            raise UsageError(f"num_hidden_layers is {layers}; {self.path} has {old}, and growing takes none away: raise it")
        if not longer and layers in (None, old):
            raise UsageError(
                f"{self.path}: nothing grows, it has {old} layers already and room for the context: raise num_hidden_layers or context"
            )
        if longer and not _plain_rope(config):
            raise UsageError(f"context is {context}; {self.path} has {most} places, and only unscaled rope has more: lower it")
        if longer:
            config.max_position_embeddings = context
        if layers in (None, old):
            return
        lists = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == old]
        outputs = [n for n, _ in lists[0][1][0].named_modules() if n.endswith(("o_proj", "down_proj"))] if len(lists) == 1 else []
        if not outputs:
            raise UsageError(f"{self.path}: cannot grow; expected a decoder whose layers have o_proj and down_proj, as llama's have")
        (where, originals), grown, scales = lists[0], nn.ModuleList(), self.scales
        self.scales = {}
        for number in range(layers):
            source = number * old // layers
            layer = originals[source]
            if number and source == (number - 1) * old // layers:
                layer = copy.deepcopy(layer)
                for parameter in (p for name in outputs for p in layer.get_submodule(name).parameters()):
                    nn.init.zeros_(parameter)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
            grown.append(layer)
            at = f"{where}.{source}."
            self.scales |= {f"{where}.{number}.{n.removeprefix(at)}": s for n, s in scales.items() if n.startswith(at)}
        self.model.set_submodule(where, grown)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number * old // layers] for number in range(layers)]

    def make_masters(self, names: list[str]) -> None:
        """Of these modules, as far as they were packed: weights that absmean ternarizes to the very values they hold now."""
        with torch.no_grad():
            for name in names:
                if name in self.scales:
                    _make_masters(self.model.get_submodule(name).weight, self.scales[name])


def _as_transformers(checkpoint: Checkpoint, packed: bool) -> tuple[Any, dict[str, Any]]:
    """(the model, the scales of the modules whose packed layers became floats)."""
    scales_of: dict[str, Any] = {}
    found = read(checkpoint)
    form = FORMATS["hf-dense-f32"]
    config = config_of(found, form, found.weights)
    names = names_of(found, config, str(checkpoint.path))
    norm_offset = adapter_for(config, str(checkpoint.path)).config(config, str(checkpoint.path)).norm_offset
    for key in ("bos_token_id", "eos_token_id"):
        if key not in config and (ids := _gguf_id(checkpoint, key)) is not None:
            config[key] = ids
    hf = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in ("dtype", "architectures")})
    hf.architectures = config["architectures"]
    hf._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(hf)
    with torch.no_grad():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for weight in found.weights.values():
            name = names[weight.name]
            module = name.rpartition(".")[0]
            if packed and weight.codes is not None and weight.kind in LINEARS:
                assert weight.scales is not None
                codes, scales = torch.from_numpy(weight.codes(0, weight.shape[0]).copy()), torch.from_numpy(weight.scales.copy())
                old = model.get_submodule(module)
                model.set_submodule(module, FrozenTernaryLinear(codes, scales, None if old.bias is None else old.bias.detach()))
                continue
            off = weight.offset - norm_offset if weight.kind.endswith("norm") else 0.0  # gemma's in GGUF are 1 + w
            for first, last in weight.spans():
                parameters[name][first:last] = torch.from_numpy(weight.values(first, last) + np.float32(off))
            if weight.codes is not None and weight.kind in LINEARS:
                scales_of[module] = weight.scales
    model.generation_config.eos_token_id = hf.eos_token_id
    return model, scales_of


def _make_masters(weight: Tensor, scales: Any) -> None:
    """Packed values, 0 and +-scale, as masters that absmean ternarizes to themselves: |W| = scale / the share of them that is not 0,
    run by run, so that mean|W| is the scale again. In place."""
    runs = weight.reshape(1, 1, -1) if scales.size == 1 else weight.unflatten(1, (scales.shape[1], -1))
    runs /= (runs != 0).float().mean(dim=2, keepdim=True).clamp(min=1e-3)


def _gguf_id(checkpoint: Checkpoint, key: str) -> int | None:
    found = checkpoint.gguf_metadata.get(f"tokenizer.ggml.{key}")
    return int(found) if found is not None else None


def _tokenizer(checkpoint: Checkpoint, vocab_size: int) -> Tokenizer:
    from bitnet.source import load_tokenizer

    return load_tokenizer(checkpoint, vocab_size, None)._library


def _from_transformers(path: Path) -> tuple[Any, Tokenizer, str | None]:
    """Model, tokenizer and chat template of families that only transformers knows."""
    from transformers import AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        whole = AutoTokenizer.from_pretrained(path)
        tokenizer, template = whole.backend_tokenizer, whole.chat_template
    except Exception as error:  # transformers raises whatever it meets
        raise BitNetError(f"{path}: transformers cannot load it ({type(error).__name__}: {str(error)[:200]})") from None
    most, rows = max(tokenizer.get_vocab(with_added_tokens=True).values()), model.config.vocab_size
    if most >= rows:
        raise FormatError(f"{path}: its tokenizer has the token {most}, the model's vocab_size is {rows}; the two do not belong together")
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return model, tokenizer, template


def _plain_rope(config: Any) -> bool:
    """Whether a model knows places by rope alone, which goes on beyond those that it was trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [r for r in rope.values() if isinstance(r, dict)]  # as gemma has them
    return bool(rope) and all(r.get("rope_type", "default") == "default" for r in by_layer_type or [rope])


def quickest_attention(model: Any, bf16: bool, context: int) -> None:
    """Of a model that will be compiled for a CPU. torch's fused attention multiplies bfloat16 by itself where there is no AMX; the plain
    one ("eager") by oneDNN, which knows AVX-512's instructions for it. It keeps `context` squared numbers a head, hence the limit."""
    fused = torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported()
    if bf16 and context <= MOST_EAGER and not fused and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of numbers all over a model, some thousand of each tensor: another model's, or a later one's, are others."""
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        flat = values.detach().reshape(-1)
        digest.update(name.encode() + flat[:: max(1, len(flat) // 4096)].float().numpy().tobytes())
    return digest.hexdigest()
