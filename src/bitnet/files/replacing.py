"""Files and folders that appear whole: written beside their target, synced, then moved into its place in one step.

What is being written lies in a folder of its own beside the target, `.NAME.<12 hex digits>.bitnet-tmp`, as `new`, next to a file `name`
with the target's whole name; its writer keeps the folder locked. So the target, at whatever moment its writer is killed, is what it was or
what it shall be. The folder of a dead writer is known by its name, by holding nothing but `name`, `new` and `old`, and by a lock that
nobody holds: the next writer beside it removes it. That folder is its owner's alone (0700), and what replaces something takes over its
permissions in there, so nobody can read of the new what the old one was closed for.

A folder cannot be renamed over another one; the two exchange their names in one step, where the system can do that (Linux, macOS).
Elsewhere the old one steps aside as `old` first, and if its writer dies right then, the next writer puts it back.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bitnet.errors import UsageError
from bitnet.files import PathLike, shown, system_errors

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None  # without it no leftovers are looked for

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.bitnet-tmp", re.DOTALL)
_PARTS = {"name", "new", "old"}
_HERE, _EXCHANGE, _SWAP = -100, 2, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


@contextmanager
def new_file(path: PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` (or of what that links to) when the block ends well, and vanishes otherwise.

    Raises UsageError where the target is no file, and one line where the system refuses.
    """
    with system_errors(path, "written"):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise UsageError(f"{shown(path)}: is a folder, pipe or device; expected a file to write")
        with _beside(target) as folder:
            with open(folder / "new", "xb") as file:
                yield file
                file.flush()
                _keep_mode(target, folder / "new")
                os.fsync(file.fileno())
            os.replace(folder / "new", target)
            sync_folder(target.parent)


@contextmanager
def new_folder(path: PathLike) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends well; whoever fills it syncs its files (`write_synced`)."""
    with system_errors(path, "written"):
        target = Path(os.path.realpath(path))
        with _beside(target) as folder:
            os.mkdir(folder / "new")
            yield folder / "new"
            for entry in (folder / "new").iterdir():
                _keep_mode(target / entry.name, entry)
            _keep_mode(target, folder / "new")
            sync_folder(folder / "new")
            if not target.exists():
                os.rename(folder / "new", target)
            elif not _exchange(folder / "new", target):
                os.rename(target, folder / "old")
                os.rename(folder / "new", target)
            sync_folder(target.parent)


def write_synced(path: Path, content: bytes) -> None:
    """A small file of a new folder."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: PathLike, text: str) -> None:
    """A small file, beside and renamed."""
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """The folder beside `target` in which it is written, locked, and removed at the end."""
    remove_leftovers(target.parent)
    folder, descriptor = _locked_folder(target)
    try:
        write_synced(folder / "name", os.fsencode(target.name))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """(a new folder beside `target`, the descriptor that keeps it locked)."""
    name = os.fsencode(target.name)[:100].decode(errors="ignore")
    while True:
        folder = target.with_name(f".{name}.{secrets.token_hex(6)}.bitnet-tmp")
        os.mkdir(folder, 0o700)
        if fcntl is None:
            return folder, None
        with suppress(FileNotFoundError):  # somebody took it for a dead writer's in the moment before it was locked: another one
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Whether a folder of this name is, or was, a writer's."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(parent: Path) -> None:
    """Removes from `parent` what writers that are dead have left there, and nothing else."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if is_leftover(entry.name)]
        for folder in found:
            with suppress(OSError):
                _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or not set(os.listdir(folder)) <= _PARTS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its writer lives
        if (folder / "old").exists():
            target = folder.parent / os.path.basename(os.fsdecode((folder / "name").read_bytes()))
            if not os.path.lexists(target):
                os.rename(folder / "old", target)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _keep_mode(old: Path, new: Path) -> None:
    """Gives `new` the permissions of the file or folder in whose place it comes, where there is one of its kind."""
    with suppress(FileNotFoundError, NotADirectoryError):
        was, is_ = os.lstat(old).st_mode, os.lstat(new).st_mode
        if was != is_ and stat.S_IFMT(was) == stat.S_IFMT(is_):
            os.chmod(new, stat.S_IMODE(was))


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two have exchanged their names, in one step."""
    if os.name != "posix":
        return False
    library: Any = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)
    return hasattr(library, "renamex_np") and library.renamex_np(*names, _SWAP) == 0


def sync_folder(folder: Path) -> None:
    """That the names in it are on the disk; not every system lets a folder be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
