"""What was written, read back through the readers and compared: every trit, every scale, every other number, the configuration, the
tokenizer, the chat template, and the ids that end a text.

A tokenizer is proved before it is written (tokenizer.py), so that here its parts need only be those that were proved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bitnet.chat import find_template
from bitnet.convert.source import F32, Model, Weight, read
from bitnet.convert.tokenizer import ends_of
from bitnet.errors import BitNetError, FormatError
from bitnet.models import Checkpoint, ModelConfig, open_checkpoint
from bitnet.models.rope import Rope

Progress = Callable[[str, int, int], None]  # (what is done, values or bytes so far, of how many)
_AS_STORED = ("norm_offset", "rope_interleaved")  # of ModelConfig: how a format keeps weights, not what the model is
_ROPES = ("rope", "rope_local")


class NotTheSameError(BitNetError):
    """What was written is not what was to be written: a bug here, or a disk that lies."""


def verify(
    path: Path, model: Model, weights: Mapping[str, Weight], progress: Progress, texts: Mapping[str, Any] | None = None,
    copied: Mapping[str, bytes] = MappingProxyType({}),
) -> None:  # fmt: skip
    """That the file or folder holds these weights of this model, and these texts beside them. Raises NotTheSameError.

    texts: the keys of GGUF's tokenizer, else the JSON texts and the template by name; copied: files of the folder.
    """
    for name, content in copied.items():
        if (path / name).read_bytes() != content:
            raise NotTheSameError(f"{path / name}: differs from what was to be written")
    found = read(open_checkpoint(path))
    if different := differences(model.config, found.config):
        raise NotTheSameError(f"{path}: would be read as another model ({'; '.join(different)}); choose another format")
    if texts is not None:
        _compare_texts(path, model, found.checkpoint, texts)
    total, done = sum(prod(weight.shape) for weight in weights.values()), 0
    for name, weight in weights.items():
        _compare(weight, found.weights[name])
        done += prod(weight.shape)
        progress("verifying", done, total)


def _compare_texts(path: Path, model: Model, found: Checkpoint, texts: Mapping[str, Any]) -> None:
    source, size = model.checkpoint, model.config.vocab_size
    for key, text in texts.items():
        if found.layout == "gguf":
            one, other = (value.tolist() if isinstance(value, np.ndarray) else value for value in (text, found.gguf_metadata.get(key)))
        elif key in ("tokenizer", "chat_template"):
            one, other = (text.encode(), found.tokenizer_json) if key == "tokenizer" else (text, found.chat_template)
        else:
            one, other = json.loads(text), getattr(found, key)
        if one != other:
            raise NotTheSameError(f"{path}: {key} differs from what was to be written")
    templates = (find_template(c.tokenizer_config, c.chat_template, c.gguf_metadata) for c in (found, source))
    if next(templates) != next(templates):
        raise NotTheSameError(f"{path}: has another chat template than the source")
    without = texts.get("tokenizer.ggml.model") == "no_vocab" or (found.layout != "gguf" and "tokenizer" not in texts)
    if found.layout != source.layout and not without and (lost := set(ends_of(source, size)) - set(ends_of(found, size))):
        raise NotTheSameError(f"{path}: the ids {sorted(lost)} end a text of the source, and none here")


def _compare(expected: Weight, found: Weight) -> None:
    coded = expected.codes is not None and found.codes is not None
    if coded:
        assert expected.scales is not None and found.scales is not None
        one, other = _expanded(expected.scales, found.scales), _expanded(found.scales, expected.scales)
        if not np.array_equal(one, other):
            raise NotTheSameError(f"{found.where}: scales differ from those of the source ({np.sum(one != other):,} of {one.size:,})")
    for first, last in expected.spans():
        if coded:
            assert expected.codes is not None and found.codes is not None
            same = np.array_equal(expected.codes(first, last), found.codes(first, last))
        else:
            a, b = expected.values(first, last), found.values(first, last)
            refuse_not_finite(expected, a)
            same = (
                np.array_equal(a + np.float32(expected.offset), b + np.float32(found.offset))
                if expected.offset or found.offset
                else np.array_equal(a, b)
            )
        if not same:
            raise NotTheSameError(f"{found.where}: differs from the source between rows {first} and {last}")


def refuse_not_finite(weight: Weight, values: F32) -> None:
    """Raises FormatError where the source's values are no numbers to compute with."""
    if not np.isfinite(values).all():
        raise FormatError(f"{weight.where}: holds NaN or infinity; the file is damaged or training diverged")


def _expanded(scales: F32, other: F32) -> F32:
    """Scales, repeated so that they have as many rows and groups as the finer of the two."""
    rows, groups = max(len(scales), len(other)), max(scales.shape[1], other.shape[1])
    return np.repeat(np.broadcast_to(scales, (rows, scales.shape[1])), groups // scales.shape[1], axis=1)


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two models differ; numbers that a file keeps in float32 are compared as such."""
    found = []
    for name in (field.name for field in fields(ModelConfig) if field.name not in _AS_STORED):
        a, b = getattr(one, name), getattr(other, name)
        if name in _ROPES:
            same = _same_rope(a, b, one.head_dim)
        elif name == "windowed":
            same = a == b or not (any(a) or any(b)) or min(one.sliding_window, other.sliding_window) >= one.max_context
        elif name == "sliding_window":
            same = a == b or not any(one.windowed) or min(a, b) >= one.max_context or not (any(one.windowed) or any(other.windowed))
        else:
            same = bool(np.isclose(a, b, rtol=1e-6, atol=0)) if isinstance(a, float) else a == b
        if not same:
            found.append(f"{name} {b} instead of {a}")
    return found


def _same_rope(one: Rope | None, other: Rope | None, head_dim: int) -> bool:
    if one is None or other is None:
        return one is other
    reach = 4 * max(one.original_context, other.original_context)  # where dynamic scaling shows
    close = all(
        np.allclose(replace(one, reach=to).frequencies(head_dim), replace(other, reach=to).frequencies(head_dim), rtol=1e-5, atol=0)
        for to in (0, reach)
    )
    return bool(close and np.isclose(one.attention_factor, other.attention_factor, rtol=1e-6))
