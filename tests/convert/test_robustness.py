"""Killed, out of disk, aimed at its own source: the target is what it was or what it shall be, and what is left behind goes away."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import packed_models
import peft_adapters
import pytest
from packed_models import write

from bitnet.convert import convert, target
from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.files import replacing, safetensors
from bitnet.models import canonical, open_checkpoint

KILLS = 50


def content(path: Path) -> dict[str, bytes]:
    """Of a file or a folder."""
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def leftovers(folder: Path) -> list[Path]:
    return [p for p in (folder.iterdir() if folder.is_dir() else ()) if p.name.endswith(".bitnet-tmp")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return write(folder / "one", seed=1), write(folder / "two", seed=2)


def forked(action: Callable[[], object]) -> int:
    """The process id of a child that does this."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def in_process(action: str, killed: bool = False) -> str:
    """What a process of its own prints that does this; `t` is this module."""
    paths = [str(Path(__file__).parent), str(Path(packed_models.__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    script = f"import test_robustness as t; {action}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    return done.stdout


def run_kills(first: str, second: str, target_name: str, seed: int) -> None:
    """In a process of its own without threads: KILLS conversions over the target, each killed at a random moment; counts those caught.

    Half of the moments are of the whole run, half of its end, from when something lies beside the target: most of a run computes.
    """
    place, form = Path(target_name), "hf" if not target_name.endswith(".gguf") else "gguf-tq2_0"
    rng, states = random.Random(seed), []
    for source in (first, second):
        convert(source, place, format=form)
        states.append(content(place))

    def begun(source: str) -> tuple[int, float]:
        """(a child that converts, when it began to write)"""
        before = {*leftovers(place.parent)}
        child = forked(lambda: convert(source, place, format=form))
        while {*leftovers(place.parent)} <= before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            pass
        return child, time.perf_counter()

    whole_s = writing_s = float("inf")  # of the fastest of five: one that waited for other programs would put every kill after the end
    for _ in range(5):
        start = time.perf_counter()
        child, written_from = begun(second)
        os.waitpid(child, 0)
        end = time.perf_counter()
        whole_s, writing_s = min(whole_s, end - start), min(writing_s, end - written_from)
    caught = 0
    for i in range(KILLS):
        source, before = (first, second)[i // 2 % 2], {*leftovers(place.parent)}
        if i % 2:
            child, _ = begun(source)
            time.sleep(rng.random() * writing_s)
        else:
            child = forked(lambda source=source: convert(source, place, format=form))  # type: ignore[misc]
            time.sleep(rng.random() * whole_s * 1.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert content(place) in states, "neither the old nor the new"
        caught += bool({*leftovers(place.parent)} - before)
    convert(first, place, format=form)
    assert content(place) == states[0] and not leftovers(place.parent), "the next run cleans up"
    print("caught", caught)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("name", ["model.gguf", "folder"])
def test_killed_at_random_moments(tmp_path: Path, two: tuple[Path, Path], name: str) -> None:
    said = in_process(f"t.run_kills({str(two[0])!r}, {str(two[1])!r}, {str(tmp_path / name)!r}, 7)")
    assert int(said.split()[-1]) >= KILLS // 5, f"too few kills fell into the writing: {said}"


def kill_at_copy(source: str, target: str, number: int) -> None:
    """In a process of its own: a conversion that is killed when an adapter's files are copied, in the middle of this one of them."""
    copied = 0

    def copy(found: BinaryIO, file: BinaryIO, length: int = 0) -> None:
        nonlocal copied
        copied += 1
        content = found.read()
        file.write(content if copied < number else content[: len(content) // 2])
        file.flush()
        if copied == number:
            os.kill(os.getpid(), signal.SIGKILL)

    shutil.copyfileobj = copy  # type: ignore[assignment]
    convert(source, target, format="gguf-i2_s" if target.endswith(".gguf") else None)


@pytest.mark.parametrize(("name", "number"), [("m.gguf", 1), ("m.bin", 2), ("m.bin", 3), ("m.bin", 5), ("folder", 2)])
def test_killed_while_adapters_are_copied(tmp_path: Path, two: tuple[Path, Path], name: str, number: int) -> None:
    """An adapter's folder beside a file is there whole or not at all: no next run is stopped, and each removes what was left."""
    source, place = Path(shutil.copytree(two[0], tmp_path / "source")), tmp_path / "place"
    for adapter in ("adapters/one", "style"):
        written = peft_adapters.write(
            source / adapter, peft_adapters.config_of(4), peft_adapters.matrices(canonical(open_checkpoint(source)).config, 4)
        )
        (written / "README.md").write_text("card")
    for last in (two[1], source):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        in_process(f"t.kill_at_copy({str(source)!r}, {str(place / name)!r}, {number})", killed=True)
        assert not (place / name).exists() and {*leftovers(place), *leftovers(place / "adapters")}
        whole = [path for path in (place / "adapters" / "one", place / "style") if path.exists()]
        assert all(len(content(path)) == 3 for path in whole) and len(whole) == (number - 1) // 3 * (name != "folder")
        convert(last, place / name, format="gguf-i2_s" if name == "m.gguf" else None)
        assert not leftovers(place) and not leftovers(place / "adapters") and (place / name).exists()
    root = place / name if name == "folder" else place
    assert all(len(content(root / adapter)) == 3 for adapter in ("adapters/one", "style"))


def test_a_user_s_files_are_no_leftovers(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """Names alone condemn nothing: other content, a link, a live writer."""
    mine = tmp_path / ".m.gguf.0123456789ab.bitnet-tmp"
    mine.mkdir()
    (mine / "name").write_bytes(b"m.gguf")
    (mine / "notes.txt").write_text("mine")
    (tmp_path / ".m.gguf.0123456789ac.bitnet-tmp").write_text("a file")
    (tmp_path / ".m.gguf.0123456789ad.bitnet-tmp").symlink_to(mine)
    (tmp_path / ".m.gguf.old.bitnet-tmp").mkdir()
    with replacing.new_file(tmp_path / "live") as file:
        file.write(b"x")
        before = sorted(tmp_path.iterdir())
        convert(two[0], tmp_path / "m.gguf")
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "m.gguf"])
    assert (tmp_path / "live").read_bytes() == b"x" and len(leftovers(tmp_path)) == 4


def test_a_dead_writer_s_folder_goes_and_what_stepped_aside_comes_back(tmp_path: Path, two: tuple[Path, Path]) -> None:
    dead = tmp_path / ".model.0123456789ab.bitnet-tmp"
    (dead / "new").mkdir(parents=True)
    (dead / "old").mkdir()
    (dead / "old" / "config.json").write_text("{}")
    (dead / "name").write_bytes(b"model")
    convert(two[0], tmp_path / "other.gguf")
    assert not dead.exists() and (tmp_path / "model" / "config.json").read_text() == "{}"


def test_folders_without_the_exchange(tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    convert(two[0], tmp_path / "out")
    first = content(tmp_path / "out")
    monkeypatch.setattr(replacing, "_exchange", lambda one, other: False)
    convert(two[1], tmp_path / "out")
    assert content(tmp_path / "out") != first and not leftovers(tmp_path)


def test_permissions_of_what_is_replaced_stay(tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's, a folder's, and those of the files in it; what is new follows the umask. Meanwhile the new one is its owner's alone."""
    seen, real = list[int](), os.replace

    def watched(old: str, new: str) -> None:
        seen.append(Path(old).parent.stat().st_mode & 0o777)
        real(old, new)

    def modes() -> list[int]:
        return [path.stat().st_mode & 0o7777 for path in (one, folder, folder / "config.json", folder / "model.safetensors")]

    one, folder = tmp_path / "m.gguf", tmp_path / "folder"
    for place in (one, folder):
        convert(two[0], place)
    umask = os.umask(0)
    os.umask(umask)
    assert modes() == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask, 0o666 & ~umask]
    for file, inside, directory in ((0o600, 0o640, 0o700), (0o664, 0o666, 0o2775)):
        for path, mode in ((one, file), (folder / "model.safetensors", inside), (folder, directory)):
            path.chmod(mode)
        monkeypatch.setattr(os, "replace", watched)
        for place in (one, folder):
            convert(two[1], place)
        assert modes() == [file, directory, 0o666 & ~umask, inside] and set(seen) == {0o700}


@pytest.mark.parametrize("name", ["m.gguf", "folder"])
def test_a_full_disk_seen_beforehand(tmp_path: Path, two: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(two[0], tmp_path / name)
    before = content(tmp_path / name)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    with pytest.raises(BitNetError, match=rf"{name}: needs [\d,]+ bytes of disk, 1,000 are free; free some"):
        convert(two[1], tmp_path / name)
    assert content(tmp_path / name) == before and not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["m.gguf", "folder"])
def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, two: tuple[Path, Path], name: str) -> None:
    """The system itself refuses a file of more than 100,000 bytes, as it refuses a full disk's."""
    convert(two[0], tmp_path / name)
    before = content(tmp_path / name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BitNetError, match=rf"{name}: cannot be written \(File too large\)"):
            convert(two[1], tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path / name) == before and not leftovers(tmp_path)


def test_no_space_left(tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("m.gguf", "folder"):
        with pytest.raises(BitNetError, match=rf"{name}: cannot be written \(No space left on device\)"):
            convert(two[0], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, mode: int = 0o777) -> None:
        raise PermissionError(13, "Permission denied")

    place = tmp_path / "closed"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o500)
    else:  # root may write everywhere
        monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(BitNetError, match=r"m.gguf: cannot be written \(Permission denied\); check the path, its permissions"):
        convert(two[0], place / "m.gguf")
    place.chmod(0o700)
    assert list(place.iterdir()) == []


def test_targets_that_are_the_source(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    convert(source, tmp_path / "m.gguf")
    before = content(source), content(tmp_path / "m.gguf")
    os.link(tmp_path / "m.gguf", tmp_path / "hard.gguf")
    (tmp_path / "soft.gguf").symlink_to("m.gguf")
    (tmp_path / "soft").symlink_to("source")
    os.link(source / "model.safetensors", tmp_path / "hard.safetensors")
    itself = "is the source itself, by this name or by a link to it"
    cases = [
        (tmp_path / "m.gguf", tmp_path / "m.gguf", itself),
        (tmp_path / "m.gguf", tmp_path / "hard.gguf", itself),
        (tmp_path / "hard.gguf", tmp_path / "m.gguf", itself),
        (tmp_path / "m.gguf", tmp_path / "soft.gguf", "is a symbolic link to m.gguf; name the file itself"),
        (source, source, itself),
        (source, source / "model.safetensors", itself),
        (source, tmp_path / "hard.safetensors", itself),
        (source, tmp_path / "soft", "is a symbolic link to source"),
        (source / "model.safetensors", source, "holds the source, and would be replaced|is the source itself"),
        (source, tmp_path / "none" / "m.gguf", "there is no folder .*none; make it first"),
        (source, tmp_path / "dangling.gguf", "is a symbolic link to nowhere"),
    ]
    (tmp_path / "dangling.gguf").symlink_to("nowhere")
    names = sorted(tmp_path.iterdir())
    for start, end, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(start, end)
    assert (content(source), content(tmp_path / "m.gguf")) == before and sorted(tmp_path.iterdir()) == names
    whole = (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(safetensors.read(whole).tensors, whole.name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, source / "packed.safetensors")  # but not by the name that a model's weights have
    with pytest.raises(UsageError, match="would become a part of the source, which then is another model; name another target"):
        convert(source, source / "model.safetensors")


def test_files_that_are_no_models_are_not_replaced(tmp_path: Path) -> None:
    """A file of the source, an adapter beside it, a text that was named as an input: whatever it is, it stays."""
    source = write(tmp_path / "source")
    config = canonical(open_checkpoint(source)).config
    peft_adapters.write(source / "style", peft_adapters.config_of(4), peft_adapters.matrices(config, 4))
    convert(source, tmp_path / "m.gguf", format="gguf-i2_s")
    shutil.copy(source / "tokenizer.json", tmp_path / "other.json")
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "pickle.bin").write_bytes(b"PK\x03\x04 and more")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    targets = ["source/config.json", "source/tokenizer.json", "source/style/adapter_model.safetensors", "source/style/adapter_config.json"]
    targets += ["m-style-LoRA.gguf", "other.json", "text.txt", "pickle.bin"]
    for name in targets:
        for form in ("safetensors", "gguf-i2_s"):
            with pytest.raises(UsageError, match=rf"{Path(name).name}: is no model \(GGUF or safetensors\) that a new one may replace"):
                convert(source, tmp_path / name, format=form, tokenizer_json=tmp_path / "other.json")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").touch()  # as mktemp leaves it
    convert(source, tmp_path / "empty", format="safetensors")
    convert(source, tmp_path / "empty", format="gguf-i2_s")  # and any model may take the place of any other
    assert (tmp_path / "empty").read_bytes()[:4] == b"GGUF"


def test_a_folder_that_holds_what_the_source_links_to(tmp_path: Path) -> None:
    """As the Hub's cache has it: the target would be replaced, and the weights in it lost."""
    blobs, source = write(tmp_path / "blobs"), tmp_path / "source"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    before = content(blobs)
    with pytest.raises(UsageError, match="blobs: holds the source, and would be replaced"):
        convert(source, blobs)
    assert content(blobs) == before


def test_folders_of_other_things(tmp_path: Path, two: tuple[Path, Path]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "deep" / "inner").mkdir(parents=True)
    (tmp_path / "deep" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    cases = [
        ("photos", None, r"is a folder of other things \(no config.json, but cat.png\)"),
        ("deep", None, "holds inner, a folder or a link"),
    ]
    cases += [("file", "hf", "is a file, and hf is a folder"), ("photos", "gguf-tq2_0", "is a folder, and gguf-tq2_0 is one file")]
    for name, form, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(two[0], tmp_path / name, format=form)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat" and not leftovers(tmp_path)


def test_other_files_of_a_model_s_folder_stay(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """Its README stays, shards and a template of the old model go."""
    (tmp_path / "empty").mkdir()
    convert(two[0], tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_text("card")
    (tmp_path / "empty" / "model-00001-of-00002.safetensors").write_text("old")
    shutil.copytree(two[1], tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").unlink()
    convert(tmp_path / "source", tmp_path / "empty")
    assert sorted(content(tmp_path / "empty")) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "empty" / "README.md").read_text() == "card"


def test_a_damaged_source_leaves_nothing(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """A code that stands for nothing is found while writing, and ends it."""
    source = tmp_path / "source"
    shutil.copytree(two[0], source)
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-1] = 0xFF
    (source / "model.safetensors").write_bytes(raw)
    for name in ("m.gguf", "folder"):
        with pytest.raises(FormatError, match="holds a code of 3"):
            convert(source, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert np.uint8(raw[-1]) == 255
