"""What the options of `bitnet bench` may be, written out so that help imports no engine (a test compares them), and which go together."""

from __future__ import annotations

import click
from click.core import ParameterSource

SHAPE_NAMES = ("bitnet-2b-4t", "bonsai-1.7b", "bonsai-8b", "llama3-8b", "article-12x512")  # bitnet.shapes.SHAPES
SHAPE_ALIASES = {"2b-4t": "bitnet-2b-4t"}
MODEL_WEIGHTS = ("stored", "f16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.weights.WEIGHTS
SHAPE_WEIGHTS = ("f16", "bf16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.shapes.WEIGHTS
MODEL_HEADS = ("stored", "int8", "int4")  # bitnet.weights.HEADS
SHAPE_HEADS = ("f16", "int8", "int4", "ternary")  # bitnet.shapes.HEADS
CODEC_NAMES = ("auto", "t2", "b3")  # bitnet.engine.CODECS

# What is measured instead of one thing, and the other options that it takes.
MODES = {
    "compare": ("shape", "head", "threads", "prompt_tokens", "new_tokens", "repetitions", "picture"),
    "speculate": ("model", "shape", "weights", "ternary", "quantization", "head", "codec", "threads", "repetitions", "replay"),
    "tune": ("model",),
}
ALWAYS = ("as_json", "debug")
ONLY = {"picture": "compare", "replay": "speculate"}  # what belongs to one of them


def check_mode(context: click.Context) -> None:
    """Refuses what would be ignored."""
    given = {p.name: p for p in context.command.params if context.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE}
    for mode in MODES:
        if mode in given and (wrong := [_spelled(p) for name, p in given.items() if name not in (mode, *MODES[mode], *ALWAYS)]):
            taken = [_spelled(p) for p in context.command.params if p.name in MODES[mode]]
            raise click.UsageError(f"--{mode} takes no {', '.join(wrong)}; it goes with {', '.join(taken)}")
    for name, mode in ONLY.items():
        if name in given and mode not in given:
            raise click.UsageError(f"--{name} is for --{mode}")
    if "compare" in given and "shape" not in given:
        raise click.UsageError("--compare takes a --shape")


def _spelled(parameter: click.Parameter) -> str:
    return parameter.opts[0] if isinstance(parameter, click.Option) else "MODEL"
