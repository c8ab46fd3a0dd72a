"""A short text that comes with the package, to hear whether a model speaks: two scenes of a children's story, then two plain facts."""

from __future__ import annotations

from importlib import resources


def text() -> str:
    """Some 2,500 characters of plain English, written for this purpose."""
    return (resources.files("bitnet") / "evaluate" / "sample.txt").read_text(encoding="utf-8")
