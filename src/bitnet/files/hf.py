"""Checkpoints as Hugging Face lays them out: a folder of config.json, tokenizer.json and safetensors (sharded or not), or one file.

A single .safetensors can be complete by itself, with the same texts in its metadata under the keys of TEXTS, an empty one for what the
model has not; what is not there at all is taken from the files beside it. What a file is is read from its bytes, never from its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from bitnet.errors import BitNetError, FormatError
from bitnet.files import (
    PathLike,
    check_json_object,
    json_object,
    open_regular,
    read_file,
    refuse_other_formats,
    safetensors,
    shown,
    system_errors,
)
from bitnet.files.tensor import MAX_CONFIG_BYTES, Tensor, pair_ternary

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_SHARDS = 1000
TEXTS = ("config", "generation_config", "tokenizer", "tokenizer_config", "chat_template")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer_json: bytes | None  # the text of a JSON object by its brackets, at most 64 MB; no more is checked here
    generation_config: dict[str, Any]  # empty where there is none
    layout: str = "hf"  # or "gguf", whose tensors have GGUF's names and whose config is made from the metadata
    tokenizer_config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json; empty where there is none
    chat_template: str | None = None  # chat_template.jinja, or GGUF's tokenizer.chat_template
    gguf_metadata: Mapping[str, Any] = field(default_factory=dict)


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a folder or a file; no tensor's bytes are read. Raises FormatError and UnsupportedModelError, one line each."""
    path = Path(path)
    folder, metadata = path, {}
    if not os.path.isdir(path):
        file = safetensors.read(path)
        folder, metadata, tensors = path.parent, file.metadata, file.tensors
    elif os.path.lexists(path / "model.safetensors"):
        file = safetensors.read(path / "model.safetensors")
        metadata, tensors = file.metadata, file.tensors
    elif os.path.lexists(path / "model.safetensors.index.json"):
        tensors = pair_ternary(_read_shards(path / "model.safetensors.index.json"), {}, path)
    else:
        _refuse_folder(path)
    if not tensors:
        raise FormatError(f"{shown(path)}: holds no tensors; expected a model's weights")

    config, where = _find_json("config", metadata, path, folder, MAX_CONFIG_BYTES)
    if config is None:
        raise FormatError(f'{shown(path)}: has no config; expected {where}, or "config" in the metadata of the safetensors: put it there')
    generation, generation_where = _find_json("generation_config", metadata, path, folder, MAX_CONFIG_BYTES)
    tokenizer, tokenizer_where = _find_json("tokenizer", metadata, path, folder, MAX_TOKENIZER_BYTES)
    if tokenizer is not None:
        check_json_object(tokenizer, tokenizer_where)
    settings = _tokenizer_config(metadata, path, folder)
    said = json_object(config, where)
    if "quantization_config" in metadata and "config" not in metadata:  # of weights that were written without the rest
        said["quantization_config"] = json_object(
            metadata["quantization_config"].encode(), f'{shown(path)}: metadata "quantization_config"'
        )
    return Checkpoint(
        path,
        said,
        tensors,
        tokenizer,
        json_object(generation, generation_where) if generation is not None else {},
        tokenizer_config=settings,
        chat_template=_chat_template(metadata, folder),
    )


def _chat_template(metadata: Mapping[str, str], folder: Path) -> str | None:
    beside = folder / "chat_template.jinja"
    if "chat_template" in metadata or not os.path.lexists(beside):
        return metadata.get("chat_template") or None
    try:
        return read_file(beside, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{shown(beside)}: is not UTF-8 (byte {error.start}); expected a Jinja template as text") from None


def _tokenizer_config(metadata: Mapping[str, str], path: Path, folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; tokens that it does not name as special_tokens_map.json does, where older folders have them."""
    found, where = _find_json("tokenizer_config", metadata, path, folder, MAX_CONFIG_BYTES)
    settings = json_object(found, where) if found is not None else {}
    if "tokenizer_config" in metadata:
        return settings
    found, where = _find_json("special_tokens_map", metadata, path, folder, MAX_CONFIG_BYTES)
    tokens = json_object(found, where) if found is not None else {}
    return settings | {key: token for key, token in tokens.items() if settings.get(key) is None}


def _find_json(key: str, metadata: Mapping[str, str], path: Path, folder: Path, limit_bytes: int) -> tuple[bytes | None, str]:
    """(JSON text or None, where it is or should be)."""
    if key not in metadata:
        beside = folder / f"{key}.json"
        return (read_file(beside, limit_bytes) if os.path.lexists(beside) else None), shown(beside)
    raw, where = metadata[key].encode(), f'{shown(path)}: metadata "{key}"'
    if len(raw) > limit_bytes:
        raise FormatError(f"{where}: holds {len(raw):,} bytes; expected at most {limit_bytes:,}")
    return raw or None, where


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that the index names, each from the shard that it names. Shards are plain names in the index's own folder."""
    where, folder = shown(index), index.parent
    weight_map = json_object(read_file(index, MAX_CONFIG_BYTES), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > safetensors.MAX_TENSORS:
        raise FormatError(f'{where}: "weight_map" is missing, empty or too long; expected an object of tensor name -> shard name')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
            raise FormatError(f"{where}: tensor {shown(name)!r} is in shard {shown(repr(shard))}; expected a plain file name in its folder")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards[:MAX_SHARDS] if not os.path.exists(folder / shard)]
    if missing or len(shards) > MAX_SHARDS:
        absent = f"misses {len(missing)}: {', '.join(map(shown, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        raise FormatError(f"{where}: names {len(shards)} shards (at most {MAX_SHARDS}) and {absent}; download them into the same folder")

    stored: dict[str, Tensor] = {}
    files: dict[tuple[int, int], str] = {}
    for shard in shards:
        with system_errors(folder / shard, "read"):
            status = os.stat(folder / shard)
        if (other := files.setdefault((status.st_dev, status.st_ino), shard)) != shard:
            raise FormatError(f"{where}: shards {shown(other)!r} and {shown(shard)!r} are one and the same file; download them again")
        stored.update((n, t) for n, t in safetensors.read_stored(folder / shard).tensors.items() if weight_map.get(n) == shard)
    for name, shard in weight_map.items():
        if name not in stored:
            raise FormatError(f"{where}: tensor {shown(name)!r} is not in shard {shown(shard)!r} as the index says; download both again")
    return stored


def _refuse_folder(folder: Path) -> NoReturn:
    """Say what the folder holds instead, the largest file first."""
    with system_errors(folder, "read"), os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, 1000) if os.path.isfile(entry)]
        names.sort(key=lambda name: os.path.getsize(folder / name), reverse=True)
    for name in names:
        try:
            with open_regular(folder / name) as (descriptor, _):
                head = os.read(descriptor, 64)
        except BitNetError:  # an empty file, or one that may not be read
            continue
        refuse_other_formats(head, shown(folder / name))
        if head[4:9] == b"\0\0\0\0{":
            raise FormatError(f"{shown(folder)}: has no model.safetensors or index of shards, but {shown(name)}: name that file itself")
    raise FormatError(f"{shown(folder)}: holds no model; expected model.safetensors, or model.safetensors.index.json and its shards")
