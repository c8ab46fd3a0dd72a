"""The formats that can be written, and which one a target's name asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bitnet.errors import UsageError
from bitnet.files import PathLike, shown
from bitnet.files.ggml import CODES, PLAIN, TYPES
from bitnet.files.gguf_write import IDS
from bitnet.packing import BLOCKS, INTEGERS

MLX_GROUP = 128


@dataclass(frozen=True)
class Format:
    """Where a model is written, and how its linear layers lie there."""

    container: str  # "hf" (a folder), "safetensors" (one file, complete by itself), "mlx" (a folder) or "gguf"
    weights: str  # "autobitlinear", "bitlinear", "mlx", a dtype ("f32", "f16", "bf16"), "int8", "int4", "fp4", or a type of ggml

    @property
    def name(self) -> str:
        if self.container in ("mlx", "gguf"):
            return "mlx" if self.container == "mlx" else f"gguf-{self.weights}"
        form = f"dense-{self.weights}" if self.dense else self.weights
        return self.container if self.weights == "autobitlinear" else f"{self.container}-{form}"

    @property
    def dense(self) -> bool:
        """Whether linear layers are plain numbers."""
        return self.weights in ("f32", "f16", "bf16")

    @property
    def integer(self) -> str:
        """The scheme of quantize.integer that it holds, or none."""
        return self.weights if self.weights in INTEGERS else {"q8_0": "int8", "q4_0": "int4"}.get(self.weights, "")

    @property
    def block(self) -> int:
        """Inputs that share a scale; 0 where the whole tensor does."""
        if self.container == "mlx":
            return MLX_GROUP
        if self.container != "gguf" or self.weights == "i2_s":
            return 0
        return TYPES[IDS[self.weights]].block

    @property
    def scale(self) -> str:
        """How scales are stored: "f16", or "f32" for any float32."""
        return "f16" if self.container == "gguf" and self.weights != "i2_s" else "f32"

    @property
    def codec(self) -> str:
        """Of packing.BLOCKS."""
        return CODES[self.weights]

    @property
    def folder(self) -> bool:
        return self.container in ("hf", "mlx")


_LAYERS = ("autobitlinear", "bitlinear", "f32", "f16", "bf16", *INTEGERS)
_GGUF = ("tq1_0", "tq2_0", "q2_0", "pq2_0", "ptq1_0", "q1_0", "i2_s", "q8_0", "q4_0", "f32", "f16", "bf16")
_ALL = [Format(container, layers) for container in ("hf", "safetensors") for layers in _LAYERS]
_ALL += [Format("mlx", "mlx"), *(Format("gguf", kind) for kind in _GGUF)]
FORMATS = {form.name: form for form in _ALL}
assert set(_GGUF) <= {*CODES, *PLAIN, "q8_0", "q4_0"} and set(CODES.values()) <= set(BLOCKS)


def choose(name: str | None, target: PathLike, quantization: str | None, group: int, biases: bool = False) -> Format:
    """The format called `name`, or the one that the target's name asks for.

    quantization: the scheme that weights are brought into or have, None for ternary or plain ones; group: the smallest run of inputs that
    share a scale or into which rows must be cut, 0 for none; biases: whether linear layers have some, which `transformers` runs right in
    linear class bitlinear only.
    Raises UsageError for a name that is none.
    """
    if name is None:
        suffix = os.path.splitext(os.fspath(target))[1].lower()
        name = {".gguf": "gguf", ".safetensors": "safetensors", ".bin": "safetensors"}.get(suffix, "hf")
        if name != "gguf" and quantization == "fp16":
            name = f"{name}-dense-f16"
        elif name != "gguf" and quantization in INTEGERS:
            name = f"{name}-{quantization}"
        elif name == "hf" and biases:
            name = "hf-bitlinear"
    if name == "gguf":
        if quantization == "fp4":
            raise UsageError("GGUF has no fp4 with scales that are not powers of two; write a folder or .safetensors, or take int4")
        by_scheme = {"int8": "q8_0", "int4": "q4_0", "fp16": "f16", "binary": "q1_0"}
        name = f"gguf-{by_scheme.get(quantization or '', 'q2_0' if group and group % 256 else 'tq2_0')}"
    if name not in FORMATS:
        raise UsageError(f"format is {shown(repr(name))}; expected gguf or one of {', '.join(FORMATS)}")
    return FORMATS[name]
