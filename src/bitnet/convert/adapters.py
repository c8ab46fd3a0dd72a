"""Low-rank adapters beside the source of a conversion are kept.

An adapter names the modules and keeps the row order of Hugging Face, whatever its base is stored in (models/peft.py), so its tensors
stay what they are byte by byte; base_model_name_or_path follows the base into a folder that `transformers` loads. What was copied is
read back for the written model and compared: the same A, B and scale beside weights that were verified are the same function.
Beside a GGUF llama.cpp's own file of the adapter is written, too: names, and rows of llama's queries and keys, as the base has them there.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.verify import NotTheSameError
from bitnet.errors import BitNetError, UsageError
from bitnet.files import PathLike, gguf_write, json_object, place_of, read_file, shown, system_errors
from bitnet.files.replacing import new_file, new_folder
from bitnet.files.tensor import MAX_CONFIG_BYTES
from bitnet.models import ModelConfig, lora_gguf
from bitnet.models.gguf import names as gguf_names
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_adapter
from bitnet.tokenizer import replace_surrogates

NESTED = "adapters"  # a folder of adapters beside a model
_MODELS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Kept:
    """An adapter, and where it goes."""

    path: Path
    to: Path  # absolute beside one file, else relative to the new folder
    own: bool  # it lies among the model's own files

    def files(self) -> list[str]:
        """All that it consists of, relative to its folder, models below apart; among a model's files those that are named after it."""
        if self.own:
            with system_errors(self.path, "read"):
                return sorted(f.name for f in self.path.iterdir() if f.is_file() and f.name.startswith("adapter_"))
        found: list[str] = []
        for parent, folders, names in os.walk(self.path, onerror=_refuse_unreadable):
            folders[:] = [name for name in folders if not _is_hidden(name) and not _holds_model(os.path.join(parent, name))]
            found += (
                os.path.relpath(os.path.join(parent, name), self.path) for name in names if os.path.isfile(os.path.join(parent, name))
            )
        return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    with system_errors(error.filename, "read"):
        raise error


def beside(source: Path) -> dict[str, Path]:
    """The adapters beside a model, by where they lie relative to it: "" for its own folder, else "style" or "adapters/style", or one folder
    deeper, as PEFT saves several under names of their own; but the folders beside one file may be anybody's, and there no deeper."""
    folder = source if source.is_dir() else source.parent
    found = {"": folder} if is_adapter(folder) else {}
    for prefix, parent in (("", folder), (f"{NESTED}/", folder / NESTED)):
        for name in _folders(parent):
            if is_adapter_alone(parent / name):
                found[prefix + name] = parent / name
            elif name != NESTED and (prefix or source.is_dir()) and not _holds_model(parent / name):
                inner = (below for below in _folders(parent / name) if is_adapter_alone(parent / name / below))
                found |= {f"{prefix}{name}/{below}": parent / name / below for below in inner}
    return found


def _folders(parent: Path) -> list[str]:
    """Names of the folders in `parent`, in order; without hidden ones, such as those in which others are being written."""
    if not parent.is_dir():
        return []
    with system_errors(parent, "read"):
        return sorted(name for name in os.listdir(parent) if not _is_hidden(name) and (parent / name).is_dir())


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _holds_model(folder: PathLike) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in _MODELS)


def is_group(folder: Path) -> bool:
    """Whether a folder is one of adapters, each in a folder of its own name."""
    return not is_adapter(folder) and not _holds_model(folder) and any(is_adapter_alone(folder / name) for name in _folders(folder))


def is_adapter_alone(path: PathLike) -> bool:
    """Whether a folder is an adapter's, and not that of another model, beside which one lies."""
    return is_adapter(path) and not _holds_model(path)


def places(source: Path, target: Path, folder: bool) -> list[Kept]:
    """Where each adapter goes: in a folder to its own place, for one file beside it. Raises UsageError where something lies already."""
    ours = beside(source)
    if folder:
        refuse_others(target, ours)
        for name, path in ours.items():
            _refuse_file_in_the_way(target, name, path)
        return [Kept(path, Path(name), not name) for name, path in ours.items()]
    found = []
    for name, path in ours.items():
        to = target.absolute().parent / (name or f"{target.stem}-adapter")
        if to.resolve() == path.resolve() or (not name and target.absolute().parent.resolve() == path.resolve()):
            continue  # the target comes to lie beside it as the source does
        _refuse_file_in_the_way(target.absolute().parent, name, path)
        if os.path.lexists(to) and not (is_adapter(to) and _same(path, to)):
            raise UsageError(f"{shown(to)}: is in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere")
        found.append(Kept(path, to, not name))
    return found


def _refuse_file_in_the_way(root: Path, name: str, path: Path) -> None:
    """Raises UsageError where the folder of an adapter, or one above it, is another thing already."""
    parts = [*reversed(Path(name).parents), Path(name)] if name else []
    for place in (root / part for part in parts):
        if os.path.lexists(place) and not place.is_dir():
            raise UsageError(
                f"{shown(place)}: is no folder, and in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere"
            )


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
    return sum(f.stat().st_size for f in (*(one.path / name for one in kept for name in one.files()), *(f for f in weights if f.is_file())))


def keep(one: Kept, to: Path, base: str | None, config: ModelConfig, check: bool) -> str:
    """Copies an adapter, reads it back, and says so. `base`: the name that its configuration shall have of the model, None for as it is."""
    if os.path.lexists(to):
        _copy(one, to, base)
    else:  # what is killed leaves nothing of it
        with system_errors(to, "written"):
            to.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(to) as folder:
            _copy(one, folder, base)
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


def _copy(one: Kept, to: Path, base: str | None) -> None:
    """Writes an adapter's files into a folder, over those of the same adapter."""
    named = None if base is None else _config(one.path)
    for name in one.files():
        path, place = one.path / name, to / name
        if place.exists() and not name.startswith("adapter_"):
            continue  # beside the same adapter: a card that was changed there
        with system_errors(place.parent, "written"):
            place.parent.mkdir(parents=True, exist_ok=True)
        with system_errors(path, "read"), open(path, "rb") as found, new_file(place) as file:
            if name == CONFIG_FILE and named is not None:
                file.write((json.dumps(named | {"base_model_name_or_path": base}, indent=2) + "\n").encode())
            else:
                shutil.copyfileobj(found, file, 1 << 22)


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
