"""A recipe: one YAML file that says which model is trained on which texts, and how. What is wrong in it is said in one line.

`task` is what is trained: pretrain (a new model), distil (a new model, by a teacher), heal (a model whose layers become ternary), lora (a
low-rank adapter beside a model that stays as it is), instruct (a model, on the answers of conversations), classify (a model, on rows of a
table whose label is a word). Without it the keys tell: `rank` is a lora, `teacher` a distil, `labels` a classify, `base_model` a heal.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitnet.errors import UsageError
from bitnet.train.layers import Quantization
from bitnet.train.schedule import Schedule

TASKS = ("pretrain", "distil", "heal", "lora", "instruct", "classify")
SCHEMES = ("fp16", "binary", "ternary")
# what `training` is where a recipe leaves it open; None of it is new to a model that has learned already
_TRAINING: dict[Any, dict[str, Any]] = {
    "heal": {"matrix_lr": 0.004, "vector_lr": 0.001},
    "lora": {"optimizer": "adamw", "matrix_lr": 0.005},
    "instruct": {"matrix_lr": 0.003, "vector_lr": 0.001},
    "classify": {"matrix_lr": 0.004, "vector_lr": 0.001},
}


def _at_least(least: float, most: float = math.inf, above: bool = False) -> dict[str, Any]:
    return {"least": least, "most": most, "above": above}


@dataclass(frozen=True)
class Shape:
    """Of a new model: fields of transformers' BitNetConfig or LlamaConfig."""

    hidden_size: int = field(metadata=_at_least(8))
    intermediate_size: int = field(metadata=_at_least(8))
    num_hidden_layers: int = field(metadata=_at_least(1))
    num_attention_heads: int = field(metadata=_at_least(1))
    num_key_value_heads: int = field(metadata=_at_least(1))
    rms_norm_eps: float = field(default=1e-5, metadata=_at_least(0, 1, above=True))
    rope_theta: float = field(default=10_000.0, metadata=_at_least(1))
    # bitnet: relu(gate)^2 * up and sub-norms before o_proj and down_proj; llama: silu(gate) * up and none
    architecture: str = field(default="bitnet", metadata={"choices": ("bitnet", "llama")})


@dataclass(frozen=True)
class Layers:
    """How layers become ternary where a model is healed; and what holds of any new one."""

    alphas: str | None = field(default=None, metadata={"choices": ("article",)})  # preset of alphas by kind of layer
    layers: str = "*"  # pattern of the names of linear layers; of heal
    rule: str = field(default="absmean", metadata={"choices": ("absmean", "threshold")})
    alpha: float = field(default=0.05, metadata=_at_least(0, 10))
    scale: str = "tensor"  # "tensor", "row", or "group:N"
    activations: str = field(default="int8", metadata={"choices": ("int8", "none")})
    sub_norm: bool = False
    clip: float | None = field(default=None, metadata=_at_least(0, above=True))

    def quantization(self, scheme: str) -> Quantization:
        unit = self.scale.removeprefix("group:")
        scale: str | int = int(unit) if unit.isdecimal() else unit
        if scheme == "binary":
            return Quantization("binary", scale="row" if self.scale == "tensor" else scale, activations=self.activations, clip=self.clip)
        return Quantization(self.rule, self.alpha, scale, self.activations, self.clip)


@dataclass(frozen=True)
class Recipe:
    """The parsed file."""

    task: str = field(default="pretrain", metadata={"choices": TASKS})
    name: str = "model"
    scheme: str = field(default="ternary", metadata={"choices": SCHEMES})  # of the linear layers; fp16: as they are, floats throughout
    seed: int = field(default=0, metadata=_at_least(0))
    context: int = field(default=512, metadata=_at_least(8))  # tokens; the longest the model is made for
    # a new model
    vocab_size: int = field(default=4096, metadata=_at_least(258))
    tokenizer_texts: dict[str, float] | None = None  # text file -> share of its documents that the tokenizer learns from; above 1 repeats
    model: Shape | None = None
    quantization: Layers = field(default_factory=Layers)
    # from another one: the embedded name, a folder, a file (GGUF too), or org/name from the Hub
    base_model: str | None = None
    teacher: str | None = None
    teacher_share: float = field(default=0.5, metadata=_at_least(0, 1))  # of the loss; the rest is cross-entropy with the text
    temperature: float = field(default=1.0, metadata=_at_least(0, above=True))  # of teacher and student
    # a low-rank adapter, in the article's words
    rank: int = field(default=8, metadata=_at_least(1))
    alpha: float = field(default=16.0, metadata=_at_least(0, above=True))
    quantize: str = field(default="ternary", metadata={"choices": ("ternary", "none")})  # of A and B
    lora_dropout: float = field(default=0.0, metadata=_at_least(0, 0.99))
    target_modules: list[str] | None = None  # ends of the names of linear layers; None: all
    # rows of a table
    labels: dict[str, str] | None = None  # label in the file -> word; None: the label itself
    columns: list[str] | None = None  # of the text; None: all that are no index and no label
    training: Schedule = field(default_factory=Schedule)

    @staticmethod
    def load(path: Path, changes: Sequence[str] = ()) -> Recipe:
        """`changes`: "key=value", or "key.key=value", each instead of what the file says. Raises `UsageError`, one line."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark is not None else ""
            raise UsageError(f"{path}{where}: is no YAML ({getattr(error, 'problem', None) or error})") from None
        if not isinstance(values, dict):
            raise UsageError(f"{path}: is {type(values).__name__}; expected keys and values, such as task: pretrain")
        for change in changes:
            names, equals, value = change.partition("=")
            if not equals:
                raise UsageError(f"--set {change}: expected KEY=VALUE, such as scheme=binary")
            *sections, last = names.strip().split(".")
            place = values
            for name in sections:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise UsageError(f"--set {change}: {name} has no keys in it")
            place[last] = yaml.safe_load(value)
        return Recipe.parse(values, str(path))

    @staticmethod
    def parse(values: Mapping[str, Any], where: str) -> Recipe:
        if "task" not in values:
            guess = {"rank": "lora", "lora_dropout": "lora", "teacher": "distil", "labels": "classify", "base_model": "heal"}
            values = {"task": next((task for key, task in guess.items() if key in values), "pretrain"), **values}
        if isinstance(values.get("training", {}), Mapping):
            values = {**values, "training": {**_TRAINING.get(values["task"], {}), **values.get("training", {})}}
        recipe: Recipe = _section(Recipe, values, where, "")
        if recipe.task in ("pretrain", "distil") and recipe.model is None:
            raise UsageError(f"{where}: task {recipe.task} makes a new model, whose shape is missing; add model: with hidden_size, ...")
        if recipe.task == "distil" and recipe.teacher is None:
            raise UsageError(f"{where}: task distil needs teacher: a model's folder, file or name")
        if recipe.task not in ("pretrain", "distil") and recipe.base_model is None:
            raise UsageError(f"{where}: task {recipe.task} needs base_model: a model's folder, file or name")
        if recipe.task == "heal" and recipe.scheme == "fp16":
            raise UsageError(f"{where}: task heal makes layers ternary or binary; scheme is 'fp16'")
        if (shape := recipe.model) is not None:
            if shape.hidden_size % shape.num_attention_heads or shape.num_attention_heads % shape.num_key_value_heads:
                raise UsageError(
                    f"{where}: model.hidden_size {shape.hidden_size}, num_attention_heads {shape.num_attention_heads}, num_key_value_heads "
                    f"{shape.num_key_value_heads}; expected each to be a multiple of the next"
                )
            if shape.hidden_size // shape.num_attention_heads % 2:
                raise UsageError(f"{where}: model: heads of {shape.hidden_size // shape.num_attention_heads}; rope needs an even size")
        recipe.training.check(where, recipe.context)
        try:
            recipe.quantization.quantization(recipe.scheme)
        except UsageError as error:
            raise UsageError(f"{where}: quantization.{error}") from None
        return recipe

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML holds it, what it leaves open included."""
        return dataclasses.asdict(self)


def _section(kind: Any, values: Any, where: str, prefix: str) -> Any:
    """The dataclass `kind` of these values; `prefix`: "training." of the keys in it."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: {prefix.rstrip('.')} is {values!r}; expected keys and values")
    known = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            does = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {prefix}{key}; {does}")
        made[key] = _value(hints[key], value, where, prefix + key, known[key].metadata)
    missing = [n for n, f in known.items() if n not in made and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UsageError(f"{where}: {prefix}{missing[0]} is missing")
    return kind(**made)


def _value(hint: Any, value: Any, where: str, key: str, limits: Mapping[str, Any]) -> Any:
    """The value as the type that `hint` asks for, within its limits."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where, f"{key}.")
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        if not isinstance(value, Mapping) or not value:
            raise UsageError(f"{where}: {key} is {value!r}; expected names and their values")
        return {str(k): _value(parts[1], v, where, f"{key}.{k}", {"least": 0} if parts[1] is float else {}) for k, v in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise UsageError(f"{where}: {key} is {value!r}; expected a list")
        return [_value(parts[0], v, where, key, {}) for v in value]
    if hint is float and isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
        try:
            value = float(value)
        except ValueError:
            raise UsageError(f"{where}: {key} is {value!r}; expected a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool) and key.startswith("labels."):
        value = str(value)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UsageError(f"{where}: {key} is {value!r}; expected {names[hint]}")
    if (choices := limits.get("choices")) and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0.5)
        does = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where}: {key} is {value!r}; expected one of {', '.join(choices)}{does}")
    if hint in (int, float) and "least" in limits:
        least, most, above = limits["least"], limits.get("most", math.inf), limits.get("above", False)
        if not (least < value if above else least <= value) or not value <= most or not math.isfinite(value):
            upper = f" and at most {most:g}" if most < math.inf else ""
            raise UsageError(f"{where}: {key} is {value!r}; expected {'above' if above else 'at least'} {least:g}{upper}")
    return value
