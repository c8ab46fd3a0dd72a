"""run, eval, inspect, list and rm on a model from a hub on this machine, each a process of its own with its own HF_HOME."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Repo

from bitnet.source import EMBEDDED_MODEL, resolve

TIMEOUT_S = 120  # for a hang; nothing here waits for it
NAME = "fake/tiny"
RUN = ["run", NAME, "-p", "Once upon a time", "-n", "8", "--temperature", "0"]
NEEDED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]

Bitnet = Callable[..., subprocess.CompletedProcess[str]]


def default_interrupt() -> None:
    """Ctrl-C as a terminal's foreground process has it; a test run in the background inherits it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def repo() -> Repo:
    """The embedded model, between things that are not needed."""
    files = {path.name: path.read_bytes() for path in resolve(EMBEDDED_MODEL).iterdir()}
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "modeling_evil.Model"}}
    evil = {"modeling_evil.py": b"raise SystemExit('remote code')", "pytorch_model.bin": b"\x80\x04."}
    return Repo({**files, **evil, "config.json": json.dumps(config).encode()}, licence="mit")


@pytest.fixture
def hub(repo: Repo) -> Iterator[FakeHub]:
    with FakeHub({NAME: repo}) as served:
        yield served


@pytest.fixture
def environment(hub: FakeHub, process_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    ours = {name: value for name, value in process_environment.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def bitnet(environment: dict[str, str]) -> Bitnet:
    """Runs `bitnet ARGS` in a process, with changes to its environment."""

    def run(*args: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bitnet", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment | changes, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )

    return run


def test_run_downloads_once_and_gives_the_same_text(hub: FakeHub, bitnet: Bitnet) -> None:
    local = bitnet("run", EMBEDDED_MODEL, *RUN[2:])
    first = bitnet(*RUN)
    assert first.returncode == 0 and first.stdout == local.stdout, first.stderr
    assert hub.downloads() == NEEDED
    lines = first.stderr.splitlines()
    assert lines[0] == f"{NAME}@main (commit {COMMIT[:12]}), licence: mit"
    assert [line.split()[0] for line in lines[1:]] == ["download", "disk", "memory", "prompt:", "first", "zero"]

    again = bitnet(*RUN, "--json")
    assert hub.downloads() == NEEDED and again.stderr.startswith("prompt: ")
    assert json.loads(again.stdout.splitlines()[-1])["model"] == NAME

    offline = bitnet(*RUN, HF_HUB_OFFLINE="1")
    assert offline.stdout == local.stdout and offline.stderr.startswith("prompt: ")
    away = bitnet(*RUN, HF_ENDPOINT="http://127.0.0.1:9")
    assert away.stdout == local.stdout and away.stderr.startswith("notice: http://127.0.0.1:9 cannot be reached")
    assert [line.split()[0] for line in away.stderr.splitlines()] == ["notice:", "prompt:", "first", "zero"]


def test_eval_inspect_and_revision(hub: FakeHub, repo: Repo, bitnet: Bitnet, tmp_path: Path) -> None:
    repo.revisions["v2"] = "b" * 40
    (tmp_path / "text").write_text("Once upon a time there was a fox.")
    done = bitnet("eval", NAME, "--revision", "v2", "--data", tmp_path / "text", "--json")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["results"][0]["model"] == NAME, done.stderr
    done = bitnet("inspect", NAME, "--revision", "v2", "--json")
    assert done.returncode == 0 and "b" * 40 in json.loads(done.stdout.splitlines()[-1])["path"]
    assert hub.downloads() == NEEDED


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["fake/other"], 1, "has no model fake/other, or it is private; check the name"),
        ([NAME, "--revision", "v9"], 1, "fake/tiny has no revision 'v9'"),
        ([NAME, "--revision", "../x"], 2, "revision '../x' is no name of a branch"),
        ([NAME, "--file", "a.gguf"], 2, "fake/tiny@main has no file a.gguf; it has: model.safetensors (4.5 MB)"),
        ([NAME, "--file", "pytorch_model.bin"], 1, "is a Python pickle, and to load one can run any code"),
        ([EMBEDDED_MODEL, "--revision", "main"], 2, "revision and file choose within a model of the Hub"),
        (["fake/gated"], 1, "fake/gated is gated; accept its licence on its page"),
    ],
)
def test_refusals_are_one_line(hub: FakeHub, bitnet: Bitnet, args: list[str], code: int, message: str) -> None:
    hub.repos["fake/gated"] = Repo({}, gated=True)
    done = bitnet("run", *args, "-p", "x")
    assert done.returncode == code and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and done.stdout == "" and hub.downloads() == []


def test_the_environment_is_huggingface_hubs(hub: FakeHub, repo: Repo, bitnet: Bitnet, tmp_path: Path) -> None:
    repo.token = "secret"
    assert "set HF_TOKEN" in bitnet(*RUN).stderr
    assert bitnet(*RUN, HF_TOKEN="secret", HF_HUB_CACHE=str(tmp_path / "elsewhere")).returncode == 0
    assert (tmp_path / "elsewhere" / "models--fake--tiny" / "refs" / "main").read_text() == COMMIT
    missing = bitnet(*RUN, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1 and "HF_HUB_OFFLINE is set, and fake/tiny@main is not in the cache" in missing.stderr
    broken = bitnet(*RUN, HF_ENDPOINT="http://[::1")
    assert broken.stderr.startswith("error: ") and broken.stderr.count("\n") == 1 and "check the " in broken.stderr


def test_ctrl_c_and_again(hub: FakeHub, repo: Repo, environment: dict[str, str], bitnet: Bitnet) -> None:
    repo.delay_s = 0.2  # 64 KB each: 10 s for the weights
    command = [sys.executable, "-m", "bitnet", *RUN]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=default_interrupt)
    blobs, end = Path(environment["HF_HOME"]) / "hub" / "models--fake--tiny" / "blobs", time.monotonic() + TIMEOUT_S
    while not any(part.stat().st_size > 200_000 for part in blobs.glob("*.incomplete")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130 and said.endswith("the same command goes on from there\n\n") and "Traceback" not in said
    (part,) = blobs.glob("*.incomplete")
    kept = part.stat().st_size
    assert kept > 200_000
    repo.delay_s = 0.0
    hub.log.clear()
    done = bitnet(*RUN)
    assert done.returncode == 0 and hub.ranges("model.safetensors") == [f"bytes={kept}-"] and hub.downloads() == ["model.safetensors"]


def test_progress_where_it_takes_long(repo: Repo, bitnet: Bitnet) -> None:
    repo.delay_s = 0.06  # for each of 69 blocks and 5 files: over 3 s
    done = bitnet(*RUN)
    tenths = [line for line in done.stderr.splitlines() if line.startswith(f"  {NAME}: ") and " MB of 4.6 MB after " in line]
    assert done.returncode == 0 and 1 <= len(tenths) <= 10, done.stderr


def test_list_and_rm(bitnet: Bitnet, environment: dict[str, str]) -> None:
    done = bitnet("list", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert [model["name"] for model in found["embedded"]] == [EMBEDDED_MODEL] and found["cached"] == []
    assert found["cache"] == str(Path(environment["HF_HOME"]) / "hub")
    assert bitnet(*RUN).returncode == 0
    other = Path(environment["HF_HOME"]) / "hub" / "models--some--pickle" / "snapshots" / "abc"
    other.mkdir(parents=True)
    (other / "pytorch_model.bin").write_bytes(b"\x80\x04.")

    done = bitnet("list", "--json")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[:-1]}
    assert f"main = {COMMIT[:8]}" in rows[NAME] and "just now  ready" in rows[NAME] and "a Python pickle" in rows["some/pickle"]
    tiny = json.loads(done.stdout.splitlines()[-1])["cached"][0]
    assert tiny["name"] == NAME and tiny["revisions"] == ["main"] and tiny["commit"] == COMMIT and tiny["state"] == "ready"

    done = bitnet("rm", "fake/other")
    assert done.returncode == 2 and done.stderr.endswith("it holds: fake/tiny, some/pickle\n")
    nameless = Path(environment["HF_HOME"]) / "hub" / "models--gpt2" / "snapshots" / "abc"
    nameless.mkdir(parents=True)
    (nameless / "model.safetensors").write_bytes(b"1234")
    assert "not org/name" in next(line for line in bitnet("list").stdout.splitlines() if line.startswith("gpt2"))
    done = bitnet("rm", "gpt2", "--yes")
    assert done.returncode == 0 and not nameless.exists() and bitnet("rm", "gpt2", "--yes").returncode == 2
    done = bitnet("rm", NAME, "--revision", "v9", "--yes")
    assert done.returncode == 2 and "no revision 'v9' of fake/tiny in the cache; it holds: main = 0123456789ab" in done.stderr
    done = bitnet("rm", NAME, "--yes", "--json")
    assert done.returncode == 0 and done.stdout.startswith(f"removed {NAME}: {tiny['size']:,} bytes freed\n")
    assert json.loads(done.stdout.splitlines()[-1]) == {"removed": NAME, "freed_bytes": tiny["size"]}
    assert [path.name for path in (Path(environment["HF_HOME"]) / "hub").glob("models--*")] == ["models--some--pickle"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
@pytest.mark.parametrize(("answer", "code", "left"), [(b"n\n", 1, True), (b"y\n", 0, False)])
def test_rm_asks_at_a_terminal(bitnet: Bitnet, environment: dict[str, str], answer: bytes, code: int, left: bool) -> None:
    folder = Path(environment["HF_HOME"]) / "hub" / "models--fake--tiny"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_bytes(b"{}")
    ours, theirs = os.openpty()
    os.write(ours, answer)
    done = subprocess.run(
        [sys.executable, "-m", "bitnet", "rm", NAME], env=environment, stdin=theirs, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code and folder.exists() == left, done.stderr
    assert "Remove fake/tiny and free 2 bytes? [y/N]" in done.stderr
    assert ("nothing was removed" in done.stderr) == left and ("removed fake/tiny: 2 bytes freed" in done.stdout) != left
    shutil.rmtree(folder, ignore_errors=True)


def test_only_names_from_the_hub_import_its_library(environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom bitnet.cli import cli\n"
        "try: cli(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in ('huggingface_hub', 'httpx', 'httpx2') if m in sys.modules])"
    )
    for args in (["--help"], ["run", EMBEDDED_MODEL, "-p", "Once", "-n", "2"], ["inspect"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
        assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_without_a_home_folder_the_cache_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet.hub.cached import _scan

    def none(*_: object, **__: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("huggingface_hub.scan_cache_dir", none)
    assert _scan() is None
