"""Layers that train in full precision and compute as the engine will: drop-ins for `nn.Linear` and `nn.Embedding`.

Method (BitNet b1.58, arXiv:2402.17764, section 2): the master weights W become codes times scales, each token's activations int8 with step
max|x| / 127. Both roundings have a zero derivative almost everywhere, so the backward pass takes them as the identity (straight-through
estimator): the gradient with respect to W is the one of the dequantized product, and the masters accumulate it until a code flips.

The forward multiplies the integers themselves (at most 128 in magnitude, exact in bfloat16) and scales afterwards, as the inference
engine does, so that what is trained is what runs. Under autocast the product is in its dtype, else in the weights' own.

Weights, as ternary.py and convert/quantize.py define them; mean and scale over the whole tensor, a row, or a group of a row's inputs:
- absmean: scale = mean|W|, T = clip(round(W / scale), -1, 1);
- threshold: T = sign(W) where |W| > alpha * mean|W|, else 0; scale = the mean of |W| over those that are kept;
- binary: signs, that of 0 being +1; scale = mean|W|, by default of each row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.errors import UsageError

SMALLEST_SCALE = 1e-5  # so that weights of nothing but zeros have one
# The article's alphas by kind of layer; it leaves o_proj out, which has the feed-forward's (convert/quantize.py says why).
ARTICLE_ALPHAS = {
    "*embed_tokens": 0.05, "*lm_head": 0.05, "*q_proj": 0.08, "*k_proj": 0.08, "*v_proj": 0.08, "*o_proj": 0.06,
    "*gate_proj": 0.06, "*up_proj": 0.06, "*down_proj": 0.06,
}  # fmt: skip


class TernarySTE(torch.autograd.Function):
    """The article's ternarization: sign(x) where |x| > threshold, else 0; the gradient passes where |x| <= clip, and is 0 elsewhere.

    `TernarySTE.apply(x, threshold=0.1, clip=0.3)`, x floats of any shape. A clip of infinity is the plain straight-through estimator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float = 0.1, clip: float = 0.3) -> Tensor:
        ctx.save_for_backward(x.abs() <= clip)
        return torch.where(x.abs() > threshold, x.sign(), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class PlainTernarySTE(torch.autograd.Function):
    """The same values, and a gradient that passes everywhere. `PlainTernarySTE.apply(x, threshold=0.1)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float = 0.1) -> Tensor:
        return torch.where(x.abs() > threshold, x.sign(), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True)
class Quantization:
    """How a layer's weights and activations become integers."""

    rule: str = "absmean"  # "absmean", "threshold" or "binary"
    alpha: float = 0.05  # of threshold: weights up to alpha * mean|W| become 0
    scale: str | int = "tensor"  # what shares a scale: "tensor", "row", or so many inputs of a row
    activations: str = "int8"  # with one step per token; or "none": as they come
    clip: float | None = None  # the weights' gradient passes where |W| <= clip; None: everywhere

    def __post_init__(self) -> None:
        if self.rule not in ("absmean", "threshold", "binary"):
            raise UsageError(f"rule is {self.rule!r}; expected absmean, threshold or binary")
        if self.activations not in ("int8", "none"):
            raise UsageError(f"activations is {self.activations!r}; expected int8 or none")
        whole = isinstance(self.scale, int) and not isinstance(self.scale, bool) and self.scale > 0 and self.scale % 16 == 0
        if self.scale not in ("tensor", "row") and not whole:
            raise UsageError(f"scale is {self.scale!r}; expected tensor, row, or a multiple of 16 inputs that share one")
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha < 10):
            raise UsageError(f"alpha is {self.alpha!r}; expected a number from 0 to 10, such as 0.05")
        if self.clip is not None and not (isinstance(self.clip, (int, float)) and self.clip > 0):
            raise UsageError(f"clip is {self.clip!r}; expected a number above 0, such as 0.3, or none")

    @property
    def scheme(self) -> str:
        return "binary" if self.rule == "binary" else "ternary"

    def check(self, inputs: int, where: str = "a layer") -> None:
        """Raises `UsageError` where groups do not divide a layer's inputs."""
        if isinstance(self.scale, int) and inputs % self.scale:
            raise UsageError(f"scale is {self.scale}, which does not divide {where}'s {inputs} inputs; expected tensor, row or a divisor")

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight float [out, in] -> (codes -1, 0, +1 as float32 [out, in], scales float32 [1 or out, groups])."""
        w = weight.detach().float()
        rows, inputs = w.shape
        if self.scale == "tensor":
            runs = w.reshape(1, 1, -1)
        elif self.scale == "row":
            runs = w.unsqueeze(1)
        else:
            self.check(inputs)
            runs = w.unflatten(1, (-1, int(self.scale)))
        size = runs.abs()  # [1 or out, groups, inputs of a group]
        mean = size.mean(dim=2, keepdim=True)
        if self.rule == "absmean":
            scales = mean.clamp(min=SMALLEST_SCALE)
            codes = (runs / scales).round().clamp(-1, 1)
        elif self.rule == "binary":
            scales, codes = mean, torch.where(runs < 0, -1.0, 1.0)
        else:
            kept = size > self.alpha * mean
            codes = torch.where(kept, runs.sign(), 0.0)
            scales = ((size * kept).sum(dim=2, keepdim=True) / kept.sum(dim=2, keepdim=True).clamp(min=1)).clamp(min=SMALLEST_SCALE)
        return codes.reshape(rows, inputs), scales.squeeze(2)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [..., in] -> (whole numbers from -128 to 127 as float32 [..., in], the largest |x| [..., 1], a step being 1/127 of it)."""
    most = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * (127.0 / most)).round().clamp(-128, 127), most  # round half to even


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [out, in] times scales [1 or out, groups], float32 [out, in]."""
    if scales.shape[1] == 1:
        return codes * scales
    runs: Tensor = codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)
    return runs.flatten(1)


class _Product(torch.autograd.Function):
    """y = x^ W^T, where x^ is x by int8 steps or x itself, and W^ = codes * scales; gradients straight through to x and to `weight`.

    A scale that a whole row shares leaves with the sum, which then is one of integers. The result is of `dtype`, as that of `nn.Linear`
    is under autocast, and so is the product; but float16, which ends at 65,504, would not hold 516 times 127: there it is float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, codes: Tensor, scales: Tensor, integers: bool, clip: float | None, dtype: torch.dtype
    ) -> Tensor:
        whole = scales.shape[1] == 1
        wide = torch.float32 if dtype == torch.float16 else dtype
        w = (codes if whole else dequantized(codes, scales)).to(wide)
        factor = scales[:, 0] if whole else None  # [1 or out]
        if integers:
            q, most = int8_rows(x.float())
            step = most / 127.0
        else:
            q, step = x, None
        q = q.to(wide)
        ctx.input_dtype = x.dtype
        ctx.save_for_backward(q, step, w, factor, (weight.detach().abs() <= clip) if clip is not None and weight is not None else None)
        y = (q @ w.t()).float()
        y = y if factor is None else y * factor
        return (y if step is None else y * step).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, step, w, factor, passes = ctx.saved_tensors
        g = grad.to(w.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            one = factor is not None and factor.numel() == 1  # then it is cheaper after the product
            grad_x = (g if factor is None or one else (grad * factor).to(w.dtype)) @ w
            grad_x = (grad_x * factor if one else grad_x).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            x = q if step is None else (q * step).to(w.dtype)  # what layers that share an input share, too
            grad_weight = (g.reshape(-1, g.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).float()
            if passes is not None:
                grad_weight = grad_weight * passes
        return grad_x, grad_weight, None, None, None, None, None


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's where it is on, else the weights'."""
    kind = x.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return dtype


class TernaryLinear(nn.Linear):
    """Drop-in `nn.Linear`: ternary weights, and activations by int8 steps, as `quantization` says (default: as BitNet b1.58).

    `weight` float [out, in] stays the trainable master. `sub_norm`: an RMSNorm of its own before the activations are rounded.
    `blend`: None, or a tensor [] lambda from 0 to 1: W + lambda * (W^ - W) and likewise the activations, so that a model in full
    precision can warm up to lambda = 1, which is the layer without it.
    """

    default = Quantization()
    blend: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        quantization: Quantization | None = None,
        sub_norm: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.quantization = quantization or self.default
        self.quantization.check(in_features)
        self.sub_norm = nn.RMSNorm(in_features, eps=1e-5, device=device, dtype=dtype) if sub_norm else None

    @property
    def scheme(self) -> str:
        return self.quantization.scheme

    def matrix(self) -> Tensor:
        """The masters as [out, in]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        how, masters = self.quantization, self.matrix()
        if self.sub_norm is not None:
            x = self.sub_norm(x)
        codes, scales = how.of(masters)
        if self.blend is not None:
            return self._blended(x, dequantized(codes, scales), self.blend)
        y: Tensor = _Product.apply(x, masters, codes, scales, how.activations == "int8", how.clip, compute_dtype(x, masters))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _blended(self, x: Tensor, quantized: Tensor, share: Tensor) -> Tensor:
        masters, clip = self.matrix(), self.quantization.clip
        through = masters if clip is None else torch.where(masters.detach().abs() <= clip, masters, masters.detach())
        w = (through + share * (quantized - masters.detach())).to(masters.dtype)
        if self.quantization.activations == "int8":
            q, most = int8_rows(x.detach().float())
            x = x + share.to(x.dtype) * ((q * (most / 127.0)).to(x.dtype) - x.detach())
        return nn.functional.linear(x, w, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantization}"


class BinaryLinear(TernaryLinear):
    """The same with weights of -1 and +1: signs, and mean|W| of each row as its scale (ternary.quantize_binary)."""

    default = Quantization(rule="binary", scale="row")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.quantization = replace(self.quantization, rule="binary")  # whatever else is asked for


class TernaryConv1D(TernaryLinear):
    """In place of transformers' Conv1D (GPT-2), a linear layer whose `weight` is [in, out]: the same, ternary or binary."""

    def matrix(self) -> Tensor:
        return self.weight.t()


class TernaryEmbedding(nn.Embedding):
    """Drop-in `nn.Embedding` whose rows are ternary, by default with a scale for each row, which is a token's.

    With a scale for the tensor the whole table is ternarized in every step, else only the rows that are looked up.
    """

    default = Quantization(scale="row")
    blend: Tensor | None = None

    def __init__(self, *args: Any, quantization: Quantization | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.quantization = quantization or self.default
        self.quantization.check(self.embedding_dim)

    @property
    def scheme(self) -> str:
        return self.quantization.scheme

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        if self.quantization.scale == "tensor":
            quantized = dequantized(*self.quantization.of(self.weight))[ids]
        else:
            quantized = dequantized(*self.quantization.of(rows.reshape(-1, rows.shape[-1]))).view_as(rows)
        off = quantized.to(rows.dtype) - rows.detach()
        through = (
            rows if self.quantization.clip is None else torch.where(rows.detach().abs() <= self.quantization.clip, rows, rows.detach())
        )
        return through + (off if self.blend is None else self.blend.to(rows.dtype) * off)


LAYERS = {"ternary": TernaryLinear, "binary": BinaryLinear}


def ternarize_model(
    model: nn.Module,
    layers: str | Mapping[str, float | Quantization] = "*",
    *,
    keep: str | tuple[str, ...] = ("lm_head",),
    quantization: Quantization | None = None,
    sub_norm: bool = False,
) -> list[str]:
    """Replace layers of `model`, any of Hugging Face's, in place by `TernaryLinear` and `TernaryEmbedding` that share their parameters.

    `layers`: one pattern of module names ("*.mlp.*"), or patterns with what holds for them, the first that matches: a `Quantization`, or
    an alpha, which makes it threshold's; or "article" for `ARTICLE_ALPHAS`, of all layers, embedding and head included. One pattern, and
    those it is for, means linear layers: an embedding changes only by a pattern that says "embed" or fits no linear layer. Embeddings that
    look up otherwise than `nn.Embedding` (positions with an offset) stay.
    `keep`: patterns, or ends of names, of what stays. `quantization`: of layers without their own; default: absmean, int8 activations.
    Tied embedding and head stay tied: one master for both. Returns the names of the replaced modules.
    A warning says which patterns match nothing, and that experts in one tensor stay as they are. Raises `UsageError` where none matches.
    """
    if not isinstance(layers, (str, Mapping)):
        raise UsageError(f"layers is {type(layers).__name__}; expected one pattern, or {{pattern: alpha or Quantization, ...}}")
    if not isinstance(quantization, (Quantization, type(None))):
        raise UsageError(f"quantization is {quantization!r}; expected a Quantization, such as Quantization('threshold', alpha=0.05)")
    keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
    base = quantization or Quantization()
    if layers == "article":
        layers, keep = ARTICLE_ALPHAS, tuple(k for k in keep if k != "lm_head")
    patterns: Mapping[str, float | Quantization] = {layers: base} if isinstance(layers, str) else layers
    tables = not isinstance(layers, str)
    found: dict[str, nn.Module] = {}
    used: set[str] = set()
    made: dict[int, nn.Module] = {}  # of a module that has several names one takes its place under all
    modules = list(model.named_modules(remove_duplicate=False))
    of_linears = {p for p in patterns if any(fnmatchcase(n, p) for n, m in modules if isinstance(m, nn.Linear) or _is_conv1d(m))}
    for name, module in modules:
        embedding = _is_embedding(module)
        if not (_is_linear(module) or _is_conv1d(module) or (embedding and tables)) or any(
            name.endswith(k) or fnmatchcase(name, k) for k in keep
        ):
            continue
        which = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        how = None if which is None else patterns[which]
        if how is None or (embedding and not any(("embed" in p or p not in of_linears) and fnmatchcase(name, p) for p in patterns)):
            continue
        if not isinstance(how, Quantization):
            how = replace(base, rule="threshold", alpha=how)
        if not name:
            raise UsageError(
                f"model is itself a {type(module).__name__}; expected one that holds layers, or use TernaryLinear in its place"
            )
        if id(module) not in made:
            how.check(module.weight.shape[0 if _is_conv1d(module) else 1], name)
            made[id(module)] = _replaced(module, how, sub_norm, table=embedding or name.endswith("lm_head"))
        found[name] = made[id(module)]
        used |= {pattern for pattern in patterns if fnmatchcase(name, pattern)}
    for name, new in found.items():  # once all of them can be
        model.set_submodule(name, new)
    kind, unused = type(model).__name__, [pattern for pattern in patterns if pattern not in used]
    if not found:
        raise UsageError(f"no layer of {kind} matches {', '.join(patterns)}; expected patterns of module names, as '*.mlp.*'")
    if unused:
        warnings.warn(f"no layer of {kind} matches {', '.join(unused)}; {len(found)} others became ternary", stacklevel=2)
    experts = [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    if experts:
        warnings.warn(f"{len(experts)} tensors of {kind} that hold all experts stay as they are ({experts[0]}, ...)", stacklevel=2)
    return list(found)


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes what `nn.Linear` does: the class itself, or one of another name with the same outputs (falcon's)."""
    if type(module) is nn.Linear or not isinstance(module, nn.Linear) or isinstance(module, (TernaryLinear, FrozenTernaryLinear)):
        return type(module) is nn.Linear
    weight = module.weight
    if weight.is_meta or not weight.is_floating_point() or weight.shape != (module.out_features, module.in_features):
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device).reshape(2, -1).to(weight.dtype)
    with torch.no_grad():
        return torch.allclose(module(x), nn.functional.linear(x, weight, module.bias), rtol=1e-3, atol=1e-5)


def _is_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up as `nn.Embedding` does, or times a number (gemma's): not one of places, with an offset (opt's)."""
    if type(module) is nn.Embedding or not isinstance(module, nn.Embedding) or isinstance(module, TernaryEmbedding):
        return type(module) is nn.Embedding
    if module.weight.is_meta:
        return False
    ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device)[None]
    times = getattr(module, "embed_scale", 1.0)
    try:
        with torch.no_grad():
            return torch.allclose(module(ids), module.weight[ids] * times, rtol=1e-2, atol=1e-6)
    except Exception:  # it wants something else than ids
        return False


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer that keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) == module.weight.shape[-1]  # type: ignore[index]


def _replaced(old: nn.Module, how: Quantization, sub_norm: bool, table: bool) -> nn.Module:
    """`table`: embedding or head, whose rows are tokens, which differ in length: a scale for every row at least."""
    how = replace(how, scale="row") if table and how.scale == "tensor" else how
    weight: Tensor = old.weight  # type: ignore[assignment]
    if isinstance(old, nn.Embedding):
        scaled = _ScaledTernaryEmbedding if hasattr(old, "embed_scale") else TernaryEmbedding
        embedding = scaled(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx, device="meta", quantization=how)
        if hasattr(old, "embed_scale"):
            embedding.register_buffer("embed_scale", old.embed_scale, persistent=False)  # type: ignore[arg-type]
        embedding.weight = old.weight
        return embedding
    kind, (rows, inputs) = LAYERS[how.scheme], weight.shape
    if _is_conv1d(old):
        kind, (inputs, rows) = TernaryConv1D, weight.shape
    new = kind(inputs, rows, bias=old.bias is not None, device="meta", quantization=how)
    new.sub_norm = nn.RMSNorm(inputs, eps=1e-5, device=weight.device, dtype=weight.dtype) if sub_norm else None
    new.weight, new.bias = old.weight, old.bias  # type: ignore[assignment]
    return new


class _ScaledTernaryEmbedding(TernaryEmbedding):
    """gemma's, whose rows are multiplied by a number."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)  # type: ignore[operator]


def set_blend(model: nn.Module, share: Tensor | None) -> None:
    """The lambda of every layer that has one: a tensor [] shared by all, or None for 1."""
    for module in model.modules():
        if isinstance(module, (TernaryLinear, TernaryEmbedding)):
            module.blend = share


class FrozenTernaryLinear(nn.Linear):
    """A linear layer whose packed weights do not train, kept as int8 codes (a byte each), through which gradients reach its inputs."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(codes.shape[1], codes.shape[0], bias=bias is not None, device="meta")
        del self.weight
        self.register_buffer("weight", codes)  # int8 [out, in]
        self.register_buffer("scales", scales)  # float32 [1 or out, groups]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        y: Tensor = _Product.apply(x, None, self.weight, self.scales, True, None, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
