"""Where a model may be written, checked before anything is."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from bitnet.convert.adapters import NESTED, is_adapter_alone, is_of_adapters
from bitnet.convert.formats import Format
from bitnet.errors import BitNetError, UsageError
from bitnet.files import PathLike, is_gguf, place_of, shown, system_errors
from bitnet.models.lora_gguf import is_lora
from bitnet.models.peft import WEIGHTS_FILE

# what a model's folder holds of the model; other files of a folder that is replaced stay in it
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer\.(json|model)|tokenizer_config\.json|"
    r"chat_template\.jinja|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
)


def named(target: PathLike) -> Path:
    """`target` by a name of its own, beside which other things can be named after it: "." and "..", and "/", have none."""
    path = Path(target)
    return place_of(path) if path.name in ("", "..") else path


def check_target(target: Path, sources: list[Path], form: Format) -> None:
    """Raises UsageError for a target that is the source, a link, of another kind than the format's, a file that is no model, a folder of
    other things, or one in which this runs.

    sources: the model's path first, and its files.
    """
    where = shown(target)
    with system_errors(target, "written"):
        parent = target.absolute().parent
        if not parent.is_dir():
            raise UsageError(f"{where}: there is no folder {shown(parent)}; make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{where}: the folder {shown(parent)} is read-only; make it writable, or name another target")
        if target.is_symlink():
            raise UsageError(f"{where}: is a symbolic link to {shown(os.readlink(target))}; name the file itself, or remove the link")
        beside = not form.folder and sources[0].is_dir() and os.path.samefile(parent, sources[0])
        if beside and MODEL_FILES.fullmatch(target.name) and not target.exists():
            raise UsageError(f"{where}: would become a part of the source, which then is another model; name another target")
        if not target.exists():
            return
        for source in sources:
            if os.path.samefile(source, target):
                raise UsageError(f"{where}: is the source itself, by this name or by a link to it; name another target")
        if target.is_dir() != form.folder:
            kinds = ("a folder", "one file") if target.is_dir() else ("a file", "a folder")
            raise UsageError(f"{where}: is {kinds[0]}, and {form.name} is {kinds[1]}; name another target, or choose another --format")
        if not form.folder:
            if not target.is_file():
                raise UsageError(f"{where}: is a pipe or device; expected a file to write")
            if not os.access(target, os.W_OK):
                raise UsageError(f"{where}: is read-only; make it writable, or name another target")
            if not _may_be_replaced(target):
                raise UsageError(f"{where}: is no model (GGUF or safetensors) that a new one may replace; name another target, or move it")
            return
        if target.resolve() in _here():
            raise UsageError(f"{where}: is the folder that this runs in, or holds it, and would be replaced; name another target")
        if any(target.resolve() in source.resolve().parents for source in sources):
            raise UsageError(f"{where}: holds the source, and would be replaced; name another target")
        entries = list(os.scandir(target))
        if entries and not (target / "config.json").is_file():
            raise UsageError(f"{where}: is a folder of other things (no config.json, but {shown(entries[0].name)}); name a new one")
        known = {e.name for e in entries if e.is_file() or e.name == NESTED or is_adapter_alone(e.path) or is_of_adapters(Path(e.path))}
        other = next((e.name for e in entries if e.is_symlink() or e.name not in known), None)
        if other is not None:
            raise UsageError(f"{where}: holds {shown(other)}, a folder or a link, which would be lost; name a new folder")


def _here() -> list[Path]:
    """The working directory and what holds it; nothing where it has been removed."""
    with suppress(FileNotFoundError):
        return [Path.cwd(), *Path.cwd().parents]
    return []


def _may_be_replaced(target: Path) -> bool:
    """Whether a file is a model, or empty; an adapter is none, and a tokenizer or a text would be lost for a slip of the pen."""
    with open(target, "rb") as file:
        head = file.read(9)
    if not head:
        return True
    return not is_lora(target) if is_gguf(target) else target.name != WEIGHTS_FILE and head[4:] == b"\0\0\0\0{"


def require_disk(target: Path, nbytes: int) -> None:
    """Raises BitNetError, with the numbers, where the disk has not the room for the new file beside the old one."""
    with system_errors(target, "written"):
        free = shutil.disk_usage(target.absolute().parent).free
    if nbytes > free:
        raise BitNetError(
            f"{shown(target)}: needs {nbytes:,} bytes of disk, {free:,} are free; free some, choose a smaller format or another disk"
        )


def keep_others(old: Path, new: Path) -> None:
    """The files of a folder to be replaced that are none of a model's (README.md, LICENSE), in the new one as well."""
    for entry in os.scandir(old) if old.is_dir() else ():
        if entry.is_dir():  # an adapter's, which the source has as well
            shutil.copytree(entry.path, new / entry.name)
        elif not MODEL_FILES.fullmatch(entry.name) and not (new / entry.name).exists():
            with suppress(OSError):
                os.link(entry.path, new / entry.name)
                continue
            shutil.copy2(entry.path, new / entry.name)
