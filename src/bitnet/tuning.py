"""How a model runs on this machine where nobody says how: what `bitnet bench --tune` found fastest, else as stored on every core.

The choices lie in one JSON file in the user's ~/.cache, beside huggingface's: one for each machine (processor, cores, instruction set) and
model (its place, size and time of change; an embedded one: its name and this version). A choice of another head changes results, so its
measured cost stands beside it. A file that cannot be read as such costs a warning, never a run.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitnet import __version__, _native
from bitnet.engine import CODECS, MOST_THREADS
from bitnet.errors import BitNetError
from bitnet.machine import cpu_model, usable_cores
from bitnet.weights import HEADS

FORMAT = "bitnet tuning 1"
MAX_FILE_BYTES = 1 << 20
_EMBEDDED = Path(__file__).parent / "embedded"
_IDENTITY = (".safetensors", ".json", ".gguf")  # files of a folder that make it another model


@dataclass(frozen=True)
class Choice:
    """The fastest decoding that was measured, and what its head costs against the stored one."""

    codec: str  # "t2" or "b3"; "auto" for a model without ternary layers
    head: str  # of HEADS
    threads: int
    decode_tok_s: float
    top1_agreement: float  # share of positions with the same likeliest token; 1 for the stored head
    kl_nats: float  # per token

    def text(self) -> str:
        """The choice in words, with its cost."""
        codec = "" if self.codec == "auto" else f"codec {self.codec}, "
        return f"{codec}head {self.head}{self.cost()}, {self.threads} threads: {self.decode_tok_s:,.1f} tokens/s"

    def notice(self) -> str:
        """One line for a run whose head it chose."""
        return f"head: {self.head}, as tuned{self.cost()}; --head stored undoes it"

    def cost(self) -> str:
        """What a head that is not the stored one changes, in brackets."""
        return "" if self.head == "stored" else f" (same top-1 {self.top1_agreement:.1%}, KL {self.kl_nats:.2g} nats)"


@dataclass(frozen=True)
class Settings:
    """What to load a model with. `tuned`: the saved choice that decided anything, or None; `head_tuned`: whether it decided the head."""

    codec: str
    head: str
    threads: int | None
    tuned: Choice | None = None
    head_tuned: bool = False


def settle(path: Path, codec: str = "auto", head: str | None = None, threads: int | None = None) -> Settings:
    """What was asked for; where nothing was ("auto", None), the choice saved for the model at `path`, else the rule."""
    choice = saved_choice(path) if codec == "auto" or head is None or threads is None else None
    if choice is None:
        return Settings(codec, head or "stored", threads)
    return Settings(choice.codec if codec == "auto" else codec, head or choice.head, threads or choice.threads, choice, head is None)


def saved_choice(path: Path) -> Choice | None:
    """The choice for the model at `path` (a folder or file) on this machine."""
    choices = saved_choices()
    try:
        name = _model(path) if choices else ""
    except OSError:  # whoever opens it will say so
        return None
    return next((choice for model, choice in choices if model == name), None)


def saved_choices() -> list[tuple[str, Choice]]:
    """(model, choice) of all choices for this machine. Warns, and gives none, where the file is damaged or another program's."""
    here = machine_key()
    return [(entry["model"], _choice(entry)) for entry in _entries() if entry["machine"] == here]


def save(path: Path, choice: Choice) -> Path:
    """Makes `choice` the one for the model at `path` on this machine; gives the file that holds it. Raises `BitNetError`."""
    try:
        file = tuning_file()
    except RuntimeError as error:
        raise BitNetError(f"the choice cannot be saved: {error}") from None
    machine, model = machine_key(), _model(path)
    others = [entry for entry in _entries() if (entry["machine"], entry["model"]) != (machine, model)]
    text = json.dumps({"format": FORMAT, "choices": [*others, {"machine": machine, "model": model, **asdict(choice)}]}, indent=1)
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    except OSError as error:
        raise BitNetError(f"{file}: the choice cannot be saved ({error.strerror or error}); make its folder writable") from None
    finally:
        with suppress(OSError):
            beside.unlink()
    return file


def tuning_file() -> Path:
    """Where all choices lie, there or not. Raises `RuntimeError` for a user without a home."""
    return Path.home() / ".cache" / "bitnet" / "tuning.json"


def machine_key() -> str:
    """This machine as the choices name it."""
    return f"{cpu_model()}, {usable_cores()} cores, {_native.choose_isa()[0]}"


def _model(path: Path) -> str:
    """The model at `path` as the choices name it: another file in its place is another model."""
    if path.parent == _EMBEDDED:
        return f"{path.name} of bitnet {__version__}"
    resolved = path.resolve()
    files = [resolved] if resolved.is_file() else [file for file in resolved.iterdir() if file.suffix in _IDENTITY]
    stats = [file.stat() for file in files]
    return f"{resolved} ({sum(stat.st_size for stat in stats)} bytes, of {max((stat.st_mtime_ns for stat in stats), default=0)})"


def _entries() -> list[dict[str, Any]]:
    """Everything in the file, checked."""
    try:
        file = tuning_file()
    except RuntimeError:
        return []
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError("too large")
        found = json.loads(data)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        entries: list[dict[str, Any]] = [dict(entry) for entry in found["choices"]]
        for entry in entries:
            if not (isinstance(entry["machine"], str) and isinstance(entry["model"], str)):
                raise ValueError("a choice is for nothing")
            _choice(entry)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        warnings.warn(f"{file}: holds no choices of bench --tune ({reason}); it is ignored until --tune writes it anew", stacklevel=2)
        return []
    return entries


def _choice(entry: dict[str, Any]) -> Choice:
    """Raises `ValueError`, `KeyError` or `TypeError` for what is none."""
    choice = Choice(
        codec=entry["codec"],
        head=entry["head"],
        threads=entry["threads"],
        decode_tok_s=float(entry["decode_tok_s"]),
        top1_agreement=float(entry["top1_agreement"]),
        kl_nats=float(entry["kl_nats"]),
    )
    if not all(map(math.isfinite, (choice.decode_tok_s, choice.top1_agreement, choice.kl_nats))):
        raise ValueError("figures that are not finite")
    whole = type(choice.threads) is int and 1 <= choice.threads <= MOST_THREADS
    if choice.codec not in ("auto", *CODECS) or choice.head not in HEADS or not whole:
        raise ValueError(f"codec {choice.codec!r}, head {choice.head!r}, threads {choice.threads!r}")
    return choice
