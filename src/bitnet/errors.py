"""What can go wrong for a user. Every message is one line: what was found, where, what was expected, what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BitNetError(Exception):
    """Any error that is the input's, not ours. The command line prints `str(e)` and exits with `exit_code`."""

    exit_code = 1


class FormatError(BitNetError):
    """A file's bytes are not what its format says."""


class UnsupportedModelError(BitNetError):
    """A well-formed model that this build cannot run exactly, and therefore does not run."""


class UsageError(BitNetError):
    """An argument out of its range."""

    exit_code = 2


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is said within of an argument begins with `where` it came from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
