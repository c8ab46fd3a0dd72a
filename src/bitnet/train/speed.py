"""How fast a run trains, against what its device can do: tokens/s, and the share of the rate that a large matrix product reaches here.

Arithmetic of the model alone is counted (PaLM, arXiv:2204.02311, appendix B, with causal attention): two operations for a weight and token
forward, two for the gradient of the inputs, two for that of a weight that trains. So what quantizing, norms and optimizers take is a loss.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that are multiplied
_SECONDS = 0.3


def operations_per_token(model: nn.Module, length: int, trains: bool = True) -> float:
    """Multiplications and additions for one token of a window of `length` tokens; of a teacher, which does not train, forward alone."""
    found: list[Any] = [getattr(m, "weight", None) for m in model.modules() if not isinstance(m, nn.Embedding)]
    matrices = [w for w in found if isinstance(w, torch.Tensor) and w.ndim == 2]
    products = sum(w.numel() * (2 if not trains else 6 if w.requires_grad else 4) for w in matrices)
    config: Any = model.config
    c = config.get_text_config()
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    attention = 4 * c.num_hidden_layers * width * length / 2  # scores, and what they weigh: half of the places are in the future
    return float(products + attention * (3 if trains else 1))


def peak_operations(device: torch.device, bf16: bool) -> float:
    """Operations a second of the largest matrix product that is tried, the best of a third of a second's repetitions."""
    side = _SIDE.get(device.type, 4096)
    a, b = (torch.ones((side, side), device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    (a @ b).sum().item()  # to begin with
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
