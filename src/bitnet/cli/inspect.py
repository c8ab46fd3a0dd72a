"""`bitnet inspect`: what a model is made of, without loading it into the engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import debug_option, json_option, model_argument

if TYPE_CHECKING:
    from bitnet.files.tensor import Tensor

KINDS = {
    "embedding": "embedding", "head": "head", "final_norm": "norms",
    "q": "attention", "k": "attention", "v": "attention", "o": "attention",
    "gate": "feed-forward", "up": "feed-forward", "down": "feed-forward",
    "attn_norm": "norms", "ffn_norm": "norms", "attn_sub_norm": "norms", "ffn_sub_norm": "norms",
}  # fmt: skip  # last part of a canonical tensor name -> what the table calls it


@click.command("inspect", short_help="Show what a model is made of.")
@model_argument
@json_option
@debug_option
def command(model: str, as_json: bool) -> None:
    """Show what a model is made of: its configuration, and the parameters, schemes and bytes of its tensors.

    MODEL is the embedded model's name (the default), a folder in Hugging Face layout, or one file.
    """
    from bitnet.cli.progress import DelayedBar
    from bitnet.files.hf import open_checkpoint
    from bitnet.transformer import resolve

    with DelayedBar("inspect") as bar:
        found = describe(open_checkpoint(resolve(model)), bar)
    click.echo("\n".join(lines(found)))
    if as_json:
        click.echo(json.dumps({"model": model, **found}))


def describe(checkpoint: Any, progress: Any) -> dict[str, Any]:
    """A plain record of a checkpoint. A family that this build cannot run is still described; `runs` then says why not."""
    from dataclasses import asdict

    from bitnet.errors import BitNetError
    from bitnet.models import adapter_for, quantization
    from bitnet.transformer import load_tokenizer

    where = str(checkpoint.path)
    config: dict[str, Any] = {}
    canonical: dict[str, str] = {}  # tensor name -> canonical name
    runs = "yes"
    online = False
    try:
        adapter = adapter_for(checkpoint.config, where)
        model_config = adapter.config(checkpoint.config, where)
        canonical = {theirs: ours for ours, theirs in adapter.names(model_config).items()}
        config = asdict(model_config)
        quant = quantization(checkpoint.config, where)
        online = quant is not None and quant.online
    except BitNetError as error:
        runs = f"no: {error}"
    tokenizer: int | str | None = None
    if checkpoint.tokenizer_json is not None:
        try:
            tokenizer = len(load_tokenizer(checkpoint, config.get("vocab_size", 1 << 31)))
        except BitNetError as error:
            tokenizer = f"unusable: {error}"
    groups, zeros, trits = tensor_groups(checkpoint.tensors, canonical, config, progress)
    return {
        "path": where,
        "runs": runs,
        "config": config or {"architecture": checkpoint.config.get("model_type")},
        "parameters": sum(group["parameters"] for group in groups),
        "bytes": sum(group["bytes"] for group in groups),
        "tensors": groups,
        "ternary_zero_share": zeros / trits if trits else None,
        "ternarized_at_load": online,
        "tokenizer_tokens": tokenizer,
    }


def tensor_groups(
    tensors: dict[str, Tensor], canonical: dict[str, str], config: dict[str, Any], progress: Any
) -> tuple[list[dict[str, Any]], int, int]:
    """(one record per kind and scheme, zeros among the ternary weights, number of ternary weights). A scale is no parameter, but bytes."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    zeros = trits = 0
    for done, (name, tensor) in enumerate(tensors.items()):
        is_scale = name.endswith("_scale")
        kind = "scales" if is_scale else KINDS.get(canonical.get(name, "").rpartition(".")[2], "other")
        size = 1
        for n in tensor.shape:
            size *= n
        if tensor.scheme == "ternary":
            codes = tensor.trits()[: out_features(canonical.get(name, ""), config)]  # without the padding rows
            zeros, trits, size = zeros + int((codes == 0).sum()), trits + codes.size, codes.size
        group = groups.setdefault((kind, tensor.scheme), {"kind": kind, "scheme": tensor.scheme, "tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += 0 if is_scale else size
        group["bytes"] += tensor.nbytes
        progress(done + 1, len(tensors))
    return list(groups.values()), zeros, trits


def out_features(canonical_name: str, config: dict[str, Any]) -> int | None:
    """Rows of a linear layer; None (all that are stored) for an unknown one."""
    part = canonical_name.rpartition(".")[2]
    if part == "q":
        return int(config["n_heads"] * config["head_dim"])
    if part in ("k", "v"):
        return int(config["n_kv_heads"] * config["head_dim"])
    sizes = {"o": "hidden_size", "gate": "ffn_size", "up": "ffn_size", "down": "hidden_size"}
    return int(config[sizes[part]]) if part in sizes else None


def lines(found: dict[str, Any]) -> list[str]:
    """The record as a table for people."""
    zero_share = found["ternary_zero_share"]
    tokenizer = found["tokenizer_tokens"]
    out = [f"{found['path']}: {found['parameters']:,} parameters in {found['bytes']:,} bytes"]
    out += [f"  {key:<16} {value}" for key, value in found["config"].items()]
    out.append(f"  {'kind':<14} {'scheme':<8} {'tensors':>8} {'parameters':>15} {'bytes':>15}")
    out += [f"  {g['kind']:<14} {g['scheme']:<8} {g['tensors']:>8} {g['parameters']:>15,} {g['bytes']:>15,}" for g in found["tensors"]]
    if zero_share is not None:
        out.append(f"zeros among the ternary weights: {zero_share:.1%}")
    if found["ternarized_at_load"]:
        out.append("the linear layers are stored as masters and ternarized at load")
    out.append("tokenizer: " + ("none" if tokenizer is None else tokenizer if isinstance(tokenizer, str) else f"{tokenizer:,} tokens"))
    out.append(f"runs in this build: {found['runs']}")
    return out
