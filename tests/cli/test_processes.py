"""What only a real process shows: Ctrl-C at a terminal, a reader that goes away, `python -m bitnet`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LONG = ["-n", "60000", "--seed", "1", "--threads", "1"]  # of a context of 65,536: minutes, if nothing stops it


def default_interrupt() -> None:
    """Ctrl-C as a terminal's foreground process has it; a test run in the background inherits it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


TIMEOUT_S = 120  # for a hang; nothing here waits for it


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_ctrl_c_at_a_terminal(model_folder: Path, process_environment: dict[str, str]) -> None:
    import termios

    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "bitnet", "run", str(model_folder), "-p", "Once upon a time", *LONG]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=process_environment,
        start_new_session=True,
        preexec_fn=default_interrupt,
    )
    shown = b""
    while len(shown) < 200:
        shown += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    os.set_blocking(ours, False)
    end = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < end:  # the terminal's buffer must not fill while we wait
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 65536)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    with contextlib.suppress(OSError):  # nothing more, or the other end is closed
        while more := os.read(ours, 65536):
            shown += more
    assert process.returncode == 130
    assert b"Once upon a time" in shown and shown.endswith(b"\n")
    text = errors.decode()
    assert text.startswith("prompt: 17 tokens, ") and "Traceback" not in text and text.count("\n") == 3
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_ctrl_c_with_json_gives_what_there_is(model_folder: Path, process_environment: dict[str, str]) -> None:
    # Nothing is on stdout before the end, so a marker on stderr tells that the decoding has begun.
    code = (
        "import sys; from bitnet.generation import GenerationStream as G; old = G.__next__\n"
        "def new(self):\n    piece = old(self); print('!', file=sys.stderr, flush=True); return piece\n"
        "G.__next__ = new; from bitnet.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "run", str(model_folder), "-p", "Once", "--json", *LONG]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_environment, preexec_fn=default_interrupt
    )
    assert process.stderr is not None
    for _ in range(20):
        assert process.stderr.readline() == b"!\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, errors
    found = json.loads(out)
    assert found["finish_reason"] is None and 20 <= found["generated_tokens"] < 60000


def test_a_reader_that_goes_away_is_no_error_message(model_folder: Path, process_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "bitnet", "run", str(model_folder), "-p", "Once", *LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(TIMEOUT_S) == 1
    assert errors == b""


def test_help_imports_nothing_heavy(process_environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom bitnet.cli import cli\ntry: cli(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'rich', 'torch', 'tokenizers', 'bitnet._native') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=process_environment, timeout=TIMEOUT_S)
    assert done.stdout.startswith("Usage: ") and done.stdout.endswith("[]\n")


def test_an_ascii_stdout_shows_what_it_can(model_folder: Path, process_environment: dict[str, str]) -> None:
    environment = {**process_environment, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "bitnet", "run", str(model_folder), "-p", "caf\u00e9", "-n", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 0 and done.stdout.startswith(b"caf?"), done.stderr


def test_time_to_first_token_does_not_count_what_the_shell_did_before(model_folder: Path) -> None:
    """A shell becomes its last command: the process is then older than the program."""
    line = f"sleep 3 && exec {sys.executable} -m bitnet run {model_folder} -p hello -n 2 --json"
    start = time.perf_counter()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    whole_s = time.perf_counter() - start
    assert json.loads(done.stdout.splitlines()[-1])["time_to_first_token_s"] <= whole_s - 3


def test_stderr_and_stdin_may_be_closed(model_folder: Path, tmp_path: Path, process_environment: dict[str, str]) -> None:
    """Also where a progress bar would begin."""
    (tmp_path / "a.txt").write_text("Once upon a time there was a cat.")
    program = "from bitnet.cli import main, progress; progress.PATIENCE_S = 0; main()"
    words = ["eval", str(model_folder), "--data", str(tmp_path / "a.txt"), "--threads", "1"]
    line = f'exec "{sys.executable}" -c "{program}" "$@" <&- 2>&-'
    done = subprocess.run(["sh", "-c", line, "sh", *words], env=process_environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "bits per byte" in done.stdout
