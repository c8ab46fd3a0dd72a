"""Along which axis, and with which scales, keys and values are best cut into groups: what each way of 4 bits costs a model.

    python benchmarks/kv_axis.py MODEL --data TEXT [--tokens 2048] [--windows 2]

A table and a JSON line: KL of the next token (nats, against f16 keys and values) and the share of positions with the same likeliest token.
Keys and values are rounded in a Hugging Face model's attention and multiplied in float32, so that only the rounding differs:

    token     a group is `--group` dimensions of one token's head, as the engine has it
    channel   a group is `--group` tokens of one dimension (KIVI, arXiv:2402.02750); the last tokens, which fill no group, stay f16. Here
              even a group's own tokens see each other rounded; a real cache would keep them in f16 until the group is full
    rotated   keys and queries through a Hadamard matrix first (QuaRot, arXiv:2404.00456)
    centered  a vector is taken off all keys of a head first, which no softmax feels: their mean over another text (--calibration)
    leveled   centered, then each dimension divided by its standard deviation there, and the queries' multiplied by it
    min-max   16 levels from the smallest to the largest value of a group (a scale and an offset), instead of -7 to 7 times a scale
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from bitnet.evaluate.perplexity import read_text
from bitnet.kv import hadamard_block
from bitnet.train.models import Base
from bitnet.transformer import TernaryTransformer

Rounding = Callable[[Tensor], Tensor]


def rounded(x: Tensor, min_max: bool) -> Tensor:
    """Groups along the last axis, to 4 bits and back; scale and offset in f16."""
    if min_max:
        low = x.amin(-1, keepdim=True).half().float()
        step = ((x.amax(-1, keepdim=True) - low) / 15).half().float().clamp_min(1e-7)
        return ((x - low) / step).round().clamp(0, 15) * step + low
    scale = (x.abs().amax(-1, keepdim=True) / 7).half().float().clamp_min(1e-7)
    return (x / scale).round().clamp(-7, 7) * scale


def by_token(x: Tensor, group: int, min_max: bool) -> Tensor:
    """x [batch, heads, tokens, head_dim]"""
    size = group if x.shape[-1] % group == 0 else x.shape[-1]
    return rounded(x.unflatten(-1, (-1, size)), min_max).flatten(-2)


def by_channel(x: Tensor, group: int, min_max: bool) -> Tensor:
    whole = x.shape[-2] // group * group
    turned = x[..., :whole, :].transpose(-1, -2).unflatten(-1, (-1, group))
    return torch.cat((rounded(turned, min_max).flatten(-2).transpose(-1, -2), x[..., whole:, :]), -2)


def rotate(x: Tensor) -> Tensor:
    """Each head through an orthonormal Hadamard matrix, in blocks."""
    block = hadamard_block(x.shape[-1])
    y = x.unflatten(-1, (-1, block))
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (y @ (matrix / block**0.5)).flatten(-2)


Statistics = dict[int, tuple[Tensor, Tensor]]  # layer -> mean and deviation of its keys, [heads, 1, head_dim]


def attention(keys: Rounding, values: Rounding, rotated: bool, level: str = "", statistics: Statistics | None = None) -> Callable[..., Any]:
    """For transformers: like its eager attention, with rounded keys and values. level: "", "centered", "leveled" or "look"."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any) -> Any:
        q, k, v = q.float(), k.half().float(), v.half().float()
        repeat = q.shape[1] // k.shape[1]
        if level == "look" and statistics is not None:
            statistics[module.layer_idx] = (k[0].mean(1, keepdim=True), k[0].std(1, keepdim=True) + 1e-6)
        elif level and statistics is not None:
            mean, deviation = statistics[module.layer_idx]
            k = k - mean
            if level == "leveled":
                k, q = k / deviation, q * deviation.repeat_interleave(repeat, 0)
        if rotated:
            q, k = rotate(q), rotate(k)
        k, v = keys(k), values(v)
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is None:
            mask = torch.full(scores.shape[-2:], -torch.inf).triu(1)
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask[..., : k.shape[-2]]
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    return attend


@torch.no_grad()
def log_probabilities(model: nn.Module, window: Tensor, way: Callable[..., Any]) -> Tensor:
    AttentionInterface.register("bitnet_kv_axis", way)
    model.set_attn_implementation("bitnet_kv_axis")  # type: ignore[operator]
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="another text, for the mean and deviation of keys")
    parser.add_argument("--only", nargs="*", help='ways, such as "keys token leveled"')
    parser.add_argument("--tokens", type=int, default=2048, help="of a window")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    args = parser.parse_args()
    base = Base(args.model)
    base.model.float().eval()
    tokenizer = TernaryTransformer.from_pretrained(args.model).tokenizer
    bos, width = tokenizer.prefix_ids, args.tokens - len(tokenizer.prefix_ids)
    ids = tokenizer.encode(read_text(args.data, 40 * args.tokens * args.windows))[len(bos) :]
    windows = [torch.tensor([*bos, *ids[i * width : (i + 1) * width]]) for i in range(args.windows)]

    def as_it_is(x: Tensor) -> Tensor:
        return x

    statistics: Statistics = {}
    other = tokenizer.encode(read_text(args.calibration, 40 * args.tokens))[: args.tokens]
    log_probabilities(base.model, torch.tensor(other), attention(as_it_is, as_it_is, False, "look", statistics))
    exact = [log_probabilities(base.model, window, attention(as_it_is, as_it_is, False)) for window in windows]
    axes = {"token": by_token, "channel": by_channel}
    ways = [("keys", axis, rotated, "", min_max) for axis, rotated, min_max in product(axes, (False, True), (False, True))]
    ways += [("keys", "token", rotated, level, False) for level, rotated in product(("centered", "leveled"), (False, True))]
    ways += [("values", axis, False, "", min_max) for axis, min_max in product(axes, (False, True))]
    found: list[dict[str, Any]] = []
    for what, axis, rotated, level, min_max in ways:
        if args.only and f"{what} {axis} {level}".strip() not in args.only:
            continue

        def way(x: Tensor, axis: str = axis, min_max: bool = min_max) -> Tensor:
            return axes[axis](x, args.group, min_max)

        attend = attention(way if what == "keys" else as_it_is, way if what == "values" else as_it_is, rotated, level, statistics)
        kl, same, n = 0.0, 0, 0
        for window, p in zip(windows, exact, strict=True):
            q = log_probabilities(base.model, window, attend)
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            n += len(window)
        bits = 4 + (32 if min_max else 16) / args.group
        row = {
            "what": what,
            "axis": axis,
            "rotated": rotated,
            "level": level,
            "min_max": min_max,
            "bits": bits,
            "kl": kl / n,
            "top1": same / n,
        }
        found.append(row)
        how = f"{'yes' if rotated else 'no'} | {level or 'no'} | {'min-max' if min_max else 'symmetric'}"
        print(f"| {what} | {axis} | {how} | {bits} | {kl / n:.4f} | {same / n:.1%} |", flush=True)
    print(json.dumps({"model": args.model, "data": args.data.name, "tokens": args.tokens, "windows": args.windows, "ways": found}))


if __name__ == "__main__":
    main()
