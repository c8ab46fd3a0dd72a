"""A finished run as a model folder: packed ternary weights in Hugging Face layout, tokenizer, model card, picture of the loss."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from transformers import BitNetForCausalLM

from bitnet.files import safetensors
from bitnet.files.replacing import write_text
from bitnet.packing import STORED, bf16_bits, pack_hf
from bitnet.ternary import absmean, quantize_binary
from bitnet.train.layers import TernaryLinear
from bitnet.train.recipe import Recipe


def export_model(model: BitNetForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    Every `TernaryLinear` becomes packed trits with one scale (W = trits * scale, linear_class autobitlinear); the embedding and the
    norms become bf16. `transformers` loads the folder as it is. `BinaryLinear`: bits with a scale per row, for this program. A model
    without either is an ordinary one in f16.
    """
    schemes = {name: module.scheme for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    tensors: dict[str, np.ndarray | tuple[str, np.ndarray]] = {}
    for name, values in model.state_dict().items():
        weight = values.float().numpy()
        layer = name.removesuffix(".weight")
        if schemes.get(layer) == "binary":
            codes, scales = quantize_binary(weight)
            tensors[name] = STORED["binary"].pack(codes)
            tensors[f"{name}_binary_scale"] = scales
        elif layer in schemes:
            trits, scale = absmean(weight)
            tensors[name] = pack_hf(trits)
            tensors[f"{name}_scale"] = np.array([scale], np.float32)
        elif name != "lm_head.weight":  # tied to the embedding
            tensors[name] = ("BF16", bf16_bits(weight)) if schemes else weight.astype(np.float16)
    config = {k: v for k, v in model.config.to_diff_dict().items() if k != "transformers_version"}
    config |= {
        "architectures": ["BitNetForCausalLM"],
        "dtype": "bfloat16" if schemes else "float16",
    }
    if "binary" in schemes.values():
        config["quantization_config"] = {"quant_method": "bitnet-integer", "scheme": "binary"}
    elif schemes:
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / "generation_config.json", json.dumps({"bos_token_id": 0, "eos_token_id": 0}) + "\n")
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})


def export_run(recipe: Recipe, model: BitNetForCausalLM, run: Path, folder: Path, evaluation: list[Path], card: Path | None) -> None:
    """Everything that ships: the model, its tokenizer, the loss as a picture, and the card filled in from what was measured.

    `evaluation`: texts that the model never saw; their scores are measured here, by the engine, on the exported files.
    `card`: a text with {placeholders}; without one, only the table of scores is written.
    """
    export_model(model, folder)
    write_text(folder / "tokenizer.json", (run / "tokenizer.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((run / "log.csv").open()))
    plot_loss(rows, recipe.training["steps"] - recipe.training["decay_steps"], folder / "loss.png")
    values = {
        "scores": score_table(folder, evaluation),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "bytes": f"{sum(f.stat().st_size for f in folder.iterdir() if f.suffix in ('.safetensors', '.json')) / 1e6:.2f} MB",
        "seed": recipe.seed,
        "steps": f"{int(rows[-1]['step']):,}",
        "tokens": f"{int(rows[-1]['tokens']) / 1e6:.1f} million",
        "minutes": f"{float(rows[-1]['seconds']) / 60:.0f}",
        "loss": rows[-1]["loss"],
    }
    text = card.read_text(encoding="utf-8") if card else "{scores}\n"
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    write_text(folder / "README.md", text)


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


def plot_loss(rows: list[dict[str, str]], decay_start: int, path: Path) -> None:
    """The training loss over the steps: each logged mean faint, a running mean over it."""
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
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
