"""Which files of a repository a model needs. Names and sizes come from outside: only plain ones are ever used, or shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NoReturn

from bitnet.errors import FormatError, UnsupportedModelError, UsageError

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_NAMED = 40  # files that a message lists

_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def choose(sizes: Mapping[str, int | None], file: str | None, read_index: Callable[[], bytes], where: str) -> tuple[list[str], str]:
    """(the files that the model needs, small ones first; the one to open, "" for the folder), of a repository's files and their sizes.

    Safetensors before GGUF; a GGUF unasked only where there is just one. `where` begins the messages.
    """
    if file is not None:
        return _choose_named(sizes, file, where)
    configs = [name for name in CONFIGS if name in sizes]
    if WEIGHTS in sizes:
        return [*configs, WEIGHTS], ""
    if INDEX in sizes:
        shards = _shards(read_index(), where)
        lost = [shard for shard in shards if shard not in sizes]
        if lost:
            raise FormatError(f"{where}: {INDEX} names {len(shards)} shards, {len(lost)} are not there, such as {plain(lost[0])}")
        return [*configs, INDEX, *shards], ""
    models = [name for name in sizes if name.lower().endswith(".gguf") and not _why_not(name)]
    if len(models) == 1:
        return models, models[0]
    if models:
        raise UsageError(f"{where} holds {len(models)} GGUF files; choose one with --file (file=): {_listed(sizes, models)}")
    _refuse(sizes, where)


def _choose_named(sizes: Mapping[str, int | None], file: str, where: str) -> tuple[list[str], str]:
    reason = _why_not(file)
    if reason:
        raise UnsupportedModelError(f"{where}: {plain(file)} is {reason}")
    if not file.lower().endswith((".gguf", ".safetensors")):
        raise UsageError(f"{where}: {plain(file)} is no model; expected a .gguf or .safetensors of the repository")
    if file not in sizes:
        models = [name for name in sizes if name.lower().endswith((".gguf", ".safetensors"))]
        raise UsageError(f"{where} has no file {plain(file)}; it has: {_listed(sizes, models) or 'no .gguf or .safetensors'}")
    if file.lower().endswith(".gguf"):
        return [file], file
    beside = [str(PurePosixPath(file).with_name(config)) for config in CONFIGS]
    return [*(name for name in beside if name in sizes), file], file


def _why_not(name: str) -> str:
    """What this file is instead of a model that is read here; empty where it may be one."""
    lower = name.lower()
    if lower.endswith(PICKLES):
        return "a Python pickle, and to load one can run any code in it; expected safetensors or GGUF"
    if _GGUF_PART.search(lower):
        return "one part of a split GGUF, which this build does not join; choose a whole one, or join it with llama-gguf-split --merge"
    kind = next((kind for kind in ("mmproj", "imatrix") if kind in PurePosixPath(lower).name), None)
    return f"no language model but a companion of one ({kind}); choose another" if kind and lower.endswith(".gguf") else ""


def _refuse(sizes: Mapping[str, int | None], where: str) -> NoReturn:
    """For a repository of no weights that are read here."""
    for kind, suffixes in (("GGUF files", (".gguf",)), ("pickles", PICKLES)):
        found = [name for name in sizes if name.lower().endswith(suffixes)]
        if found:
            raise UnsupportedModelError(f"{where} holds no weights that run here, only {kind}: {plain(found[0])} is {_why_not(found[0])}")
    other = [name for name in sizes if name.lower().endswith(".safetensors")]
    if other:
        raise UnsupportedModelError(f"{where} has no {WEIGHTS}; choose another file with --file (file=): {_listed(sizes, other)}")
    raise UnsupportedModelError(f"{where} holds no weights: neither {WEIGHTS} nor {INDEX} nor a .gguf")


def _shards(raw: bytes, where: str) -> list[str]:
    """The shards that an index names, each once. Its brackets are counted first: an index has two or three, and deep JSON is costly."""
    try:
        weight_map = json.loads(raw)["weight_map"] if raw.count(b"{") + raw.count(b"[") < 64 else {}
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{where}: {INDEX} is no index of shards; expected an object with a weight_map of tensor -> file") from None
    if not shards or not all(is_plain(shard) and "/" not in shard and shard.lower().endswith(".safetensors") for shard in shards):
        raise FormatError(f"{where}: {INDEX} names shards that are no plain .safetensors files beside it")
    return shards


def _listed(sizes: Mapping[str, int | None], names: Sequence[str]) -> str:
    shown = [f"{plain(name)} ({size_text(sizes[name])})" for name in sorted(names)[:MAX_NAMED]]
    return ", ".join(shown + ["..."] * (len(names) > MAX_NAMED))


def is_plain(name: object) -> bool:
    """Whether a path from outside stays below the folder that it is put in, and may be printed."""
    if not isinstance(name, str) or not 0 < len(name) <= 512 or not name.isprintable() or any(mark in name for mark in '\\:"<>|?*'):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) < 200 for part in name.split("/"))


def plain(text: object) -> str:
    """Text from outside as it may stand in a line."""
    line = " ".join(str(text)[:300].split())
    return line if line.isprintable() else ascii(line)[1:-1]


def size_text(size_bytes: int | None) -> str:
    """1234567 -> "1.2 MB"."""
    if size_bytes is None:
        return "unknown size"
    unit, scale = next(((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if size_bytes >= scale), ("bytes", 1))
    return f"{size_bytes / scale:.1f} {unit}" if scale > 1 else f"{size_bytes} bytes"
