"""A progress bar on stderr, with the time left, for what takes longer than two seconds; rich is imported only then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PATIENCE_S = 2.0


class DelayedBar:
    """`with DelayedBar("eval") as bar: bar(done, total)`. Shows nothing within two seconds, nor where stderr is no terminal.

    `in_bytes`: what is counted are bytes, shown as such, with their rate.
    """

    def __init__(self, title: str, in_bytes: bool = False):
        self._title, self._in_bytes = title, in_bytes
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> DelayedBar:
        return self

    def __call__(self, done: float, total: float) -> None:
        if self._bar is None:
            if time.monotonic() - self._start < PATIENCE_S or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            size = [DownloadColumn(), TransferSpeedColumn()] if self._in_bytes else [TextColumn("{task.percentage:>3.0f}%")]
            columns = [TextColumn("{task.description}"), BarColumn(), *size, TimeRemainingColumn()]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
