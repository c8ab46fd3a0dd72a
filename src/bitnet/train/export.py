"""A finished run as a model folder: packed weights in Hugging Face layout, tokenizer, model card, picture of the loss.

- Ternary layers with one scale for the tensor: packed trits, which `transformers` loads. W = trits * scale (linear_class autobitlinear);
  where layers have biases trits / scale (bitlinear), because in the other class it multiplies the bias by the scale, too.
- Binary ones, and ternary ones with a scale per row or group or with a ternary embedding: this program's own integers (files/tensor.py).
- A model without either is an ordinary one in f16.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from bitnet.convert.quantize import divisor
from bitnet.errors import UnsupportedModelError
from bitnet.files import safetensors
from bitnet.files.replacing import new_folder, write_synced
from bitnet.packing import STORED, bf16_bits, pack_hf
from bitnet.ternary import absmean, quantize_binary
from bitnet.train.layers import Quantization, TernaryConv1D, TernaryEmbedding, TernaryLinear


def check(model: Any) -> tuple[dict[str, Any], bool]:
    """(the layers to be packed, by name; whether they are packed as `transformers` has them), before or after training.

    Raises `UnsupportedModelError` for layers with sub-norms of their own, and for sizes that cannot be packed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (TernaryLinear, TernaryEmbedding))}
    simple = all(isinstance(m, TernaryLinear) and m.scheme == "ternary" and m.quantization.scale == "tensor" for m in layers.values())
    for name, layer in layers.items():
        rows, inputs = layer.weight.shape
        if getattr(layer, "sub_norm", None) is not None:
            raise UnsupportedModelError(f"{name}: a sub-norm of its own has no place in a model's file; quantization.sub_norm is for study")
        if isinstance(layer, TernaryConv1D):
            raise UnsupportedModelError(f"{name}: was Conv1D, which no packed format has; it trains in torch only")
        if simple and rows % 4:
            raise UnsupportedModelError(f"{name}: has {rows} outputs; packed as transformers loads them they must be a multiple of 4")
        if not simple and inputs % (per_byte := STORED[layer.scheme].per_byte):
            raise UnsupportedModelError(f"{name}: has {inputs} inputs; packed as {layer.scheme} they must be a multiple of {per_byte}")
    return layers, simple


def export_model(model: Any, folder: Path, texts: Mapping[str, bytes] | None = None) -> None:
    """Write config.json, generation_config.json, model.safetensors, and `texts` by their names, in place of what was there.

    Raises what `check` does.
    """
    layers, simple = check(model)
    divides = simple and any(getattr(layer, "bias", None) is not None for layer in layers.values())
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    tensors: dict[str, NDArray[Any] | tuple[str, NDArray[Any]]] = {}
    for name, values in model.state_dict().items():
        weight = values.detach().float().cpu().numpy()
        layer = name.removesuffix(".weight")
        if name == "lm_head.weight" and tied:
            continue
        if layer in layers and name.endswith(".weight"):
            packed = _packed(name, weight, layers[layer].quantization, simple)
            tensors |= packed if not divides else packed | {f"{name}_scale": divisor(np.asarray(packed[f"{name}_scale"], np.float32))}
        else:
            tensors[name] = ("BF16", bf16_bits(weight)) if layers else weight.astype(np.float16)
    config = {k: v for k, v in model.config.to_diff_dict().items() if v is not None and k not in ("transformers_version", "_name_or_path")}
    config |= {"architectures": model.config.architectures or [type(model).__name__], "dtype": "bfloat16" if layers else "float16"}
    config.pop("quantization_config", None)
    if layers and simple:
        dense = [n for n, m in model.named_modules() if "Linear" in type(m).__name__ and n not in layers]
        config["quantization_config"] = {
            "quant_method": "bitnet", "linear_class": "bitlinear" if divides else "autobitlinear", "quantization_mode": "offline",
            "modules_to_not_convert": dense or ["lm_head"],
        }  # fmt: skip
    elif layers:
        config["quantization_config"] = {"quant_method": "bitnet-integer", "scheme": next(iter(layers.values())).scheme}
    ids = {key: getattr(model.config, key, None) for key in ("bos_token_id", "eos_token_id")}
    with new_folder(folder) as new:
        write_synced(new / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        write_synced(new / "generation_config.json", (json.dumps({k: v for k, v in ids.items() if v is not None}) + "\n").encode())
        safetensors.write(new / "model.safetensors", tensors, {"format": "pt"})
        for name, content in (texts or {}).items():
            write_synced(new / name, content)


def _packed(name: str, weight: NDArray[np.float32], how: Quantization, simple: bool) -> dict[str, NDArray[Any] | tuple[str, NDArray[Any]]]:
    """A layer's tensors. The definitions are ternary.py's where it has them, else the layer's own."""
    if simple and how.rule == "absmean":
        trits, scale = absmean(weight)
        return {name: pack_hf(trits), f"{name}_scale": np.array([scale], np.float32)}
    if how.rule == "binary" and how.scale == "row":
        codes, scales = quantize_binary(weight)
    else:
        import torch

        coded, scaled = how.of(torch.from_numpy(weight))
        codes, scales = coded.numpy().astype(np.int8), scaled.numpy()
    if simple:
        return {name: pack_hf(codes), f"{name}_scale": scales.reshape(1)}
    stored = STORED[how.scheme]
    rows = np.ascontiguousarray(np.broadcast_to(scales, (len(codes), scales.shape[1])), np.float32)
    return {name: stored.pack(codes), f"{name}_{how.scheme}_scale": rows}


def score_table(folder: Path, evaluation: list[Path]) -> str:
    """Bits per byte and next-token accuracy of the exported model on each text, as a Markdown table."""
    from bitnet.evaluate.perplexity import read_text, score_text
    from bitnet.transformer import TernaryTransformer

    model = TernaryTransformer.from_pretrained(folder)
    lines = ["| text | bytes | bits per byte | next-token accuracy |", "|---|---|---|---|"]
    for path in evaluation:
        score = score_text(model, read_text(path))
        lines.append(f"| {path.name} | {score.bytes:,} | {score.bits_per_byte:.3f} | {score.next_token_accuracy:.1%} |")
    return "\n".join(lines)


CARD = """# {name}

{what}

Trained by `bitnet train` ({task}, {scheme}): {steps} steps, {tokens} tokens, seed {seed}, {minutes} minutes on the clock,
{core_hours} hours of one core; the training loss ended at {loss} nats per token.

![Training loss over the steps](loss.png)

{scores}

## Texts

{texts}

## Recipe

```yaml
{recipe}
```
"""


def card(template: str | None, values: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The model card: `template`, or CARD, with its {placeholders} filled in."""
    plain = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    text = template or CARD
    for key, value in {**values, "recipe": plain}.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def loss_picture(rows: list[dict[str, str]], decay_start: int) -> bytes:
    """The training loss over the steps: each logged mean faint, a running mean over it. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    step = np.array([int(r["step"]) for r in rows])
    loss = np.array([float(r["loss"]) for r in rows])
    window = max(1, len(loss) // 60)
    smooth = np.convolve(np.pad(loss, (window // 2, window - 1 - window // 2), mode="edge"), np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=100)
    axes.plot(step, loss, color="#9ecae1", linewidth=0.8, label="mean of 10 steps")
    axes.plot(step, smooth, color="#08519c", linewidth=1.8, label="running mean")
    axes.axvline(decay_start, color="#999999", linewidth=0.8, linestyle="--")
    axes.text(decay_start, axes.get_ylim()[1] * 0.97, " decay begins", va="top", fontsize=9, color="#666666")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    pyplot.close(figure)
    return out.getvalue()
