"""Low-rank adapters at a conversion: those beside the source are kept, one may be merged.

An adapter names the modules and keeps the row order of Hugging Face, whatever its base is stored in (models/peft.py), so its tensors
stay what they are byte by byte; base_model_name_or_path follows the base into a folder that `transformers` loads. What was copied is
read back for the written model and compared: the same A, B and scale beside weights that were verified are the same function.
Beside a GGUF llama.cpp's own file of the adapter is written, too: names, and rows of llama's queries and keys, as the base has them there.

Merging adds scale * B A to the weights. A ternary matrix returns to its own grid: T = clip(round(W / s), -1, 1) with the scales s that it
has. So a change of less than s / 2 leaves no trace there, which is why it is measured: of the delta D and the change R that remains,
<R, D> / |D|^2 is what survived (1: all, 0: nothing), |R - D| / |D| the error.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.quantize import rounded
from bitnet.convert.source import F32, I8, Model, Weight, from_codes
from bitnet.convert.verify import NotTheSameError
from bitnet.errors import BitNetError, UnsupportedModelError, UsageError
from bitnet.files import PathLike, gguf_write, json_object, place_of, read_file, shown, system_errors
from bitnet.files.replacing import new_file
from bitnet.files.tensor import MAX_CONFIG_BYTES
from bitnet.models import ModelConfig, lora_gguf
from bitnet.models.gguf import names as gguf_names
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_adapter
from bitnet.tokenizer import replace_surrogates

_DENSE = ("f32", "f64", "f16", "bf16")


@dataclass(frozen=True)
class Merged:
    """What of a delta D = scale * B A has remained in one matrix, as the change R."""

    name: str
    delta: float  # |D|^2
    along: float  # <R, D>
    error: float  # |R - D|^2
    changed: int  # trits that are others
    trits: int  # weights that are ternary before and after

    @property
    def survived(self) -> float:
        return self.along / self.delta if self.delta else 1.0

    @property
    def trits_changed(self) -> float | None:
        return self.changed / self.trits if self.trits else None


def together(parts: list[Merged], name: str) -> Merged:
    """The sum over several matrices."""
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("delta", "along", "error", "changed", "trits")}
    return Merged(name, **sums)


# ---- keeping

NESTED = "adapters"  # a folder of adapters beside a model
_MODELS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Kept:
    """An adapter, and where it goes."""

    path: Path
    to: Path  # absolute beside one file, else relative to the new folder
    own: bool  # it lies among the model's own files

    def files(self) -> list[Path]:
        """All that it consists of; among a model's files those that are named after it."""
        with system_errors(self.path, "read"):
            return sorted(f for f in self.path.iterdir() if f.is_file() and (f.name.startswith("adapter_") or not self.own))


def beside(source: Path) -> dict[str, Path]:
    """The adapters beside a model, by where they lie relative to it: "" for its own folder, else "style" or "adapters/style"."""
    folder = source if source.is_dir() else source.parent
    found = {"": folder} if is_adapter(folder) else {}
    for prefix, parent in (("", folder), (f"{NESTED}/", folder / NESTED)):
        with system_errors(parent, "read"):
            names = sorted(os.listdir(parent)) if parent.is_dir() else []
        found |= {prefix + name: parent / name for name in names if is_adapter_alone(parent / name)}
    return found


def is_adapter_alone(path: PathLike) -> bool:
    """Whether a folder is an adapter's, and not that of another model, beside which one lies."""
    return is_adapter(path) and not any(map(os.path.exists, (os.path.join(path, name) for name in _MODELS)))


def places(source: Path, target: Path, folder: bool) -> list[Kept]:
    """Where each adapter goes: in a folder to its own place, for one file beside it. Raises UsageError where another one lies already."""
    ours = beside(source)
    if folder:
        refuse_others(target, ours)
        return [Kept(path, Path(name), not name) for name, path in ours.items()]
    found = []
    for name, path in ours.items():
        to = target.absolute().parent / (name or f"{target.stem}-adapter")
        if to.resolve() == path.resolve() or (not name and target.absolute().parent.resolve() == path.resolve()):
            continue  # the target comes to lie beside it as the source does
        if os.path.lexists(to) and not (is_adapter(to) and _same(path, to)):
            raise UsageError(f"{shown(to)}: is in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere")
        found.append(Kept(path, to, not name))
    return found


def refuse_others(target: Path, ours: Mapping[str, Path]) -> None:
    """Raises UsageError where a folder to be replaced holds an adapter that is none of `ours`: it would lie beside weights not its own."""
    for name, path in (beside(target) if target.is_dir() else {}).items():
        if name not in ours or not _same(ours[name], path):
            raise UsageError(
                f"{shown(path)}: is an adapter of the model to be replaced, and is not written anew; move it, or name another target"
            )


def gguf_places(source: Path, target: Path, architecture: str, config: ModelConfig) -> dict[Path, Path]:
    """Where each adapter goes for llama.cpp: TARGET-NAME-LoRA.gguf beside TARGET.gguf. Raises UsageError where another file lies."""
    found = {}
    for name, path in beside(source).items():
        to = target.absolute().with_name("-".join(filter(None, (target.stem, name.replace("/", "-"), "LoRA.gguf"))))
        if os.path.lexists(to) and (made := _as_gguf(path, architecture, config)) is not None:
            same = to.is_file() and not to.is_symlink() and to.stat().st_size == len(made[0]) and to.read_bytes() == made[0]
            if not same:
                raise UsageError(
                    f"{shown(to)}: is in the way of the source's adapter {shown(path)} for llama.cpp; move it, or name another target"
                )
        found[path] = to
    return found


def refuse_collisions(target: Path, kept: Iterable[Kept], for_llama_cpp: Mapping[Path, Path]) -> None:
    """Raises UsageError where two things would be written in one place: the model in one file, and what goes beside it."""
    taken = {place_of(target): "the model"}
    for path, to in [*((one.path, one.to) for one in kept), *for_llama_cpp.items()]:
        here, what = place_of(to), f"the source's adapter {shown(path)}"
        if here in taken:
            raise UsageError(f"{shown(to)}: is where both {taken[here]} and {what} would go; rename the adapter's folder, or the target")
        taken[here] = what


def write_gguf(path: Path, to: Path, architecture: str, config: ModelConfig) -> str | None:
    """Writes an adapter as llama.cpp reads it, reads it back, and says so; None for one that this build cannot run."""
    if (made := _as_gguf(path, architecture, config)) is None:
        return None
    content, parts, scaled = made
    with new_file(to) as file:
        file.write(content)
        file.flush()
        other = lora_gguf.read(file.name, config)
        if parts.keys() != other.keys() or not all(_equal(parts[name], other[name]) for name in parts):
            raise NotTheSameError(f"{shown(to)}: differs from the source's adapter {shown(path)}")
    how = ", B times its scale, for the file has one alpha and these matrices have several" if scaled else ""
    return f"adapter {shown(path)}: for llama.cpp (--lora) as {shown(to)}, read back and compared{how}"


def _as_gguf(path: Path, architecture: str, config: ModelConfig) -> tuple[bytes, dict[str, LowRank], bool] | None:
    """(llama.cpp's file of an adapter, what is in it, whether B took the scale in); None for one that this build cannot run.

    The file has one alpha, so where A and B have not all the same one B takes the scale in, in float32.
    """
    try:
        parts = read_adapter(path, config).parts
    except BitNetError:
        return None
    alphas = {np.float32(low.scale * low.rank) for low in parts.values()}
    alpha = alphas.pop() if len(alphas) == 1 else np.float32(0)
    if not all(alpha / np.float32(low.rank) == np.float32(low.scale) for low in parts.values()):
        alpha = np.float32(0)
        parts = {n: LowRank("f32", low.dense()[0], low.dense()[1] * np.float32(low.scale), 1.0) for n, low in parts.items()}
    names, items = gguf_names(config), []
    for ours, low in parts.items():
        turns = lora_gguf.by_pairs(config, ours.rsplit(".", 1)[-1])
        b = lora_gguf.turned(low.b, config.head_dim, by_pairs=True) if turns else low.b
        for side, values in (("lora_a", low.a), ("lora_b", b)):
            chunks = [np.ascontiguousarray(values)]
            items.append(gguf_write.Item(f"{names[ours]}.{side}", low.scheme, values.shape, lambda chunks=chunks: chunks))  # type: ignore[misc]
    name = replace_surrogates(path.absolute().name)
    keys = {lora_gguf.TYPE: "adapter", "general.architecture": architecture, "general.name": name, lora_gguf.KIND: "lora"}
    head, order = gguf_write.layout(items, keys | {lora_gguf.ALPHA: float(alpha)})
    content = b"".join([head, *(part for item, fill in order for part in (*(chunk.tobytes() for chunk in item.chunks()), bytes(fill)))])
    return content, parts, not alpha


def file_bytes(kept: Iterable[Kept], for_llama_cpp: Iterable[Path]) -> int:
    """About what copies of these adapters take."""
    weights = (path / WEIGHTS_FILE for path in for_llama_cpp)
    return sum(file.stat().st_size for file in (*(f for one in kept for f in one.files()), *(f for f in weights if f.is_file())))


def keep(one: Kept, to: Path, base: str | None, config: ModelConfig, check: bool) -> str:
    """Copies an adapter, reads it back, and says so. `base`: the name that its configuration shall have of the model, None for as it is."""
    with system_errors(to, "written"):
        to.mkdir(parents=True, exist_ok=True)
    named = None if base is None else _config(one.path)
    for path in one.files():
        place = to / path.name
        if place.exists() and not path.name.startswith("adapter_"):
            continue  # beside the same adapter: a card that was changed there
        with system_errors(path, "read"), open(path, "rb") as found, new_file(place) as file:
            if path.name == CONFIG_FILE and named is not None:
                file.write((json.dumps(named | {"base_model_name_or_path": base}, indent=2) + "\n").encode())
            else:
                shutil.copyfileobj(found, file, 1 << 22)
    try:
        parts = read_adapter(one.path, config).parts
    except BitNetError as error:
        return f"adapter {shown(one.path)}: copied as it is, though this build would not run it ({error})"
    if check:
        other = read_adapter(to, config).parts
        if parts.keys() != other.keys() or not all(_equal(parts[name], other[name]) for name in parts):
            raise NotTheSameError(f"{shown(to)}: differs from the source's adapter {shown(one.path)}")
    ranks = sorted({low.rank for low in parts.values()})
    verified = ", read back and compared" if check else ""
    return f"adapter {shown(one.path)}: kept, {len(parts)} matrices of rank {', '.join(map(str, ranks))}{verified}"


def _equal(one: LowRank, other: LowRank) -> bool:
    return (
        one.scheme == other.scheme
        and np.float32(one.scale) == np.float32(other.scale)
        and np.array_equal(one.a, other.a)
        and np.array_equal(one.b, other.b)
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter: its weights to the byte, its configuration but for the base's name."""
    weights = [sorted(f.name for f in path.glob("adapter_*") if f.name != CONFIG_FILE) for path in (one, other)]
    a, b = ({**(_config(path) or {}), "base_model_name_or_path": None} for path in (one, other))
    names = [*weights[0], *([] if _config(one) else [CONFIG_FILE])]  # one that cannot be read is the same if its bytes are
    return weights[0] == weights[1] and a == b and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _config(path: Path) -> dict[str, Any] | None:
    """adapter_config.json, None where it is damaged."""
    try:
        return json_object(read_file(path / CONFIG_FILE, MAX_CONFIG_BYTES), f"{shown(path)}/{CONFIG_FILE}")
    except BitNetError:
        return None


# ---- merging


def merged(model: Model, path: Path) -> tuple[Model, dict[str, LowRank]]:
    """The model with the adapter's deltas in its weights, each matrix stored as it was; and the deltas."""
    parts = read_adapter(path, model.config).parts
    return replace(model, weights={name: _merged(w, parts[name]) if name in parts else w for name, w in model.weights.items()}), parts


def _merged(weight: Weight, low: LowRank) -> Weight:
    def values(first: int, last: int) -> F32:
        return np.asarray(weight.values(first, last) + delta(low, first, last), np.float32)

    if weight.codes is None and weight.scheme in _DENSE:
        stored = weight.scheme if weight.scheme in ("f16", "bf16") else "f32"
        return replace(weight, scheme=stored, values=lambda a, b: rounded(values(a, b), stored), stored=None)
    if weight.scheme != "ternary" or weight.scales is None:
        raise UnsupportedModelError(
            f"{weight.where}: is {weight.scheme}; an adapter is merged into ternary or plain weights only, and runs unmerged beside others"
        )
    scales, before = weight.scales, weight.codes
    assert before is not None
    if any((before(first, last) > 1).any() for first, last in weight.spans()):
        raise UnsupportedModelError(
            f"{weight.where}: holds codes of 3, which stand for +2 scales, and merging keeps -1, 0 and +1 only; run the adapter unmerged"
        )

    def codes(first: int, last: int) -> I8:
        here = (scales if len(scales) == 1 else scales[first:last])[:, :, None]
        grouped = values(first, last).reshape(last - first, scales.shape[1], -1)
        steps = np.divide(grouped, here, out=np.zeros_like(grouped), where=here != 0)
        return np.asarray(np.clip(np.rint(steps), -1, 1).astype(np.int8).reshape(last - first, -1))

    return from_codes(weight.name, weight.shape, "ternary", weight.where, codes, scales)


def delta(low: LowRank, first: int, last: int) -> F32:
    """scale * B A of these rows, summed in the order of the rank: the same bits however the rows are cut."""
    a, b = low.dense()
    total = np.zeros((last - first, a.shape[1]), np.float32)
    for r in range(low.rank):
        total += b[first:last, r, None] * a[r]
    return total * np.float32(low.scale)


def survival(before: Mapping[str, Weight], after: Mapping[str, Weight], parts: Mapping[str, LowRank]) -> list[Merged]:
    """Matrix by matrix. `before`: the weights as they would be written without the adapter."""
    found = []
    for name, low in parts.items():
        one, other = before[name], after[name]
        sums, changed, trits = np.zeros(3), 0, 0
        for first, last in one.spans():
            d = delta(low, first, last).astype(np.float64)
            r = other.values(first, last).astype(np.float64) - one.values(first, last)
            sums += np.array([(d * d).sum(), (r * d).sum(), ((r - d) ** 2).sum()])
            if one.codes is not None and other.codes is not None and one.scheme == other.scheme == "ternary":
                different = one.codes(first, last) != other.codes(first, last)
                changed, trits = changed + int(different.sum()), trits + different.size
        found.append(Merged(name, float(sums[0]), float(sums[1]), float(sums[2]), changed, trits))
    return found


def lines(parts: list[Merged]) -> list[str]:
    """A table for people: layer by layer, and in all."""
    layers: dict[str, list[Merged]] = {}
    for part in parts:
        layers.setdefault(part.name.rsplit(".", 1)[0], []).append(part)
    rows = [together(found, name) for name, found in layers.items()] + [together(parts, "in all")]
    head = f"{'merged':<12} {'delta kept':>10} {'error':>8} {'trits changed':>14}"
    return [head] + [f"{row.name:<12} {row.survived:>10.1%} {_error(row):>8.1%} {_share(row.trits_changed):>14}" for row in rows]


def record(parts: list[Merged]) -> list[dict[str, Any]]:
    """The same as plain values, matrix by matrix."""
    return [{"weight": p.name, "delta_kept": p.survived, "error": _error(p), "trits_changed": p.trits_changed} for p in parts]


def _share(of: float | None) -> str:
    return "-" if of is None else f"{of:.3%}"


def _error(part: Merged) -> float:
    return float(np.sqrt(part.error / part.delta)) if part.delta else 0.0
