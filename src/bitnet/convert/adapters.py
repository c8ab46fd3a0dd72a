"""Low-rank adapters beside a model that is converted: they are kept. One may be merged instead (merging.py).

An adapter names the modules and keeps the row order of Hugging Face, whatever its base is stored in (models/peft.py), so its tensors
stay what they are byte by byte; base_model_name_or_path follows the base into a folder that `transformers` loads. What was copied is
read back for the written model and compared: the same A, B and scale beside weights that were verified are the same function.
Beside a GGUF llama.cpp's own file of the adapter is written, too: names, and rows of llama's queries and keys, as the base has them there.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.verify import NotTheSameError
from bitnet.errors import BitNetError, UsageError
from bitnet.files import PathLike, gguf_write, json_object, place_of, read_file, shown, system_errors
from bitnet.files.replacing import is_leftover, new_file, new_folder, remove_leftovers, sync_folder
from bitnet.files.tensor import MAX_CONFIG_BYTES
from bitnet.models import ModelConfig, lora_gguf
from bitnet.models.gguf import names as gguf_names
from bitnet.models.low_rank import LowRank
from bitnet.models.peft import CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_adapter
from bitnet.tokenizer import replace_surrogates

NESTED = "adapters"  # a folder of adapters beside a model
_MODELS = ("model.safetensors", "model.safetensors.index.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # a state of transformers' Trainer, with its optimizer's
_OF_A_MODEL = re.compile(r"config\.json|((pytorch_)?model|consolidated).*\.(safetensors|bin|pth)(\.index\.json)?")


@dataclass(frozen=True)
class Kept:
    """An adapter, and where it goes."""

    path: Path
    to: Path  # absolute beside one file, else relative to the new folder
    own: bool  # it lies among the model's own files
    below: tuple[str, ...] = ()  # adapters in its folder, which are kept for themselves

    def files(self) -> tuple[list[Path], list[str]]:
        """(all files that it consists of, relative to its folder; what below it does not go along, and why).

        Among a model's files those that are named after it, else all there and in folders below. Of links only those to files are followed.
        """
        found, left = list[Path](), list[str]()
        folders = [Path()]
        with system_errors(self.path, "read"):
            while folders:
                at = folders.pop()
                for path in sorted((self.path / at).iterdir()):
                    name = at / path.name
                    if path.is_file():
                        found += [name] if path.name.startswith("adapter_") or not self.own else []
                    elif self.own or is_leftover(path.name) or str(name) in self.below:
                        continue
                    elif path.is_symlink() or not path.is_dir():
                        left.append(f"{shown(name)} (a link or device)")
                    elif _is_model(path):
                        left.append(f"{shown(name)} (another model)")
                    else:
                        folders.append(name)
        return found, left


def beside(source: Path) -> dict[str, Path]:
    """The adapters beside a model, by where they lie relative to it: "" for its own folder, else "style" or "adapters/style", and with one
    folder more where several lie in it, "both/style": as PEFT saves those of one model. A folder comes before what lies in it.

    The folders beside one file may be anybody's: there only those are looked into that hold nothing but adapters.
    """
    folder = source if source.is_dir() else source.parent
    found = {"": folder} if is_adapter(folder) else {}
    for prefix, parent in (("", folder), (f"{NESTED}/", folder / NESTED)):
        with system_errors(parent, "read"):
            names = sorted(os.listdir(parent)) if parent.is_dir() else []
        for name in names:
            found |= {prefix + name: parent / name} if is_adapter_alone(parent / name) else {}
            if prefix or (name != NESTED and (source.is_dir() or is_of_adapters(parent / name))):
                found |= {f"{prefix}{name}/{one}": parent / name / one for one in named(parent / name)}
    return found


def named(folder: Path) -> list[str]:
    """The adapters in a folder that is no other model's, nor hidden, nor closed; links are not followed here."""
    if folder.name.startswith(".") or folder.is_symlink() or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    there = (path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink())
    names = sorted(path.name for path in there if is_adapter_alone(path) and not _CHECKPOINT.fullmatch(path.name))
    return names if names and not _is_model(folder) else []


def is_of_adapters(folder: Path) -> bool:
    """Whether a folder holds an adapter or more, each in its own, and no other folders."""
    names = named(folder)
    return bool(names) and all(path.name in names or path.is_file() for path in folder.iterdir())


def is_adapter_alone(path: PathLike) -> bool:
    """Whether a folder is an adapter's, and not that of another model, beside which one lies."""
    return is_adapter(path) and not any(map(os.path.exists, (os.path.join(path, name) for name in _MODELS)))


def _is_model(path: Path) -> bool:
    """Whether a folder is a model's, and no adapter's."""
    return not is_adapter_alone(path) and any(
        _OF_A_MODEL.fullmatch(file.name) or (file.suffix == ".gguf" and not lora_gguf.is_lora(file)) for file in path.iterdir()
    )


def places(source: Path, target: Path, folder: bool) -> list[Kept]:
    """Where each adapter goes: in a folder to its own place, for one file beside it. Raises UsageError where another one lies already."""
    ours = beside(source)
    root = target.absolute() if folder else target.absolute().parent
    if folder:
        refuse_others(target, ours)
        for name, path in ours.items():
            _refuse_a_file(root / name, root, path)
        return [Kept(path, Path(name), not name, _below(name, ours)) for name, path in ours.items()]
    found = []
    for name, path in ours.items():
        to = root / (name or f"{target.stem}-adapter")
        _refuse_a_file(to, root, path)
        if to.resolve() == path.resolve() or (not name and root.resolve() == path.resolve()):
            continue  # the target comes to lie beside it as the source does
        if os.path.lexists(to) and not (is_adapter(to) and _same(path, to)):
            raise UsageError(f"{shown(to)}: is in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere")
        found.append(Kept(path, to, not name, _below(name, ours)))
    return found


def _below(name: str, ours: Iterable[str]) -> tuple[str, ...]:
    return tuple(other.removeprefix(f"{name}/") for other in ours if other.startswith(f"{name}/"))


def _refuse_a_file(to: Path, root: Path, path: Path) -> None:
    """Raises UsageError where a folder is needed below `root`, that the adapter at `path` can go to `to`, and something else lies there."""
    for place in (to, *to.parents):
        if root in place.parents and os.path.lexists(place) and not place.is_dir():
            raise UsageError(f"{shown(place)}: is in the way of the source's adapter {shown(path)}; move it, or write the model elsewhere")


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
    model = place_of(target)
    taken = {model: "the model"}
    for path, to in [*((one.path, one.to) for one in kept), *for_llama_cpp.items()]:
        here, what = place_of(to), f"the source's adapter {shown(path)}"
        at = model if model in here.parents else here
        if at in taken:
            raise UsageError(f"{shown(at)}: is where both {taken[at]} and {what} would go; rename the adapter's folder, or the target")
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
    copied = (one.path / name for one in kept for name in one.files()[0])
    return sum(file.stat().st_size for file in (*copied, *(f for f in weights if f.is_file())))


def tidy(target: Path, kept: Iterable[Kept] = ()) -> None:
    """Removes what dead writers have left in the folders of adapters beside a file that is to be written."""
    nested = target.absolute().parent / NESTED
    for folder in {nested, *nested.glob("*/"), *(one.to.parent for one in kept)}:
        remove_leftovers(folder)


def keep(one: Kept, to: Path, base: str | None, config: ModelConfig, check: bool) -> str:
    """Copies an adapter, reads it back, and says so. `base`: the name that its configuration shall have of the model, None for as it is.

    Its folder appears whole; where the same adapter lies already its files are replaced one by one.
    """
    with system_errors(to, "written"):
        to.parent.mkdir(parents=True, exist_ok=True)
    place: AbstractContextManager[Path] = nullcontext(to) if to.is_dir() else new_folder(to)
    with place as folder:
        return _copied(one, folder, to, base, config, check)


def _copied(one: Kept, folder: Path, to: Path, base: str | None, config: ModelConfig, check: bool) -> str:
    """`keep`, into `folder`, which becomes `to`."""
    named = None if base is None else _config(one.path)
    files, left = one.files()
    for name in files:
        path, place = one.path / name, folder / name
        if place.exists() and (len(name.parts) > 1 or not name.name.startswith("adapter_")):
            continue  # beside the same adapter: a card that was changed there
        with system_errors(place, "written"):
            place.parent.mkdir(parents=True, exist_ok=True)
        with system_errors(path, "read"), open(path, "rb") as found, new_file(place) as file:
            if str(name) == CONFIG_FILE and named is not None:
                file.write((json.dumps(named | {"base_model_name_or_path": base}, indent=2) + "\n").encode())
            else:
                shutil.copyfileobj(found, file, 1 << 22)
    for below in {parent for name in files for parent in name.parents}:
        sync_folder(folder / below)
    without = f"; without {', '.join(left)}" if left else ""
    try:
        parts = read_adapter(one.path, config).parts
    except BitNetError as error:
        return f"adapter {shown(one.path)}: copied as it is, though this build would not run it ({error}){without}"
    if check:
        other = read_adapter(folder, config).parts
        if parts.keys() != other.keys() or not all(_equal(parts[name], other[name]) for name in parts):
            raise NotTheSameError(f"{shown(to)}: differs from the source's adapter {shown(one.path)}")
    ranks = sorted({low.rank for low in parts.values()})
    verified = ", read back and compared" if check else ""
    return f"adapter {shown(one.path)}: kept, {len(parts)} matrices of rank {', '.join(map(str, ranks))}{verified}{without}"


def _equal(one: LowRank, other: LowRank) -> bool:
    return (
        one.scheme == other.scheme
        and np.float32(one.scale) == np.float32(other.scale)
        and np.array_equal(one.a, other.a)
        and np.array_equal(one.b, other.b)
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter: its weights to the byte, its configuration but for the base's name."""
    weights = [sorted(f.name for f in path.glob("adapter_*") if f.name != CONFIG_FILE and f.is_file()) for path in (one, other)]
    a, b = ({**(_config(path) or {}), "base_model_name_or_path": None} for path in (one, other))
    names = [*weights[0], *([] if _config(one) else [CONFIG_FILE])]  # one that cannot be read is the same if its bytes are
    return weights[0] == weights[1] and a == b and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _config(path: Path) -> dict[str, Any] | None:
    """adapter_config.json, None where it is damaged."""
    try:
        return json_object(read_file(path / CONFIG_FILE, MAX_CONFIG_BYTES), f"{shown(path)}/{CONFIG_FILE}")
    except BitNetError:
        return None
