"""Models by name, against a hub on this machine: what is chosen, shown, resumed, checked, refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, Repo, blob_id
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from hypothesis import given
from hypothesis import strategies as st

from bitnet import hub as hub_module
from bitnet import machine
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.hub import HubError, fetch, is_hub_name, transfer
from bitnet.hub.cached import cached_models, removal
from bitnet.hub.needs import choose, is_plain, plain
from bitnet.source import embedded_models, resolve

WEIGHTS = os.urandom(300_000)
NAME = "fake/tiny"
SMALL = {"config.json": b'{"model_type": "bitnet"}', "tokenizer.json": b"{}"}
OTHER_COMMIT = "fedcba98" * 5


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub and an empty cache; huggingface_hub, which reads the environment as it is imported, looks at both."""
    with FakeHub() as served:
        point_at(served.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=lambda s: None, monotonic=lambda: 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield served


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def serve(hub: FakeHub, files: dict[str, bytes] | None = None, **faults: Any) -> Repo:
    hub.repos[NAME] = Repo({**SMALL, "model.safetensors": WEIGHTS} if files is None else files, **faults)
    return hub.repos[NAME]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# What is downloaded


def test_only_what_is_needed_into_the_standard_cache(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    others = {
        "README.md": b"#",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04",
        "original/model.safetensors": b"x",
    }
    serve(hub, {**others, **SMALL, "chat_template.jinja": b"{{ x }}", "model.safetensors": WEIGHTS}, licence="apache-2.0")
    folder = fetch(NAME)
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert files_below(folder) == wanted == set(hub.downloads()) and hub.downloads()[-1] == "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert os.readlink(folder / "model.safetensors") == f"../../blobs/{blob_id('model.safetensors', WEIGHTS)}"
    cache = hub_module.cache_folder()
    assert try_to_load_from_cache(NAME, "config.json", cache) == str(folder / "config.json")
    scan = scan_cache_dir(cache)
    (repo,) = scan.repos
    assert repo.repo_id == NAME and not scan.warnings and repo.refs["main"].commit_hash == COMMIT
    said = capsys.readouterr().err
    assert f"{NAME}@main (commit {COMMIT[:12]}), licence: apache-2.0" in said
    assert "download  300.0 KB of 300.0 KB (4 files), 0 bytes are cached" in said
    assert "disk" in said and "memory    about 300.0 KB for the weights, " in said

    hub.log.clear()
    assert fetch(NAME) == folder and hub.downloads() == []
    assert capsys.readouterr().err == ""


def test_shards_are_those_that_the_index_names(hub: FakeHub) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    shards = {name: name.encode() * 100 for name in set(weight_map.values())}
    files = {**SMALL, "model.safetensors.index.json": index, **shards, "model-00003-of-00002.safetensors": b"not named"}
    serve(hub, files)
    assert files_below(fetch(NAME)) == {*SMALL, "model.safetensors.index.json", *shards}
    assert sorted(hub.downloads()) == sorted({*SMALL, "model.safetensors.index.json", *shards})  # each once

    del hub.repos[NAME].files["model-00002-of-00002.safetensors"]
    with pytest.raises(FormatError, match=r"names 2 shards, 1 are not there, such as model-00002-of-00002.safetensors"):
        fetch(NAME)


@pytest.mark.parametrize(
    "index", [b"[]", b"{}", b'{"weight_map": {"a": "../x.safetensors"}}', b'{"weight_map": {"a": 1, "b": "x"}}', b"[" * 10_000, b"\xff",
              b'{"weight_map": {"a": "pytorch_model.bin"}}', b'{"weight_map": {}}']
)  # fmt: skip
def test_an_index_that_is_none(hub: FakeHub, index: bytes) -> None:
    serve(hub, {**SMALL, "model.safetensors.index.json": index})
    with pytest.raises(FormatError, match=r"fake/tiny@main: model\.safetensors\.index\.json (is no index|names shards that are no plain)"):
        fetch(NAME)


def test_gguf(hub: FakeHub) -> None:
    one = {
        "Model-Q4.gguf": b"GGUF4",
        "mmproj-Model.gguf": b"GGUFp",
        "big-00001-of-00002.gguf": b"GGUF1",
        "README.md": b"",
        "config.json": b"{}",
    }
    serve(hub, one)
    assert fetch(NAME).name == "Model-Q4.gguf" and hub.downloads() == ["Model-Q4.gguf"]
    serve(hub, {**one, "sub/Model-Q8.gguf": b"GGUF8" * 1000})
    with pytest.raises(UsageError, match=r"choose one with --file \(file=\): Model-Q4.gguf \(5 bytes\), sub/Model-Q8.gguf \(5.0 KB\)$"):
        fetch(NAME)
    path = fetch(NAME, file="sub/Model-Q8.gguf")
    assert path.read_bytes() == b"GGUF8" * 1000 and path.as_posix().endswith(f"snapshots/{COMMIT}/sub/Model-Q8.gguf")
    with pytest.raises(UnsupportedModelError, match=r"companion of one \(mmproj\)"):
        fetch(NAME, file="mmproj-Model.gguf")
    with pytest.raises(UnsupportedModelError, match="one part of a split GGUF"):
        fetch(NAME, file="big-00001-of-00002.gguf")
    with pytest.raises(UsageError, match=r"has no file Q9.gguf; it has: Model-Q4.gguf"):
        fetch(NAME, file="Q9.gguf")
    serve(hub, {**one, "model.safetensors": WEIGHTS})
    assert fetch(NAME).is_dir()  # safetensors come first
    assert fetch(NAME, file="Model-Q4.gguf").is_file()


def test_a_named_safetensors_brings_the_configs_beside_it(hub: FakeHub) -> None:
    serve(hub, {"config.json": b"{}", "v2/config.json": b"{2}", "v2/weights.safetensors": WEIGHTS, "weights.safetensors": b"x"})
    path = fetch(NAME, file="v2/weights.safetensors")
    assert path.read_bytes() == WEIGHTS and set(hub.downloads()) == {"v2/config.json", "v2/weights.safetensors"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"\x80"}, "only pickles: pytorch_model.bin is a Python pickle, and to load one can run any code"),
        ({"consolidated.00.pth": b"\x80"}, "a Python pickle"),
        ({"a-00001-of-00002.gguf": b"G"}, "only GGUF files: a-00001-of-00002.gguf is one part of a split GGUF"),
        ({"adapter_model.safetensors": b"x"}, "has no model.safetensors; choose another file with --file .*adapter_model.safetensors"),
        ({"README.md": b""}, "holds no weights: neither"),
    ],
)
def test_nothing_that_is_read_here(hub: FakeHub, files: dict[str, bytes], message: str) -> None:
    serve(hub, files)
    with pytest.raises(UnsupportedModelError, match=message):
        fetch(NAME)
    assert hub.downloads() == []


def test_pickles_are_not_had_by_name_either(hub: FakeHub) -> None:
    serve(hub, {"pytorch_model.bin": b"\x80"})
    with pytest.raises(UnsupportedModelError, match="a Python pickle"):
        fetch(NAME, file="pytorch_model.bin")
    with pytest.raises(UsageError, match=r"setup.py is no model; expected a .gguf or .safetensors"):
        fetch(NAME, file="setup.py")
    assert hub.downloads() == []


def test_revisions_are_pinned_to_their_commit(hub: FakeHub) -> None:
    repo = serve(hub, revisions={"main": COMMIT, "refs/pr/1": OTHER_COMMIT})
    assert fetch(NAME, revision="refs/pr/1").name == OTHER_COMMIT
    assert fetch(NAME, revision=COMMIT).name == COMMIT and not (hub_module.repo_folder(NAME) / "refs" / COMMIT).exists()
    assert all(f"/resolve/{OTHER_COMMIT}/" in p or f"/resolve/{COMMIT}/" in p for _, p, _ in hub.log if "/resolve/" in p)
    assert len(hub.downloads()) == 3  # the blobs are the same
    repo.revisions["main"] = OTHER_COMMIT  # a new commit on main
    assert fetch(NAME).name == OTHER_COMMIT


# The network


def test_a_download_that_breaks_goes_on_where_it_was(hub: FakeHub) -> None:
    serve(hub, cut={"model.safetensors": [100_000, 50_000]})
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, "bytes=100000-", "bytes=150000-"]


def test_chunked_and_without_ranges_it_begins_anew(hub: FakeHub) -> None:
    serve(hub, cut={"model.safetensors": [100_000]}, chunked=True, ranges=False)
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, "bytes=100000-"]


def test_the_next_run_goes_on_where_this_one_gave_up(hub: FakeHub) -> None:
    repo = serve(hub, cut={"model.safetensors": [100_000] + [0] * 100})
    with pytest.raises(HubError, match=r"100.0 KB of model.safetensors are kept; run again to go on"):
        fetch(NAME)
    assert [model.unfinished for model in cached_models()] == [100_000]
    repo.cut.clear()
    hub.log.clear()
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=100000-"] and hub.downloads() == ["model.safetensors"]
    assert not list(hub_module.repo_folder(NAME).rglob("*.incomplete"))


def test_a_part_that_is_longer_than_the_file_is_thrown_away(hub: FakeHub) -> None:
    serve(hub)
    blobs = hub_module.repo_folder(NAME) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{blob_id('model.safetensors', WEIGHTS)}.incomplete").write_bytes(bytes(len(WEIGHTS) + 1))
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_range_that_the_hub_cannot_give_is_no_dead_end(hub: FakeHub) -> None:
    serve(hub, cut={"model.safetensors": [1000]}, unsatisfiable=True)
    assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, "bytes=1000-", None]


@pytest.mark.parametrize("faults", [{"ranges": False}, {"unsatisfiable": True}])
def test_a_hub_that_never_comes_to_an_end_is_left(hub: FakeHub, faults: dict[str, bool]) -> None:
    """Each request brings the same beginning, or takes it away again: that is no progress."""
    serve(hub, cut={"model.safetensors": [1000] * 1000}, **faults)
    with pytest.raises(HubError):
        fetch(NAME)
    assert len(hub.ranges("model.safetensors")) <= 2 * transfer.TRIES


def test_ctrl_c_keeps_what_arrived(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    serve(hub, delay_s=0.01)
    called: list[int] = []

    def interrupt(self: object, file_bytes: int) -> None:
        called.append(file_bytes)
        if file_bytes > 100_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer.Progress, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)
    assert capsys.readouterr().err.endswith("interrupted; what was downloaded is kept, and the same command goes on from there\n")
    (part,) = hub_module.repo_folder(NAME).rglob("*.incomplete")
    assert called[-1] < len(WEIGHTS) and part.read_bytes() == WEIGHTS[: called[-1]]


def test_offline_and_unreachable_run_from_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub)
    folder = fetch(NAME)
    capsys.readouterr()

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.log.clear()
        assert fetch(NAME) == folder == fetch(NAME, revision=COMMIT) and hub.log == []
        assert capsys.readouterr().err == ""  # it was asked for
        with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE is set, and fake/other@main is not in the cache .*; unset it to download$"):
            fetch("fake/other")
        with pytest.raises(HubError, match="fake/tiny@v2 is not in the cache"):
            fetch(NAME, revision="v2")
        with pytest.raises(HubError, match=r"the cache has only a part: fake/tiny@main has no file x.gguf; it has: model.safetensors"):
            fetch(NAME, file="x.gguf")

    for status in (500, 503, 401, 403, 404):
        hub.status = status
        assert fetch(NAME) == folder
        said = capsys.readouterr().err
        assert (
            said.startswith("notice: ")
            and said.endswith(f"running {NAME} from the cache (commit {COMMIT[:12]})\n")
            and said.count("\n") == 1
        )
    hub.status = None
    with monkeypatch.context() as patch:
        point_at("http://127.0.0.1:9", patch)
        assert fetch(NAME) == folder
        assert "127.0.0.1:9 cannot be reached for fake/tiny" in capsys.readouterr().err
        with pytest.raises(HubError, match=r"cannot be reached for fake/other .*; check the network, proxies and HF_ENDPOINT"):
            fetch("fake/other")


def test_an_unfinished_model_is_not_run_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, cut={"model.safetensors": [10] + [0] * 100})
    with pytest.raises(HubError):
        fetch(NAME, revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, and the cache has only a part: fake/tiny@0123.* holds no weights"):
        fetch(NAME, revision=COMMIT)


def test_a_new_commit_that_is_unfinished_does_not_hide_the_old_one(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = serve(hub)
    old = fetch(NAME)
    repo.revisions["main"] = OTHER_COMMIT
    repo.files["model.safetensors"] = WEIGHTS[::-1]
    repo.cut["model.safetensors"] = [10] + [0] * 100
    with pytest.raises(HubError):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME) == old


# Refusals


def test_gated_private_unknown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, gated=True)
    for token in (None, "stranger"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            HubError, match=rf"^fake/tiny is gated; accept its licence on its page \({hub.url}/fake/tiny\), then set HF_TOKEN"
        ):
            fetch(NAME)
    monkeypatch.delenv("HF_TOKEN")
    serve(hub, token="secret")
    with pytest.raises(HubError, match=r"has no model fake/tiny, or it is private; check the name .*or set HF_TOKEN"):
        fetch(NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch(NAME).is_dir()
    with pytest.raises(HubError, match=r"has no model fake/other"):
        fetch("fake/other")
    with pytest.raises(HubError, match="fake/tiny has no revision 'v9'; expected a branch"):
        fetch(NAME, revision="v9")
    for status, message in (
        (403, "answers 403 for fake/x; accept the licence"),
        (429, "answers 429 .*try again later"),
        (500, "answers 500"),
    ):
        hub.status = status
        with pytest.raises(HubError, match=message):
            fetch("fake/x")
    assert all(issubclass(kind, BitNetError) and kind.exit_code == 1 for kind in (HubError,))


def test_the_token_is_not_carried_to_another_host(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with FakeHub({NAME: Repo({"model.safetensors": WEIGHTS})}) as elsewhere:
        serve(hub, token="secret", redirect=elsewhere.url, cut={})
        elsewhere.repos[NAME].cut["model.safetensors"] = [1000]
        assert (fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
        assert len(elsewhere.ranges("model.safetensors")) == 2 and elsewhere.repos[NAME].stolen == []
    assert hub.repos[NAME].stolen == ["Bearer secret"] * 2  # the small files, from the hub itself


def test_what_does_not_fit_is_refused_with_numbers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, listed_sizes={"model.safetensors": 10**15})
    with pytest.raises(
        BitNetError, match=r"^fake/tiny needs 1000000.0 GB of disk, .* GB are free for .*; free some \(bitnet list, bitnet rm\)"
    ):
        fetch(NAME)
    serve(hub)
    monkeypatch.setattr(hub_module, "available_memory_bytes", lambda: 200_000)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 200_000)
    with pytest.raises(BitNetError, match=r"^fake/tiny \(its weights alone\) needs 0.0 GB of memory, 0.0 GB are available"):
        fetch(NAME)
    assert hub.downloads() == [] and not hub_module.repo_folder(NAME).exists()


@pytest.mark.parametrize("lie", [-1000, 1000])
@pytest.mark.parametrize("chunked", [False, True])
def test_sizes_are_believed_only_as_a_plan(hub: FakeHub, lie: int, chunked: bool) -> None:
    serve(hub, listed_sizes={"model.safetensors": len(WEIGHTS) + lie}, chunked=chunked)
    with pytest.raises(FormatError, match=r"model.safetensors: the hub sends (more than the )?[0-9,]+ bytes (that it|and) had listed"):
        fetch(NAME)
    assert all(p.stat().st_size <= len(WEIGHTS) + max(0, lie) for p in hub_module.repo_folder(NAME).rglob("*.incomplete"))
    assert not (hub_module.repo_folder(NAME) / "snapshots" / COMMIT / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_altered_bytes_are_found(hub: FakeHub, name: str) -> None:
    repo = serve(hub)
    repo.altered[name] = bytes([repo.files[name][0] ^ 1]) + repo.files[name][1:]
    with pytest.raises(FormatError, match=rf"{name} has the checksum [0-9a-f]+, expected [0-9a-f]+; it was altered on the way"):
        fetch(NAME)
    assert not list(hub_module.repo_folder(NAME).rglob("*.incomplete"))
    repo.altered.clear()
    assert (fetch(NAME) / name).read_bytes() == repo.files[name]


def test_a_hub_that_lists_names_only_is_asked_for_the_rest(hub: FakeHub) -> None:
    serve(hub, bare=True)
    assert files_below(fetch(NAME)) == {*SMALL, "model.safetensors"}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("etag", ["../../../evil", "a/b", "..", "x.incomplete"])
def test_ids_never_lead_out_of_the_cache(hub: FakeHub, etag: str, bare: bool, tmp_path: Path) -> None:
    serve(hub, {"model.safetensors": WEIGHTS}, etag=etag, bare=bare)
    with pytest.raises(FormatError, match=r"does not tell size and ETag of model.safetensors"):
        fetch(NAME)
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("commit", ["../../evil", "a/b", ".", "x y"])
def test_commits_never_lead_out_of_the_cache(hub: FakeHub, commit: str, tmp_path: Path) -> None:
    serve(hub, revisions={"main": commit})
    with pytest.raises(FormatError, match="as its commit; expected a hash"):
        fetch(NAME)
    assert files_below(tmp_path) == set()


def test_names_never_lead_out_of_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    evil = [
        "../evil.gguf",
        "/evil.gguf",
        "a/../../evil.gguf",
        "a//b.gguf",
        "C:evil.gguf",
        "a\\..\\evil.gguf",
        "a\x1b[2J.gguf",
        "x" * 600 + ".gguf",
    ]
    serve(hub, dict.fromkeys(evil, b"GGUF"))
    with pytest.raises(UnsupportedModelError, match="holds no weights"):
        fetch(NAME)
    for name in evil:
        with pytest.raises(UsageError, match="is no path of a file in a repository"):
            fetch(NAME, file=name)
    assert files_below(tmp_path) == set()
    serve(hub, listed_twice="config.json")
    with pytest.raises(FormatError, match="lists a file twice"):
        fetch(NAME)


def test_an_answer_that_is_no_listing(hub: FakeHub) -> None:
    hub.status = 200  # an empty page, as a login page of a network may be
    with pytest.raises(HubError, match="does not answer as a hub does"):
        fetch(NAME)


# Names


def test_names() -> None:
    for name in ("org/name", "microsoft/bitnet-b1.58-2B-4T", "a/b", "Qwen/Qwen3-0.6B-GGUF", "o_r/n_", "1bitLLM/bitnet_b1_58-large"):
        assert is_hub_name(name), name
    for name in ("name", "a/b/c", "/a/b", "./a", "../a", "a/", "/a", "a/..", "a/.b", "a//b", "a b/c", "a/b--c", "a/b..c", "a/b.gguf",
                 "a/b.git", "models/x.safetensors", "é/b", "a/b\n", "-a/b", "a/" + "b" * 96, ""):  # fmt: skip
        assert not is_hub_name(name), name
    with pytest.raises(UsageError, match="is no name of a model on the Hub; expected org/name"):
        fetch("name")
    for revision in ("", "../x", "a/../b", "/a", "a\n", "-x", "a b", "a//b", "a/.b"):
        with pytest.raises(UsageError, match="is no name of a branch, tag or commit"):
            fetch(NAME, revision=revision)


def test_what_is_here_wins(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub)
    monkeypatch.chdir(tmp_path)
    folder = resolve(NAME)
    assert folder.name == COMMIT
    (tmp_path / NAME).mkdir(parents=True)
    hub.log.clear()
    assert resolve(NAME) == Path(NAME) and hub.log == []
    with pytest.raises(UsageError, match="revision and file choose within a model of the Hub, and 'fake/tiny' is here"):
        resolve(NAME, revision="main")
    with pytest.raises(UsageError, match="choose within a model of the Hub"):
        resolve(embedded_models()[0], file="x.gguf")
    with pytest.raises(UsageError, match="no folder or file named 'no/where'"):
        resolve(Path("no/where"))  # a path is no name
    with pytest.raises(UsageError, match=r"no folder or file named 'no/where\.gguf'"):
        resolve("no/where.gguf")
    assert hub.log == []


@given(st.text(max_size=30))
def test_plain_names_stay_below(text: str) -> None:
    if is_plain(text):
        assert os.path.normpath(f"/cache/{text}").startswith("/cache/") and text.isprintable()
    assert plain(text).isprintable()


@given(st.lists(st.sampled_from(["model.safetensors", "a.gguf", "b.gguf", "x.bin", "config.json", "modeling.py", "README.md", "c.pt"])))
def test_pickles_and_code_are_never_chosen(names: list[str]) -> None:
    try:
        chosen, _ = choose(dict.fromkeys(names, 1), None, bytes, "it")
    except BitNetError:
        return
    assert chosen and all(name.endswith((".safetensors", ".gguf", ".json")) for name in chosen) and set(chosen) <= set(names)


# The cache


def test_removal_frees_what_it_says(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model 'fake/tiny' in the cache .*; it holds: nothing$"):
        removal(NAME)
    repo = serve(hub, revisions={"main": COMMIT, "old": OTHER_COMMIT})
    same = [f"fake/same{i}" for i in range(5)]  # other models, the same commit
    for name in same:
        hub.repos[name] = Repo({"model.safetensors": b"same commit"})
        fetch(name)
    fetch(NAME, revision="old")
    repo.files["model.safetensors"] = WEIGHTS[:1000]
    fetch(NAME)
    assert [(model.name, model.revisions, model.state) for model in cached_models()] == [
        *((name, ["main"], "ready") for name in same), (NAME, ["main"], "ready"), (NAME, ["old"], "ready")
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no revision 'v9' of fake/tiny in the cache; it holds: "):
        removal(NAME, "v9")
    with pytest.raises(UsageError, match=r"no model '../x' in the cache .*; it holds: fake/same0, .*, fake/tiny"):
        removal("../x")
    before = disk(tmp_path)
    found = removal(NAME, "main")
    assert found.size == 1000  # the small files are also the other revision's
    found.execute()
    assert before - disk(tmp_path) >= 1000 and [model.name for model in cached_models()] == [*same, NAME]
    old = hub_module.repo_folder(NAME) / "snapshots" / OTHER_COMMIT
    assert (old / "model.safetensors").read_bytes() == WEIGHTS and (old / "config.json").is_file()
    found = removal(NAME)
    assert found.size == len(WEIGHTS) + sum(map(len, SMALL.values()))
    found.execute()
    assert not hub_module.repo_folder(NAME).exists() and [model.name for model in cached_models()] == same


def test_what_is_unfinished_can_be_removed(hub: FakeHub) -> None:
    serve(hub, {"model.safetensors": WEIGHTS}, cut={"model.safetensors": [1234] + [0] * 100})
    with pytest.raises(HubError):
        fetch(NAME)
    (model,) = cached_models()
    assert (model.name, model.commit, model.unfinished) == (NAME, "", 1234) and model.state.startswith("nothing complete")
    found = removal(NAME)
    assert found.size == 1234
    found.execute()
    assert cached_models() == []


def disk(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def test_progress_is_silent_at_first_and_then_tells_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    with transfer.Progress("fake/tiny", 1000) as progress:
        progress(500)
        assert said.getvalue() == ""
        now[0] = 3.0
        for done in (600, 610, 700):
            progress(done)
    assert said.getvalue() == "  fake/tiny: 600 bytes of 1.0 KB after 3 s\n  fake/tiny: 700 bytes of 1.0 KB after 3 s\n"


def test_a_full_disk_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_link", full)
    with pytest.raises(BitNetError, match=r"cannot write to the cache .* \(No space left on device\); what was downloaded is kept"):
        fetch(NAME)


def test_a_cache_that_is_damaged_is_mended(hub: FakeHub) -> None:
    serve(hub)
    weights = fetch(NAME) / "model.safetensors"
    weights.resolve().write_bytes(b"short")
    assert fetch(NAME) / "model.safetensors" == weights and weights.read_bytes() == WEIGHTS
    shutil.rmtree(hub_module.repo_folder(NAME) / "blobs")
    assert fetch(NAME) / "model.safetensors" == weights and weights.read_bytes() == WEIGHTS
