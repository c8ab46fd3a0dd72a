"""`bitnet inspect`: what a model is made of, without loading it into the engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import debug_option, hub_options, json_option, model_argument

if TYPE_CHECKING:
    from bitnet.files.tensor import Tensor

KINDS = {
    "embedding": "embedding", "head": "head",
    "q": "attention", "k": "attention", "v": "attention", "o": "attention",
    "gate": "feed-forward", "up": "feed-forward", "down": "feed-forward",
}  # fmt: skip  # last part of a canonical tensor name -> what the table calls it


MAX_ACCURACY_BYTES = 16_384  # of --data: some 4,000 tokens


@click.command("inspect", short_help="Show what a model is made of.")
@model_argument
@click.option("--accuracy", is_flag=True, help="Measure what integer weights and activations cost, against the exact path.")
@click.option(
    "--zeros", is_flag=True, help="Count what is zero, layer by layer: gates, inputs of down_proj, weights and whole tiles of them."
)
@click.option("--data", metavar="FILE", help="With --accuracy or --zeros: the text to measure on. Default: a short built-in one.")
@click.option("--threads", type=int, metavar="N", help="With --accuracy or --zeros: threads. Default: one per core.")
@click.option("--ternary", is_flag=True, expose_value=False, help="Accepted as by every command: weights are shown as they are stored.")
@hub_options
@json_option
@debug_option
def command(
    model: str, accuracy: bool, zeros: bool, data: str | None, threads: int | None, as_json: bool, **hub: str | None
) -> None:  # fmt: skip
    """Show what a model is made of: its configuration, and the parameters, schemes and bytes of its tensors.

    MODEL is the embedded model's name (the default), a folder in Hugging Face layout, one file, or org/name from the Hub.
    """
    from bitnet.cli.progress import DelayedBar
    from bitnet.models import open_checkpoint
    from bitnet.source import resolve

    if not (accuracy or zeros) and (data is not None or threads is not None):
        raise click.UsageError(f"{'--data' if data is not None else '--threads'} is for --accuracy and --zeros")
    if data is not None:
        from pathlib import Path

        from bitnet.evaluate.perplexity import read_text

        read_text(Path(data), MAX_ACCURACY_BYTES)  # before the long part
    checkpoint = open_checkpoint(resolve(model, **hub))
    with DelayedBar("inspect") as bar:
        found = describe(checkpoint, bar)
    click.echo("\n".join(lines(found)))
    if accuracy:
        with DelayedBar("accuracy") as bar:
            found["accuracy"] = measured(checkpoint, data, threads, bar)
        click.echo("\n".join(accuracy_lines(found["accuracy"])))
    if zeros:
        with DelayedBar("zeros") as bar:
            found["zeros"] = counted_zeros(checkpoint, data, threads, bar)
        click.echo("\n".join(zeros_lines(found["zeros"])))
    if as_json:
        click.echo(json.dumps({"model": model, **found}))


def counted_zeros(checkpoint: Any, data: str | None, threads: int | None, progress: Any) -> dict[str, Any]:
    """Zeros of the activations on the built-in text or the beginning of `data`, and of the ternary weights."""
    from dataclasses import asdict
    from pathlib import Path

    from bitnet.evaluate.perplexity import read_text
    from bitnet.evaluate.zeros import MOST_TOKENS, activation_zeros, weight_zeros
    from bitnet.models import canonical
    from bitnet.sample import text as sample_text
    from bitnet.source import load_tokenizer

    text = sample_text() if data is None else read_text(Path(data), MAX_ACCURACY_BYTES)
    config = canonical(checkpoint).config
    ids = load_tokenizer(checkpoint, config.vocab_size).encode(text)[: min(MOST_TOKENS, config.max_context)]
    layers = [asdict(layer) for layer in activation_zeros(checkpoint, ids, threads)]
    weights = [asdict(kind) for kind in weight_zeros(checkpoint, progress)]
    return {"activation": config.activation, "tokens": len(ids), "layers": layers, "weights": weights}


def zeros_lines(found: dict[str, Any]) -> list[str]:
    """The zeros as two tables for people."""
    layers, weights = found["layers"], found["weights"]
    mean = {key: sum(layer[key] for layer in layers) / len(layers) for key in ("gates", "inputs")}
    out = [f"zeros over {found['tokens']} tokens, {found['activation']}: gates are rows of up_proj, inputs columns of down_proj, to skip"]
    out += [f"  {'layer':<6} {'gates':>8} {'inputs':>8}"]
    out += [f"  {layer['layer']:<6} {layer['gates']:>8.2%} {layer['inputs']:>8.2%}" for layer in [*layers, {"layer": "mean", **mean}]]
    if found["activation"] != "relu2":
        out.append(f"  {found['activation']} has no zeros but by underflow: nothing to skip")
    if not weights:
        return [*out, "no packed ternary weights: no zero tiles to count"]
    tiles = list(weights[0]["tiles"])
    out += ["zeros among the ternary weights; tiles are rows x inputs that are all zero", "  " + " ".join(
        [f"{'part':<6}", *(f"{name:>9}" for name in ("weights", *tiles, "rows", "columns"))]
    )]  # fmt: skip
    for kind in weights:
        shares = [kind["weights"], *kind["tiles"].values(), kind["rows"], kind["columns"]]
        out.append("  " + " ".join([f"{kind['part']:<6}", *(f"{share:>9.3%}" for share in shares)]))
    return out


def measured(checkpoint: Any, data: str | None, threads: int | None, progress: Any) -> list[dict[str, Any]]:
    """The loss of every way to run the model, on the built-in text or the first MAX_ACCURACY_BYTES of `data`; none for a BitNet model."""
    from dataclasses import asdict
    from pathlib import Path

    from bitnet.evaluate.accuracy import losses
    from bitnet.evaluate.perplexity import read_text
    from bitnet.models import canonical
    from bitnet.sample import text as sample_text
    from bitnet.source import load_tokenizer

    text = sample_text() if data is None else read_text(Path(data), MAX_ACCURACY_BYTES)
    model = canonical(checkpoint)
    if model.quantization:
        return []
    ids = load_tokenizer(checkpoint, model.config.vocab_size).encode(text)
    return [asdict(loss) for loss in losses(checkpoint, ids, threads=threads, progress=progress)]


def accuracy_lines(found: list[dict[str, Any]]) -> list[str]:
    """The losses as a table for people; the one that runs by default is marked."""
    if not found:
        return ["accuracy: a BitNet model is trained with int8 activations per token and runs so; there is nothing that it loses"]
    out = [f"  {'weights':<8} {'activations':<20} {'perplexity':>11} {'KL, nats':>9} {'same top-1':>10} {'MB a token':>11}"]
    for loss in found:
        out.append(
            f"  {loss['weights']:<8} {loss['activations']:<20} {loss['perplexity']:>11.3f} {loss['kl']:>9.5f} {loss['top1']:>10.1%} "
            f"{loss['weight_bytes_per_token'] / 1e6:>11.1f}{'  (default)' if loss['default'] else ''}"
        )
    return out


def describe(checkpoint: Any, progress: Any) -> dict[str, Any]:
    """A plain record of a checkpoint. A family that this build cannot run is still described; `runs` then says why not."""
    from dataclasses import asdict

    from bitnet.errors import BitNetError
    from bitnet.models import canonical
    from bitnet.source import load_tokenizer

    where = str(checkpoint.path)
    config: dict[str, Any] = {}
    names: dict[str, str] = {}  # tensor name -> canonical name
    runs = "yes"
    online = False
    try:
        model = canonical(checkpoint)
        names = {theirs: ours for ours, theirs in model.names.items()}
        config = asdict(model.config)
        online = model.quantization is not None and model.quantization.online and checkpoint.layout == "hf"
    except BitNetError as error:
        runs = f"no: {error}"
    tokenizer: int | str | None = None
    if checkpoint.tokenizer_json is not None or "tokenizer.ggml.model" in checkpoint.gguf_metadata:
        try:
            tokenizer = len(load_tokenizer(checkpoint, config.get("vocab_size", 1 << 31)))
        except BitNetError as error:
            tokenizer = f"unusable: {error}"
    groups, zeros, trits = tensor_groups(checkpoint.tensors, names, config, progress)
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
    tensors: dict[str, Tensor], names: dict[str, str], config: dict[str, Any], progress: Any
) -> tuple[list[dict[str, Any]], int, int]:
    """(one record per kind and scheme, zeros among the ternary weights, number of ternary weights).

    A scale, and a weight that others were made from (latent), is no parameter, but bytes.
    """
    from bitnet.models import LATENT

    groups: dict[tuple[str, str], dict[str, Any]] = {}
    zeros = trits = 0
    for done, (name, tensor) in enumerate(tensors.items()):
        beside = "scales" if name.endswith(("_scale", ".scale")) else "latent" if name.rpartition(".")[2] in LATENT else None
        part = names.get(name, "").rpartition(".")[2]
        kind = beside or KINDS.get(part) or next((k for k in ("norm", "bias") if part.endswith(f"_{k}")), "other")
        size = 1
        for n in tensor.shape:
            size *= n
        if tensor.scheme == "ternary":
            codes = tensor.trits()[: out_features(names.get(name, ""), config)]  # without the padding rows
            zeros, trits, size = zeros + int((codes == 0).sum()), trits + codes.size, codes.size
        group = groups.setdefault((kind, tensor.scheme), {"kind": kind, "scheme": tensor.scheme, "tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += 0 if beside else size
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


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow"),
}
UNREMARKABLE = (None, (), 0, 1.0, False)  # values of ModelConfig that say what most models are


def worded(value: Any) -> str:
    """A configuration's value on one short line."""
    if isinstance(value, dict):  # rope
        keys = (*ROPE_FIELDS.get(value["kind"], ()), "attention_factor")
        scaling = [f"{key} {worded(value[key])}" for key in keys if value[key] not in UNREMARKABLE]
        given = ["divisors from the file"] if value["divisors"] else []
        return ", ".join([f"theta {value['theta']:g}", *([value["kind"]] if value["kind"] != "default" else []), *scaling, *given])
    if isinstance(value, tuple) and isinstance(value[0], bool):
        return f"{sum(value)} of {len(value)} layers"
    return f"{value:g}" if isinstance(value, float) else str(value)


def lines(found: dict[str, Any]) -> list[str]:
    """The record as a table for people."""
    zero_share = found["ternary_zero_share"]
    tokenizer = found["tokenizer_tokens"]
    out = [f"{found['path']}: {found['parameters']:,} parameters in {found['bytes']:,} bytes"]
    out += [f"  {key:<16} {worded(value)}" for key, value in found["config"].items() if value not in UNREMARKABLE]
    out.append(f"  {'kind':<14} {'scheme':<8} {'tensors':>8} {'parameters':>15} {'bytes':>15}")
    out += [f"  {g['kind']:<14} {g['scheme']:<8} {g['tensors']:>8} {g['parameters']:>15,} {g['bytes']:>15,}" for g in found["tensors"]]
    if zero_share is not None:
        out.append(f"zeros among the ternary weights: {zero_share:.1%}")
    if found["ternarized_at_load"]:
        out.append("the linear layers are stored as masters and ternarized at load")
    out.append("tokenizer: " + ("none" if tokenizer is None else tokenizer if isinstance(tokenizer, str) else f"{tokenizer:,} tokens"))
    out.append(f"runs in this build: {found['runs']}")
    return out
