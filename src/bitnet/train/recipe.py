"""A recipe: one YAML file that says which model is trained on which texts, and how. What is wrong in it is said in one line.

`task` is what is trained: pretrain (a new model), distil (a new model, by a teacher), heal (a model whose layers become ternary), grow (a
model, with more layers or a longer context), lora (a low-rank adapter beside a model that stays as it is), instruct (a model, on the
answers of conversations), classify (a model, on rows of a table whose label is a word). Without it the keys tell: `rank` or `quantize` is
a lora, `teacher` a distil, `labels` a classify, `num_hidden_layers` a grow, `base_model` a heal.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitnet.errors import UsageError
from bitnet.files import shown
from bitnet.train.layers import Quantization
from bitnet.train.schedule import Schedule

TASKS = ("pretrain", "distil", "heal", "grow", "lora", "instruct", "classify")
CONTEXT = 512  # tokens, where a recipe leaves it open and its base has room for as many
SCHEMES = ("fp16", "binary", "ternary")
_GUESSES = {
    "rank": "lora", "quantize": "lora", "lora_dropout": "lora", "teacher": "distil", "labels": "classify", "num_hidden_layers": "grow",
    "base_model": "heal",
}  # fmt: skip
_OF_BASE = {"scheme", "quantization", "base_model"}
_OF_NEW = {"scheme", "quantization", "vocab_size", "tokenizer_texts", "model"}
# keys by task, beside those that all have
_KEYS: dict[str, set[str]] = {
    "pretrain": _OF_NEW,
    "distil": {"scheme", "quantization", "model", "teacher", "teacher_share", "temperature"},  # and the teacher's tokenizer
    "heal": _OF_BASE,
    "grow": _OF_BASE | {"num_hidden_layers"},
    "lora": {"base_model", "rank", "alpha", "quantize", "lora_dropout", "target_modules"},
    "instruct": _OF_BASE,
    "classify": _OF_BASE | {"labels", "columns"},
}
_OF_WINDOWS = ("batch_tokens", "context", "decay_context", "snap")  # keys of training
# what other programs call them
_ALIASES = {"learning_rate": "training.matrix_lr", "lr": "training.matrix_lr", "r": "rank", "lora_alpha": "alpha"}
# what `training` is where a recipe leaves it open; None of it is new to a model that has learned already
_TRAINING: dict[Any, dict[str, Any]] = {
    "heal": {"matrix_lr": 0.004, "vector_lr": 0.001},
    "grow": {"matrix_lr": 0.006, "vector_lr": 0.003},
    "lora": {"optimizer": "adamw", "matrix_lr": 0.005},
    "instruct": {"matrix_lr": 0.003, "vector_lr": 0.001},
    "classify": {"matrix_lr": 0.004, "vector_lr": 0.001},
}


def _at_least(least: float, most: float = math.inf, above: bool = False) -> dict[str, Any]:
    return {"least": least, "most": most, "above": above}


@dataclass(frozen=True)
class Shape:
    """Of a new model: fields of transformers' BitNetConfig or LlamaConfig."""

    hidden_size: int = field(metadata=_at_least(8, 100_000))
    intermediate_size: int = field(metadata=_at_least(8, 1_000_000))
    num_hidden_layers: int = field(metadata=_at_least(1, 1000))
    num_attention_heads: int = field(metadata=_at_least(1, 1000))
    num_key_value_heads: int = field(metadata=_at_least(1, 1000))
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
        if self.scale not in ("tensor", "row") and not re.fullmatch(r"group:[0-9]{1,9}", self.scale):
            number = re.search(r"[0-9]{1,9}", self.scale)
            near = [f"group:{number[0]}"] if number else difflib.get_close_matches(self.scale, ("tensor", "row", "group:32"), 1, 0.5)
            does = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"scale is {self.scale!r}; expected tensor, row, or group:N (N inputs, a multiple of 16){does}")
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
    seed: int = field(default=0, metadata=_at_least(0, 2**63 - 1))
    # tokens; the longest the model is made for, or is trained on; None: 512, or what its base has room for
    context: int | None = field(default=None, metadata=_at_least(8, 1_000_000))
    # a new model
    vocab_size: int = field(default=4096, metadata=_at_least(258, 1_000_000))
    # text file -> share of its documents that the tokenizer learns from; above 1 repeats
    tokenizer_texts: dict[str, float] | None = field(default=None, metadata=_at_least(0, 1000, above=True))
    model: Shape | None = None
    quantization: Layers = field(default_factory=Layers)
    # from another one: the embedded name, a folder, a file (GGUF too), or org/name from the Hub
    base_model: str | None = None
    num_hidden_layers: int | None = field(default=None, metadata=_at_least(1, 1000))  # of a grown model; None: as many as the base has
    teacher: str | None = None
    teacher_share: float = field(default=0.5, metadata=_at_least(0, 1))  # of the loss; the rest is cross-entropy with the text
    temperature: float = field(default=1.0, metadata=_at_least(0.01, 1000))  # of teacher and student
    # a low-rank adapter, in the article's words
    rank: int = field(default=8, metadata=_at_least(1, 100_000))
    alpha: float = field(default=16.0, metadata=_at_least(0, above=True))
    quantize: str = field(default="ternary", metadata={"choices": ("ternary", "none")})  # of A and B
    lora_dropout: float = field(default=0.0, metadata=_at_least(0, 0.99))
    target_modules: list[str] | None = None  # ends of the names of linear layers; None: all
    # rows of a table
    labels: dict[str, str] | None = None  # label in the file -> word; None: the label itself
    columns: list[str] | None = None  # of the text; None: all that are no index and no label
    training: Schedule = field(default_factory=Schedule)

    @property
    def trained(self) -> str:
        """What the weights that train are: fp16, binary or ternary."""
        return self.scheme if self.task != "lora" else "ternary" if self.quantize == "ternary" else "fp16"

    @staticmethod
    def load(path: Path, changes: Sequence[str] = (), quantization: str | None = None) -> Recipe:
        """`changes`: "key=value", or "key.key=value", each instead of what the file says. `quantization`: fp16, binary or ternary, instead
        of its scheme; of an adapter, of A and B. Raises `UsageError`, one line."""
        try:
            values = _yaml(path.read_text(encoding="utf-8"))
        except _NO_YAML as error:
            raise UsageError(f"{path}{_line_of(error)}: is no YAML ({_problem_of(error)})") from None
        if not isinstance(values, dict):
            raise UsageError(f"{path}: is {type(values).__name__}; expected keys and values, such as task: pretrain")
        for change in changes:
            names, equals, value = change.partition("=")
            if not equals or not names.strip():
                raise UsageError(f"--set {change}: expected KEY=VALUE, such as scheme=binary")
            *sections, last = names.strip().split(".")
            place = values
            for name in sections:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise UsageError(f"--set {change}: {name} has no keys in it")
            try:
                place[last] = value.strip() if value.lstrip().startswith("*") else _yaml(value)  # a pattern; YAML's alias of nothing
            except _NO_YAML as error:
                raise UsageError(f"--set {change}: the value is no YAML ({_problem_of(error)})") from None
        if quantization is not None and _task(values) != "lora":
            values["scheme"] = quantization
        elif quantization == "binary":
            raise UsageError(f"{path}: A and B of an adapter are ternary or fp16, not binary")
        elif quantization is not None:
            values["quantize"] = {"fp16": "none"}.get(quantization, quantization)
        return Recipe.parse(values, str(path))

    @staticmethod
    def parse(values: Mapping[str, Any], where: str) -> Recipe:
        values = {"task": (task := _task(values)), **values}
        if isinstance(values.get("training", {}), Mapping) and isinstance(task, str):
            values = {**values, "training": {**_TRAINING.get(task, {}), **values.get("training", {})}}
        if task in ("pretrain", "distil") and values.get("context") is None:
            values = {**values, "context": CONTEXT}
        recipe: Recipe = _section(Recipe, values, where, "")
        if recipe.task in ("pretrain", "distil") and recipe.model is None:
            raise UsageError(f"{where}: task {recipe.task} makes a new model, whose shape is missing; add model: with hidden_size, ...")
        if recipe.task == "distil" and recipe.teacher is None:
            raise UsageError(f"{where}: task distil needs teacher: a model's folder, file or name")
        if recipe.task not in ("pretrain", "distil") and recipe.base_model is None:
            raise UsageError(f"{where}: task {recipe.task} needs base_model: a model's folder, file or name")
        if recipe.task == "grow" and recipe.num_hidden_layers is None and recipe.context is None:
            raise UsageError(f"{where}: task grow needs num_hidden_layers, context, or both, larger than the base's")
        if recipe.task == "heal" and recipe.scheme == "fp16":
            raise UsageError(f"{where}: task heal makes layers ternary or binary; scheme is 'fp16'")
        _check_keys(recipe, where)
        if (shape := recipe.model) is not None:
            if shape.hidden_size % shape.num_attention_heads or shape.num_attention_heads % shape.num_key_value_heads:
                raise UsageError(
                    f"{where}: model.hidden_size {shape.hidden_size}, num_attention_heads {shape.num_attention_heads}, num_key_value_heads "
                    f"{shape.num_key_value_heads}; expected each to be a multiple of the next"
                )
            if shape.hidden_size // shape.num_attention_heads % 2:
                raise UsageError(f"{where}: model: heads of {shape.hidden_size // shape.num_attention_heads}; rope needs an even size")
        _check_labels(recipe.labels, where)
        recipe.training.check(where, recipe.context, recipe.task not in ("instruct", "classify"))
        try:
            recipe.quantization.quantization(recipe.scheme)
        except UsageError as error:
            raise UsageError(f"{where}: quantization.{error}") from None
        return recipe

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML holds it, what it leaves open included."""
        return dataclasses.asdict(self)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's own takes the last of two values for one key, without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)  # some of them of bad values


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _line_of(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _problem_of(error: Exception) -> str:
    problem = "nested too deep" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
    return shown(" ".join(str(problem).split()))


def _task(values: Mapping[str, Any]) -> Any:
    """What the file says, which may be anything, or what its keys tell."""
    return values.get("task", next((task for key, task in _GUESSES.items() if key in values), "pretrain"))


def _check_keys(recipe: Recipe, where: str) -> None:
    """Raises `UsageError` for a key with another value than its own default that does nothing in this task."""
    every = {key for keys in _KEYS.values() for key in keys}
    how, plain = recipe.quantization, Layers()
    for f in dataclasses.fields(Recipe):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.name in every - _KEYS[recipe.task] and getattr(recipe, f.name) != default:
            takes = ", ".join(n for n in (g.name for g in dataclasses.fields(Recipe)) if n in _KEYS[recipe.task])
            raise UsageError(f"{where}: {f.name} does nothing in task {recipe.task}, which takes {takes}; remove it, or name another task")
    for name in ("alphas", "layers"):
        if recipe.task not in ("heal", "grow", "instruct", "classify") and getattr(how, name) != getattr(plain, name):
            raise UsageError(f"{where}: quantization.{name} does nothing in task {recipe.task}, whose layers are all alike; remove it")
    if recipe.scheme == "binary" and (how.rule, how.alpha) != (plain.rule, plain.alpha):
        name = "rule" if how.rule != plain.rule else "alpha"
        raise UsageError(f"{where}: quantization.{name} does nothing with scheme binary, whose weights are signs; remove it")
    whole = recipe.task in ("instruct", "classify")
    for name in ("mixture", "decay_mixture"):
        if whole and getattr(recipe.training, name) is not None:
            raise UsageError(f"{where}: training.{name} does nothing in task {recipe.task}, which takes one file; remove it")
    idle: tuple[str, ...] = _OF_WINDOWS if whole else () if recipe.task == "lora" else ("batch_examples",)
    changed = [name for name in idle if getattr(recipe.training, name) != getattr(Schedule(), name)]
    if changed:
        takes = "examples: batch_examples, and the recipe's context, hold" if whole else "windows of texts: batch_tokens holds"
        warnings.warn(f"{where}: training.{changed[0]} does nothing in task {recipe.task}, which takes {takes}", stacklevel=2)
    if how.alphas is not None:
        for name in ("rule", "alpha", "layers"):
            if getattr(how, name) != getattr(plain, name):
                raise UsageError(f"{where}: quantization.alphas says what quantization.{name} would; remove one of them")
        if recipe.scheme == "binary":
            raise UsageError(f"{where}: quantization.alphas are of ternary layers; scheme is 'binary'")


def _check_labels(labels: Mapping[str, str] | None, where: str) -> None:
    words = list((labels or {}).values())
    if labels is not None and (len(set(words)) < max(2, len(words)) or not all(word.strip() for word in words)):
        raise UsageError(f"{where}: labels are {dict(labels)}; expected two or more, each with a word of its own")


def _nearest(key: str, known: Mapping[str, Any], prefix: str) -> str | None:
    """The key, with its section, that is most like this one; of equals that of the same section."""
    names = dict(_ALIASES)
    for section, kind in (("model.", Shape), ("quantization.", Layers), ("training.", Schedule), ("", Recipe)):
        names |= {f.name: section + f.name for f in dataclasses.fields(kind)}
    names |= {name: prefix + name for name in known}
    if prefix == "model.":
        names |= dict.fromkeys(("layers", "n_layers"), "model.num_hidden_layers")
    near = difflib.get_close_matches(key, names, 1, 0.5)
    return names[near[0]] if near else None


def _section(kind: Any, values: Any, where: str, prefix: str) -> Any:
    """The dataclass `kind` of these values; `prefix`: "training." of the keys in it."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: {prefix.rstrip('.')} is {values!r}; expected keys and values")
    known = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        if key not in known:
            near = _nearest(str(key), known, prefix)
            does = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {prefix}{shown(key)}; {does}")
        made[key] = _value(hints[key], value, where, prefix + key, known[key].metadata)
    missing = [n for n, f in known.items() if n not in made and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UsageError(f"{where}: {prefix}{missing[0]} is missing")
    return kind(**made)


def _value(hint: Any, value: Any, where: str, key: str, limits: Mapping[str, Any]) -> Any:
    """The value as the type that `hint` asks for, within its limits."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if value is None or (hint is float and value == "none"):
            return None
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where, f"{key}.")
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        if not isinstance(value, Mapping) or not value:
            raise UsageError(f"{where}: {key} is {value!r}; expected names and their values")
        return {
            str(k): _value(parts[1], v, where, f"{key}.{k}", {**limits, "least": 0} if parts[1] is float else {}) for k, v in value.items()
        }
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
        value = float(value) if abs(value) < 10**300 else math.inf
    if hint is str and type(value) in (int, float) and (key.startswith("labels.") or key == "quantization.scale"):
        value = str(value)
    if isinstance(value, bool) and key.startswith("labels."):
        raise UsageError(f"{where}: {key} is {value}, as YAML reads yes and no; expected text: put it in quotes")
    if isinstance(value, int) and abs(value) >= 10**300:
        raise UsageError(f"{where}: {key} has more than 300 digits; expected a number that means something")
    if isinstance(value, str) and any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise UsageError(f"{where}: {key} is {value!r}, which cannot be written as UTF-8; expected text")
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
            upper = f" and at most {most:{',' if isinstance(most, int) else 'g'}}" if most < math.inf else ""
            raise UsageError(f"{where}: {key} is {value!r}; expected {'above' if above else 'at least'} {least:g}{upper}")
    return value
