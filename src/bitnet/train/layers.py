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

from bitnet.ternary import group_size


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [..., in] -> (whole numbers from -128 to 127 as float32 [..., in], the largest |x| [..., 1], a step being 1/127 of it)."""
    most = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * (127.0 / most)).round().clamp(-128, 127), most  # round half to even


class _QuantizedMatmul(torch.autograd.Function):
    """y = (step * q) @ (alpha * T)^T, gradients straight through both roundings; binary: T the signs, an alpha for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scheme: str, compute_dtype: torch.dtype) -> Tensor:
        if scheme == "ternary":
            alpha = weight.abs().mean().clamp(min=1e-5)
            codes = (weight / alpha).round().clamp(-1, 1).to(compute_dtype)  # [out, in]
        else:
            alpha = weight.abs().mean(dim=1)  # [out]
            codes = torch.where(weight < 0, -1.0, 1.0).to(compute_dtype)
        integers, most = int8_rows(x.float())
        scale, q = 127.0 / most, integers.to(compute_dtype)
        ctx.save_for_backward(q, scale, codes, alpha)
        return ((q @ codes.t()).float() * (alpha / scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, scale, codes, alpha = ctx.saved_tensors
        grad_x = ((grad.float() * alpha).to(codes.dtype) @ codes).to(grad.dtype)
        g = (grad.float() / scale).to(codes.dtype).flatten(0, -2)  # [tokens, out]
        grad_weight = (g.t() @ q.flatten(0, -2)).float()
        return grad_x, grad_weight, None, None


class TernaryLinear(nn.Linear):
    """Drop-in `nn.Linear` that computes with ternary weights (absmean) and int8 activations per token.

    `weight` float32 [out, in] stays the trainable master. `compute_dtype` is the dtype of the two integer matrix products;
    bfloat16 is exact for the operands and is what AMX and tensor cores multiply.
    """

    scheme = "ternary"
    compute_dtype: torch.dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _QuantizedMatmul.apply(x, self.weight, self.scheme, self.compute_dtype)
        return y if self.bias is None else y + self.bias


class BinaryLinear(TernaryLinear):
    """The same with weights of -1 and +1: signs, and mean|W| of each row as its scale (ternary.quantize_binary)."""

    scheme = "binary"


LAYERS = {"ternary": TernaryLinear, "binary": BinaryLinear}


def ternarize_linears(
    model: nn.Module, keep: tuple[str, ...] = ("lm_head",), compute_dtype: torch.dtype = torch.bfloat16, scheme: str = "ternary"
) -> list[str]:
    """Replace every `nn.Linear` of `model`, in place, by a `TernaryLinear`, or what else LAYERS has, that shares its parameters.

    Modules whose name ends with an entry of `keep` stay as they are. Returns the names of the replaced modules.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith(keep)]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = LAYERS[scheme](old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight, new.bias, new.compute_dtype = old.weight, old.bias, compute_dtype
        model.set_submodule(name, new)
    return names


class FrozenLinear(nn.Module):
    """A linear layer whose weights no longer change, as the engine computes it (ternary.matmul_integer, but in one float32 sum).

    `weight` is floats [out, in], which meet the activations as they are, or int8 codes [out, in] with `scales` float32 [out, groups] of
    equal runs of inputs; these meet int8 activations, with a step per token or per `activation_group` inputs.
    """

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of some outputs, float32 [len(ids), in]: an embedding."""
        return self._scaled(self.weight[ids].float(), None if self.scales is None else self.scales[ids])

    def forward(self, x: Tensor, activation_group: int = 0) -> Tensor:
        """x float32 [tokens, in] -> float32 [tokens, out]."""
        weight, scales = self.weight.float(), self.scales
        if scales is None:
            return x @ weight.t()
        whole = scales.shape[1] == 1  # then the scale, and the step of a whole token, leave with the sum, which is one of integers
        if not whole:
            weight = self._scaled(weight, scales)
        if activation_group:
            padded = nn.functional.pad(x, (0, -x.shape[1] % activation_group)).unflatten(1, (-1, activation_group))
            q, most = int8_rows(padded)
            y = (q * (most / 127.0)).flatten(1)[:, : x.shape[1]] @ weight.t()
            return y * scales[:, 0] if whole else y
        q, most = int8_rows(x)
        y = q @ weight.t()
        return (y * scales[:, 0] if whole else y) * (most / 127.0)

    @staticmethod
    def _scaled(weight: Tensor, scales: Tensor | None) -> Tensor:
        if scales is None:
            return weight
        size = group_size(weight.shape[1], scales.shape[1])
        return weight * scales.repeat_interleave(size, dim=1)[:, : weight.shape[1]]
