"""L1 on the gates of relu^2 feed-forwards: more of them become zero, so that more can be skipped (docs/zero-skip.md).

Adds `weight` times the mean of relu(gate), over tokens and gates of each layer, to what is minimized. Only the positive gates feel it: a
zero one is where it should be. It enters as a gradient, not in the loss, which keeps saying how well the text is predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _PenalizedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(gate > 0)
        ctx.weight = weight
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positive,) = ctx.saved_tensors
        return gradient + positive.to(gradient.dtype) * (ctx.weight / positive.numel()), None


def _gates(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("gate_proj")]


def penalize_gates(model: nn.Module, weight: float) -> int:
    """Hooks every `gate_proj` of `model`; returns how many there are. A weight of 0 leaves the model as it is."""
    gates = _gates(model) if weight else []
    weigh_gates(model, weight)
    for gate in gates:
        gate.register_forward_hook(lambda module, _inputs, output: _PenalizedGate.apply(output, module.l1_weight))
    return len(gates)


def weigh_gates(model: nn.Module, weight: float) -> None:
    """The weight of what comes next: of a part of a batch, its share of it."""
    for gate in _gates(model):
        gate.l1_weight = weight  # type: ignore[assignment]
