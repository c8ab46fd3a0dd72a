"""Adapters in PEFT's layout, made by hand, and what they add to a `transformers` model, by hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.files import safetensors
from bitnet.models.config import ModelConfig, weight_shapes
from bitnet.models.peft import modules

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(rank: int, targets: Any = TARGETS, **changes: Any) -> dict[str, Any]:
    """As PEFT 0.21 writes it."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "inference_mode": True, "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.1, "target_modules": targets, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "lora_bias": False, "layers_to_transform": None, "exclude_modules": None, "loftq_config": {},
        "megatron_core": "megatron.core", "peft_version": "0.21.2",
    } | changes  # fmt: skip


def matrices(base: ModelConfig, rank: int, targets: Any = TARGETS, seed: int = 0, ternary: bool = False) -> dict[str, np.ndarray]:
    """A and B of every target, with an effect of about a tenth of what the base's random matrices have."""
    rng, found = np.random.default_rng(seed), dict[str, np.ndarray]()
    for module, ours in modules(base).items():
        if module.rsplit(".", 1)[-1] in targets:
            rows, cols = weight_shapes(base)[ours.rsplit(".", 1)[-1]]
            for side, shape in (("A", (rank, cols)), ("B", (rows, rank))):
                drawn = 0.02 * rng.integers(-1, 2, shape) if ternary else rng.normal(size=shape) * 0.05
                found[f"base_model.model.{module}.lora_{side}.weight"] = drawn.astype(np.float32)
    return found


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def attach(model: Any, tensors: dict[str, np.ndarray], scale: Any) -> list[Any]:
    """Adds scale * (x A^T) B^T to a module's output, x being what it takes in, as PEFT does. `scale`: a number, or of the module."""
    import torch

    found = []
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = (torch.from_numpy(tensors[n].astype(np.float32)) for n in (name, name.replace("lora_A", "lora_B")))
        s = scale(module) if callable(scale) else scale

        def hook(_: Any, inputs: Any, output: Any, a: Any = a, b: Any = b, s: float = s) -> Any:
            return output + (inputs[0] @ a.T) @ b.T * s

        found.append(model.get_submodule(module).register_forward_hook(hook))
    return found
