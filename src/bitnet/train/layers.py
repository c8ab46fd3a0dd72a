"""The ternary linear layer, trainable: full-precision master weights, ternary in the forward pass.

Method (BitNet b1.58, arXiv:2402.17764, section 2): the weight matrix W becomes alpha * T with alpha = mean|W| and
T = clip(round(W / alpha), -1, 1); each token's activation row becomes int8 with step max|x| / 127. Both roundings have a
zero derivative almost everywhere, so the backward pass takes them as the identity (straight-through estimator): the gradient
with respect to W is the one of the dequantized product, and the master weights accumulate it until a trit flips.

The forward multiplies the integers themselves (at most 128 in magnitude, exact in bfloat16) and scales afterwards, as
the inference engine does, so that what is trained is what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _TernaryMatmul(torch.autograd.Function):
    """y = (step * q) @ (alpha * T)^T, gradients straight through both roundings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
        alpha = weight.abs().mean().clamp(min=1e-5)
        trits = (weight / alpha).round().clamp(-1, 1).to(compute_dtype)  # [out, in]
        xf = x.float()
        scale = 127.0 / xf.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)  # [..., 1]
        q = (xf * scale).round().clamp(-128, 127).to(compute_dtype)  # [..., in], round half to even
        ctx.save_for_backward(q, scale, trits, alpha)
        return ((q @ trits.t()).float() * (alpha / scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, scale, trits, alpha = ctx.saved_tensors
        grad_x = ((grad.to(trits.dtype) @ trits).float() * alpha).to(grad.dtype)
        g = (grad.float() / scale).to(trits.dtype).flatten(0, -2)  # [tokens, out]
        grad_weight = (g.t() @ q.flatten(0, -2)).float()
        return grad_x, grad_weight, None


class TernaryLinear(nn.Linear):
    """Drop-in `nn.Linear` that computes with ternary weights (absmean) and int8 activations per token.

    `weight` float32 [out, in] stays the trainable master. `compute_dtype` is the dtype of the two integer matrix products;
    bfloat16 is exact for the operands and is what AMX and tensor cores multiply.
    """

    compute_dtype: torch.dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TernaryMatmul.apply(x, self.weight, self.compute_dtype)
        return y if self.bias is None else y + self.bias


def ternarize_linears(model: nn.Module, keep: tuple[str, ...] = ("lm_head",), compute_dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Replace every `nn.Linear` of `model`, in place, by a `TernaryLinear` that shares its parameters.

    Modules whose name ends with an entry of `keep` stay as they are. Returns the names of the replaced modules.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith(keep)]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = TernaryLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight, new.bias, new.compute_dtype = old.weight, old.bias, compute_dtype
        model.set_submodule(name, new)
    return names
