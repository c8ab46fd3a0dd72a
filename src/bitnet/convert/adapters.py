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

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.quantize import rounded
from bitnet.convert.source import F32, I8, Model, Weight, from_codes
from bitnet.convert.verify import NotTheSameError
from bitnet.errors import BitNetError, UnsupportedModelError, UsageError
from bitnet.files import gguf_write, json_object, read_file, shown, system_errors
from bitnet.files.replacing import new_file
from bitnet.files.tensor import MAX_CONFIG_BYTES
from bitnet.models import ModelConfig, lora_gguf
from bitnet.models.gguf import names as gguf_names
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_adapter

_DENSE = ("f32", "f64", "f16", "bf16")


@dataclass(frozen=True)
class Merged:
    """What of a delta D = scale * B A has remained in one matrix, as the change R."""

    name: str
    delta: float  # |D|^2
    along: float  # <R, D>
    error: float  # |R - D|^2
    changed: int  # trits that are others, of a ternary matrix
    size: int  # weights

    @property
    def survived(self) -> float:
        return self.along / self.delta if self.delta else 1.0


def together(parts: list[Merged], name: str) -> Merged:
    """The sum over several matrices."""
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("delta", "along", "error", "changed", "size")}
    return Merged(name, **sums)


# ---- keeping


def beside(source: Path) -> dict[str, Path]:
    """The adapters beside a model, by where they lie relative to it: "" for its own folder, else the name of a folder in it."""
    folder = source if source.is_dir() else source.parent
    with system_errors(folder, "read"):
        inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_adapter(entry))
    return ({"": folder} if is_adapter(folder) else {}) | {name: folder / name for name in inner}


def places(source: Path, target: Path, folder: bool) -> dict[Path, Path]:
    """Where each adapter goes: in a folder to its own place, for one file beside it. Raises UsageError where another one lies already."""
    found: dict[Path, Path] = {}
    for name, path in beside(source).items():
        if folder:
            found[path] = Path(name)
            continue
        to = target.absolute().parent / (name or f"{target.stem}-adapter")
        if to.resolve() == path.resolve() or (not name and target.absolute().parent.resolve() == path.resolve()):
            continue  # the target comes to lie beside it as the source does
        if to.exists() and not (is_adapter(to) and _same(path, to)):
            raise UsageError(f"{shown(to)}: is in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere")
        found[path] = to
    return found


def gguf_places(source: Path, target: Path) -> dict[Path, Path]:
    """Where each adapter goes for llama.cpp: TARGET-NAME-LoRA.gguf beside TARGET.gguf. Raises UsageError where another file lies."""
    found = {
        path: target.absolute().with_name("-".join(filter(None, (target.stem, name, "LoRA.gguf")))) for name, path in beside(source).items()
    }
    for path, to in found.items():
        if os.path.lexists(to) and (to.is_symlink() or not lora_gguf.is_lora(to)):
            raise UsageError(
                f"{shown(to)}: is in the way of the source's adapter {shown(path)} for llama.cpp; move it, or name another target"
            )
    return found


def write_gguf(path: Path, to: Path, architecture: str, config: ModelConfig) -> str | None:
    """Writes an adapter as llama.cpp reads it, reads it back, and says so; None for one that this build cannot run.

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
    keys = {lora_gguf.TYPE: "adapter", "general.architecture": architecture, "general.name": path.absolute().name, lora_gguf.KIND: "lora"}
    head, order = gguf_write.layout(items, keys | {lora_gguf.ALPHA: float(alpha)})
    with new_file(to) as file:
        file.write(head)
        for item, fill in order:
            for chunk in item.chunks():
                file.write(chunk.data)
            file.write(bytes(fill))
        file.flush()
        other = lora_gguf.read(file.name, config)
        if parts.keys() != other.keys() or not all(_equal(parts[name], other[name]) for name in parts):
            raise NotTheSameError(f"{shown(to)}: differs from the source's adapter {shown(path)}")
    how = "" if alpha else ", B times its scale, for the file has one alpha and these matrices have several"
    return f"adapter {shown(path)}: for llama.cpp (--lora) as {shown(to)}, read back and compared{how}"


def file_bytes(paths: Iterable[Path]) -> int:
    """About what copies of these adapters take."""
    return sum((path / WEIGHTS_FILE).stat().st_size for path in paths if (path / WEIGHTS_FILE).is_file())


def keep(path: Path, to: Path, base: str | None, config: ModelConfig, check: bool) -> str:
    """Copies an adapter, reads it back, and says so. `base`: the name that its configuration shall have of the model, None for as it is."""
    found = json_object(read_file(path / CONFIG_FILE, MAX_CONFIG_BYTES), f"{shown(path)}/{CONFIG_FILE}")
    with system_errors(to, "written"):
        to.mkdir(parents=True, exist_ok=True)
    named = found if base is None else found | {"base_model_name_or_path": base}
    with new_file(to / CONFIG_FILE) as file:
        file.write((json.dumps(named, indent=2) + "\n").encode())
    if (path / WEIGHTS_FILE).exists():
        with open(path / WEIGHTS_FILE, "rb") as weights, new_file(to / WEIGHTS_FILE) as file:
            while chunk := weights.read(1 << 22):
                file.write(chunk)
    try:
        one = read_adapter(path, config).parts
    except BitNetError as error:
        return f"adapter {shown(path)}: copied as it is, though this build would not run it ({error})"
    if check:
        other = read_adapter(to, config).parts
        if one.keys() != other.keys() or not all(_equal(one[name], other[name]) for name in one):
            raise NotTheSameError(f"{shown(to)}: differs from the source's adapter {shown(path)}")
    ranks = sorted({low.rank for low in one.values()})
    verified = ", read back and compared" if check else ""
    return f"adapter {shown(path)}: kept, {len(one)} matrices of rank {', '.join(map(str, ranks))}{verified}"


def _equal(one: LowRank, other: LowRank) -> bool:
    return (
        one.scheme == other.scheme
        and np.float32(one.scale) == np.float32(other.scale)
        and np.array_equal(one.a, other.a)
        and np.array_equal(one.b, other.b)
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two adapters have the same weights."""
    a, b = one / WEIGHTS_FILE, other / WEIGHTS_FILE
    return a.is_file() and b.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


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
    scales = weight.scales

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
        sums, changed = np.zeros(3), 0
        for first, last in one.spans():
            d = delta(low, first, last).astype(np.float64)
            r = other.values(first, last).astype(np.float64) - one.values(first, last)
            sums += np.array([(d * d).sum(), (r * d).sum(), ((r - d) ** 2).sum()])
            if one.codes is not None and other.codes is not None and one.scheme == other.scheme == "ternary":
                changed += int((one.codes(first, last) != other.codes(first, last)).sum())
        found.append(Merged(name, float(sums[0]), float(sums[1]), float(sums[2]), changed, int(np.prod(one.shape))))
    return found


def lines(parts: list[Merged]) -> list[str]:
    """A table for people: layer by layer, and in all."""
    layers: dict[str, list[Merged]] = {}
    for part in parts:
        layers.setdefault(part.name.rsplit(".", 1)[0], []).append(part)
    rows = [together(found, name) for name, found in layers.items()] + [together(parts, "in all")]
    head = f"{'merged':<12} {'delta kept':>10} {'error':>8} {'trits changed':>14}"
    return [head] + [f"{row.name:<12} {row.survived:>10.1%} {_error(row):>8.1%} {row.changed / row.size:>14.3%}" for row in rows]


def record(parts: list[Merged]) -> list[dict[str, Any]]:
    """The same as plain values, matrix by matrix."""
    return [{"weight": p.name, "delta_kept": p.survived, "error": _error(p), "trits_changed": p.changed / p.size} for p in parts]


def _error(part: Merged) -> float:
    return float(np.sqrt(part.error / part.delta)) if part.delta else 0.0
