"""A short text that comes with the package, to hear whether a model speaks: two scenes of a children's story, then two plain facts."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet.engine import Engine
    from bitnet.tokenizer import Tokenizer


def text() -> str:
    """Some 2,500 characters of plain English, written for this purpose."""
    return (resources.files("bitnet") / "sample.txt").read_text(encoding="utf-8")


def center_keys(engine: Engine, tokenizer: Tokenizer) -> None:
    """`Engine.center_keys` by this text, as far as the context holds it and the vocabulary has it."""
    ids = tokenizer.encode(text())[: engine.config.max_context]
    if ids:
        engine.center_keys(ids)
