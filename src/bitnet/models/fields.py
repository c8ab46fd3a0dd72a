"""The values of a config.json, checked as they are read: no number is believed because of its name."""

from __future__ import annotations

import math
from typing import Any

from bitnet.errors import FormatError
from bitnet.files import shown

LARGEST = {
    "num_hidden_layers": 1024,
    "vocab_size": 1 << 22,
    "hidden_size": 65536,
    "intermediate_size": 65536,
    "max_position_embeddings": 1 << 24,
    "original_max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}


def integer(hf: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive integer of config.json, not above what any model has."""
    value = hf.get(key)
    if value is None:
        value = default
    largest = LARGEST.get(key, 65536)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise FormatError(f"{where}: {key} is {shown(repr(value))}; expected an integer from 1 to {largest}")
    return value


def number(hf: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive finite number of config.json."""
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 < value < 1e30:
        raise FormatError(f"{where}: {key} is {shown(repr(value))}; expected a number above 0 and below 1e30")
    return float(value)
