"""The progress bar: on a terminal, after its patience, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from bitnet.cli import progress
from bitnet.cli.progress import DelayedBar


@pytest.mark.parametrize(("patience_s", "terminal", "shown"), [(0.0, True, True), (0.0, False, False), (1e9, True, False)])
def test_shown_when_it_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], patience_s: float, terminal: bool, shown: bool
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", patience_s)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with DelayedBar("reading") as bar:
        bar(1, 2)
        bar(2, 2)
        assert (bar._bar is not None) == shown
    out, err = capsys.readouterr()
    assert out == "" and ("reading" in err) == shown
