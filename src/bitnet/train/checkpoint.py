"""Checkpoints: whole or not there. A run's folder holds `checkpoint-STEP.pt`, the newest two, and the one that divergence would lead to.

A file is what torch.save writes and the 32 bytes of its SHA-256. It is written beside its place, synced and renamed, so that whatever has
the name is complete, however the writer ended. Should the newest be damaged all the same (a disk), the one before it is taken, and a
warning says so.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from bitnet.errors import BitNetError
from bitnet.files.replacing import new_file

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.pt")
_DIGEST_BYTES = 32


def step_of(path: Path) -> int | None:
    """Of a checkpoint, by its name; None for any other file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def saved(run: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    found = {path: step for path in run.glob("checkpoint-*.pt") if (step := step_of(path)) is not None}
    return sorted(found, key=lambda path: -found[path])


def before(run: Path, step: int) -> Path | None:
    """The newest checkpoint of at most `step` steps."""
    return next((path for path in saved(run) if (step_of(path) or 0) <= step), None)


def save(run: Path, step: int, state: dict[str, Any], good_step: int = 0) -> Path:
    """Write the state after `step` steps, then remove what is older than the newest `KEPT`, but for the newest of at most `good_step`."""
    path = run / f"checkpoint-{step}.pt"
    with new_file(path) as file:
        hashed = _Hashed(file)
        try:
            torch.save(state, cast(IO[bytes], hashed))
        except RuntimeError as error:
            raise hashed.error or error from None  # torch hides what the disk said
        file.write(hashed.digest.digest())
    good = before(run, good_step)
    for old in saved(run)[KEPT:]:
        if old not in (good, path):
            old.unlink(missing_ok=True)
    return path


def newest(run: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read; None where there is none. Raises `BitNetError` where none is whole."""
    found = saved(run)
    for path in found:
        try:
            return _read(path)
        except Exception as error:  # torch raises whatever its unpickler meets
            warnings.warn(f"{path}: cannot be read ({error or type(error).__name__}); an older one is looked for", stacklevel=2)
    if found:
        raise BitNetError(f"{run}: none of its {len(found)} checkpoints can be read; bring one back, or begin again with another --out")
    return None


class _Hashed:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _read(path: Path) -> dict[str, Any]:
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        if digest.digest() != file.read():
            raise ValueError("it is damaged: its SHA-256 is another")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")  # what follows its archive does not disturb it
    return state
