"""How every command ends. One place turns exceptions into one line on stderr and an exit code.

0: done. 1: the input's fault, or ours. 2: bad usage. 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click

from bitnet.errors import BitNetError
from bitnet.machine import program_start

NO_MEMORY = "out of memory; use a smaller model, a shorter prompt or a smaller batch"
INTERRUPTED = 130  # 128 + SIGINT, as shells expect


class Guarded(click.Command):
    """A command that is an entry point: its `main` never shows a traceback unless --debug is given."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        if sys.stdout is None:  # closed by the caller (`>&-`): nothing to write to
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if sys.stdin is None:
            sys.stdin = open(os.devnull)  # noqa: SIM115
        words = list(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "obj": program_start()}  # `obj`: what the time to the first token counts from
        run: Callable[..., Any] = super().main
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show_warning
            sys.exit(exit_code(lambda: run(words, prog_name, **extra), debug="--debug" in words))


def exit_code(run: Callable[[], Any], *, debug: bool) -> int:
    """Runs a command and gives its exit code; what it raises is reported here."""
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        return report(error.format_message() + hint, error.exit_code, debug)
    except click.ClickException as error:
        return report(error.format_message(), error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BitNetError as error:
        return report(str(error), error.exit_code, debug)
    except BrokenPipeError:
        # The reader (`| head`) went away. What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return report(NO_MEMORY, 1, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return report(f"{where}{error.strerror or error}", 1, debug)
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate memory", "out of memory")):  # torch's
            return report(NO_MEMORY, 1, debug)
        return report(f"internal error: {type(error).__name__}: {error} (run again with --debug)", 1, debug, prefix="")


def report(message: str, code: int, debug: bool, prefix: str = "error: ") -> int:
    """Prints one line on stderr, after the traceback if `debug`; gives `code` back."""
    if debug:
        traceback.print_exc()
    click.echo(prefix + " ".join(message.split()), err=True)
    return code


def show_warning(message: Warning | str, *where: Any, **also: Any) -> None:
    """`warnings.showwarning` for the terminal: one line, no source."""
    click.echo("warning: " + " ".join(str(message).split()), err=True)
