"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what is the matter with it."""

    what: str
    status: str  # OK, WARNING or FAILED
    detail: str
    advice: str = ""  # what to do, if not ok

    def line(self) -> str:
        advice = f"; {self.advice}" if self.advice and self.status != OK else ""
        return f"{self.status:<7} {self.what:<16} {self.detail}{advice}"
