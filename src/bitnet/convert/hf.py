"""Models as Hugging Face lays them out: a folder that `transformers` loads, one safetensors complete by itself, or MLX's two-bit folder.

Packed ternary layers have one scale each: W = trits * weight_scale (linear class autobitlinear), or trits / weight_scale (bitlinear).
The embedding, the head and the norms stay plain numbers there, which is all that `transformers` loads; MLX packs the first two as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.formats import MLX_GROUP, Format
from bitnet.convert.quantize import divisor, rounded
from bitnet.convert.source import CHUNK, I8, Model, Weight
from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files.safetensors import Item
from bitnet.models import LINEARS, ModelConfig, adapter_for
from bitnet.models.rope import Rope
from bitnet.packing import INTEGERS, TWO_BIT, bf16_bits, pack_hf

CLASSES = {
    "bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # ours -> config.json's
_WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16"}  # ours -> safetensors'
_ROPE = {
    "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow"),
}  # fmt: skip
_QUANTIZATION = ("quantization_config", "quantization", "torch_dtype", "dtype", "transformers_version", "auto_map")


def config_of(model: Model, form: Format, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """config.json of the model in this form. Raises UnsupportedModelError for what config.json cannot say."""
    config = model.config
    found: dict[str, Any] = {key: value for key, value in model.checkpoint.config.items() if key not in _QUANTIZATION}
    if model.checkpoint.layout == "gguf":
        found = _fresh(config)
    found |= {
        "architectures": [CLASSES[config.architecture]],
        "model_type": config.architecture,
        "dtype": _dtype(weights.values()),
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "num_key_value_heads": config.n_kv_heads,
    }
    if config.architecture == "bitnet":
        found["hidden_act"] = config.activation
        if not any(found.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")):
            found["rope_theta"] = config.rope.theta
    if form.container == "mlx":
        found["quantization"] = found["quantization_config"] = {"group_size": MLX_GROUP, "bits": 2, "mode": "affine"}
    elif form.integer:
        found["quantization_config"] = {"quant_method": "bitnet-integer", "scheme": form.integer}
    elif not form.dense:
        names = adapter_for(found, form.name).names(config, ())
        dense = [names[w.name].removesuffix(".weight") for w in weights.values() if w.kind in LINEARS and w.codes is None]
        found["quantization_config"] = {
            "quant_method": "bitnet", "linear_class": form.weights, "quantization_mode": "offline",
            "modules_to_not_convert": [*dense, "lm_head"],
        }  # fmt: skip
    return found


def notes(config: ModelConfig, form: Format) -> list[str]:
    """What the user of such a folder must know."""
    if form.weights == "autobitlinear" and config.biases:
        return ["transformers multiplies the biases of autobitlinear layers by the scale, too; hf-bitlinear is the form that it runs right"]
    return []


def items(weights: Iterable[Weight], names: Mapping[str, str], form: Format) -> Iterator[Item]:
    """The tensors of a model, by their Hugging Face names."""
    for weight in weights:
        name = names[weight.name]
        if weight.codes is None:
            yield Item(name, _WRITTEN[weight.scheme], weight.shape, _plain(weight))
        elif form.integer:
            assert weight.scales is not None
            yield Item(
                name, INTEGERS[form.integer].dtype, (weight.shape[0], weight.shape[1] // INTEGERS[form.integer].per_byte), _integers(weight)
            )
            yield Item(f"{name}_{form.integer}_scale", "F16", weight.scales.shape, _values(as_bits(weight.scales, "f16")))
        elif form.container == "mlx":
            yield from _mlx(weight, name)
        else:
            assert weight.scales is not None
            scale = weight.scales if form.weights == "autobitlinear" else divisor(weight.scales)
            yield Item(name, "U8", (-(-weight.shape[0] // 4), weight.shape[1]), _banded(weight))
            yield Item(f"{name}_scale", "F32", (1,), _values(scale.reshape(1)))


def names_of(model: Model, config: dict[str, Any], where: str) -> dict[str, str]:
    """Canonical name -> name in a file with this config.json."""
    return adapter_for(config, where).names(model.config, ())


def documents(config: dict[str, Any], texts: Mapping[str, str]) -> dict[str, str]:
    """The texts beside the weights by the names of their keys in a single file's metadata: config, tokenizer, ..."""
    return {"config": json_text(config, sort_keys=True), **texts}


def json_text(value: Mapping[str, Any], sort_keys: bool = False) -> str:
    """As a file of its own; half of a surrogate pair, which no UTF-8 can hold, stays the escape that it was."""
    return json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def _values(array: NDArray[Any]) -> Callable[[], list[NDArray[Any]]]:
    return lambda: [np.ascontiguousarray(array)]


def _plain(weight: Weight) -> Callable[[], Iterator[NDArray[Any]]]:
    def chunks() -> Iterator[NDArray[Any]]:
        for first, last in weight.spans():
            if weight.stored is not None:
                yield np.ascontiguousarray(weight.stored(first, last))
            else:
                yield np.ascontiguousarray(as_bits(weight.values(first, last), weight.scheme))

    return chunks


def as_bits(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values that `dtype` holds as it lies in a file."""
    return bf16_bits(values) if dtype == "bf16" else values.astype("<f2" if dtype == "f16" else "<f4")


def trits(weight: Weight, codes: I8) -> I8:
    """`codes`. Raises FormatError for those of +2, which blocks of two bits may have."""
    if codes.max(initial=0) > 1:
        raise FormatError(
            f"{weight.where}: holds codes of 3, which stand for +2 scales and are not ternary; gguf-q2_0 and dense formats hold them"
        )
    return codes


def _banded(weight: Weight) -> Callable[[], Iterator[NDArray[Any]]]:
    """Packed bytes, each of which holds four rows that lie a quarter of the matrix apart."""
    rows, inputs = weight.shape
    quarter, codes = -(-rows // 4), weight.codes
    assert codes is not None

    def chunks() -> Iterator[NDArray[Any]]:
        step = max(1, CHUNK // inputs // 4)
        for first in range(0, quarter, step):
            last = min(quarter, first + step)
            bands = np.full((4, last - first, inputs), -1, np.int8)  # a code of 0 where the matrix has no row any more
            for band in range(4):
                begin, end = band * quarter + first, min(rows, band * quarter + last)
                if begin < end:
                    bands[band, : end - begin] = trits(weight, codes(begin, end))
            yield pack_hf(bands.reshape(-1, inputs))

    return chunks


def _integers(weight: Weight) -> Callable[[], Iterator[NDArray[Any]]]:
    codec, codes = INTEGERS[weight.scheme], weight.codes
    assert codes is not None
    return lambda: (codec.pack(codes(first, last)) for first, last in weight.spans())


def _mlx(weight: Weight, name: str) -> Iterator[Item]:
    rows, inputs = weight.shape
    codes, stored = weight.codes, weight.scales
    assert codes is not None and stored is not None
    scales = np.repeat(np.broadcast_to(stored, (rows, stored.shape[1])), inputs // MLX_GROUP // stored.shape[1], axis=1)
    dtype = next(d for d in ("f16", "bf16", "f32") if np.array_equal(rounded(stored, d), stored))
    layer = name.removesuffix(".weight")
    yield Item(name, "U32", (rows, inputs // 16), lambda: (TWO_BIT.pack(trits(weight, codes(a, b))) for a, b in weight.spans()))
    yield Item(f"{layer}.scales", _WRITTEN[dtype], scales.shape, _values(as_bits(scales, dtype)))
    yield Item(f"{layer}.biases", _WRITTEN[dtype], scales.shape, _values(as_bits(-scales, dtype)))


def _dtype(weights: Iterable[Weight]) -> str:
    """What `transformers` must load the plain tensors in to lose nothing."""
    found = {weight.scheme for weight in weights if weight.codes is None}
    return DTYPES[found.pop()] if len(found) == 1 else "float32"


def _fresh(c: ModelConfig) -> dict[str, Any]:
    """config.json's fields of a model that came without one."""
    found: dict[str, Any] = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.ffn_size, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "head_dim": c.head_dim, "rope_parameters": _rope(c.rope, c.head_dim),
    }  # fmt: skip
    if c.architecture == "gemma3_text":
        local = c.rope_local or c.rope
        found |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(c.attention_scale**-2),
            "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in c.windowed or (False,) * c.n_layers],
            "rope_parameters": {"full_attention": _rope(c.rope, c.head_dim), "sliding_attention": _rope(local, c.head_dim)},
        }
        found |= {"sliding_window": c.sliding_window} if c.sliding_window else {}
    else:
        found |= {
            "hidden_act": c.activation,
            "attention_bias": "q" in c.biases and c.architecture != "qwen2",
            "mlp_bias": "gate" in c.biases,
        }
    return found


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    if rope.divisors:
        rope = _llama3(rope, head_dim)
    fields = {"rope_type": rope.kind, "rope_theta": rope.theta, **{key: getattr(rope, key) for key in _ROPE.get(rope.kind, ())}}
    if rope.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = rope.original_context
    return fields | ({"attention_factor": rope.attention_factor} if rope.kind == "yarn" else {})


def _llama3(rope: Rope, head_dim: int) -> Rope:
    """The settings of llama3's rule that give the divisors that a GGUF spells out."""
    plain = Rope(rope.theta)
    for original in (8192, *(1 << n for n in range(4, 20))):
        found = Rope(rope.theta, "llama3", max(rope.divisors), original, low_freq_factor=1.0, high_freq_factor=4.0)
        if np.allclose(plain.frequencies(head_dim) / found.frequencies(head_dim), rope.divisors, rtol=1e-5):
            return found
    raise UnsupportedModelError(
        "the file's rope_freqs.weight follows none of llama3's settings, and config.json has no other place for it; choose a gguf format"
    )
