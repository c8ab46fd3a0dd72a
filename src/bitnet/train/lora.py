"""Low-rank adapters (LoRA, arXiv:2106.09685) whose A and B are ternary in the forward pass.

peft puts A and B beside the linear layers of a model that stays as it is, packed layers packed; then they become `TernaryLinear` with a
scale per row and activations as they come, which is how the engine multiplies them. What is saved are the ternary values times their
scales, in PEFT's layout: peft, and this program (docs/lora.md), run them as any adapter.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitnet.errors import UsageError
from bitnet.files import safetensors
from bitnet.files.replacing import new_folder, write_synced
from bitnet.train.layers import Quantization, TernaryLinear, dequantized, ternarize_model
from bitnet.train.recipe import Recipe

FACTORS = Quantization(scale="row", activations="none")


def add_adapter(model: nn.Module, recipe: Recipe, base: str) -> Any:
    """The model with A and B, which alone train, beside the recipe's layers. Raises `UsageError` where none matches."""
    from peft import LoraConfig, get_peft_model

    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    there = sorted({n.rpartition(".")[2] for n in linears})
    if not there:
        raise UsageError(
            f"{base}: has no linear layers (nn.Linear) that A and B could stand beside; gpt2's, of class Conv1D, take none here"
        )
    ends = there if recipe.target_modules is None else recipe.target_modules
    missing = [e for e in ends if not any(f".{n}".endswith(f".{e}") for n in linears)]
    if missing or not ends:
        what = f"no linear layer has a name that ends with .{missing[0]}" if missing else "names none"
        raise UsageError(f"target_modules: {what}; there are {', '.join(there)}")
    config = LoraConfig(r=recipe.rank, lora_dropout=recipe.lora_dropout, target_modules=ends, task_type="CAUSAL_LM")
    config.lora_alpha = recipe.alpha  # type: ignore[assignment]
    model.name_or_path = base  # type: ignore[assignment]
    with warnings.catch_warnings():  # peft 0.18 asks transformers 5 by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            found = get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"{base}: peft puts no adapter into this model ({' '.join(str(error).split())[:200]})") from None
    if recipe.quantize == "ternary":
        ternarize_model(found, "*.lora_?.default", quantization=FACTORS)
    return found


def export_adapter(model: Any, folder: Path, texts: dict[str, bytes]) -> None:
    """adapter_config.json, adapter_model.safetensors, and `texts` by their names."""
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            weight = module.weight.detach().float()
            if isinstance(module, TernaryLinear):
                weight = dequantized(*module.quantization.of(weight))
            tensors[f"{name.removesuffix('.default')}.weight"] = np.ascontiguousarray(weight.cpu().numpy())
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    with new_folder(folder) as new:
        write_synced(new / "adapter_config.json", (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode())
        safetensors.write(new / "adapter_model.safetensors", tensors, {"format": "pt"})
        for name, content in texts.items():
            write_synced(new / name, content)
