"""Checkpoints: whole or not there. A run's folder holds `checkpoint-STEP.pt`, the newest two.

A file is written beside its place, synced and renamed, so that whatever has the name is complete, however the writer ended. Should the
newest be damaged all the same (a disk), the one before it is taken, and a warning says so.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from bitnet.files.replacing import new_file

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def saved(run: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    found = {path: match for path in run.glob("checkpoint-*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: -int(found[path][1]))


def save(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after `step` steps, then remove what is older than the newest `KEPT`."""
    path = run / f"checkpoint-{step}.pt"
    with new_file(path) as file:
        torch.save(state, file)
    for old in saved(run)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def newest(run: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read; None where there is none."""
    for path in saved(run):
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return state
        except Exception as error:  # torch raises whatever its unpickler meets
            warnings.warn(f"{path}: cannot be read ({type(error).__name__}); the checkpoint before it is taken", stacklevel=2)
    return None
