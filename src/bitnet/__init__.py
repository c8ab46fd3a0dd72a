"""Ternary language models: weights in {-1, 0, +1}. The public names; importing this imports nothing else, and never torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitnet.errors import BitNetError

if TYPE_CHECKING:
    from bitnet.ternary import ternarize
    from bitnet.transformer import TernaryTransformer

__version__ = "0.1.0"
__all__ = ["BitNetError", "TernaryTransformer", "__version__", "ternarize"]

_LAZY = {"TernaryTransformer": "bitnet.transformer", "ternarize": "bitnet.ternary"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}")
    import importlib

    from bitnet.machine import require_numpy

    require_numpy()
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
