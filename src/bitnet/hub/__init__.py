"""Models by name: `org/name` on the Hugging Face Hub -> a folder or file in the standard cache, downloaded where it is not there yet.

Plan, show, download. The hub lists the files of one commit; what a model needs is chosen from them, never pickles and never code; the cost
is shown, and refused where disk or memory cannot hold it; then what is missing is downloaded. The cache is huggingface_hub's own (its guide
"Understand caching"), shared with every other program: blobs by checksum, snapshots of links to them, refs from branches to commits.

A hub may lie: names and ids that are not plain are never used, and sizes are a plan that the bytes must keep.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bitnet.errors import BitNetError, FormatError, UsageError
from bitnet.hub.needs import INDEX, PICKLES, choose, is_plain, plain, size_text
from bitnet.hub.remote import ID, HubError, HubFile, Listing, listing
from bitnet.hub.transfer import download, part_of, say, size_of
from bitnet.machine import available_memory_bytes, require_memory

__all__ = ["HubError", "cache_folder", "fetch", "is_hub_name", "repo_folder"]

MAX_INDEX_BYTES = 8 << 20  # the largest models' have about 100 KB

_NAME = re.compile(r"(?=.{3,96}$)(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*(//|\.\.|/\.))\w([\w./+-]{0,198}[\w+-])?", re.ASCII)
_FILES = (".gguf", ".safetensors", ".json", ".git", *PICKLES)  # what ends so is a path, and no model's name


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form org/name, and does not end as a file's name does."""
    return _NAME.fullmatch(text) is not None and not text.lower().endswith(_FILES)


def fetch(name: str, revision: str | None = None, file: str | None = None) -> Path:
    """The folder or file of the model `name` ("org/name") in the cache, after downloading what is missing; says on stderr what it does.

    revision: a branch, tag or commit, by default "main"; file: one .gguf or .safetensors of the repository.
    Where the hub cannot be asked, the cache must do. Raises `UsageError` for names, `UnsupportedModelError` for a repository of nothing
    that is read here, `HubError` for what the hub does not give, `FormatError` for bytes that are not what it announced, `BitNetError` for
    too little disk or memory.
    """
    revision = "main" if revision is None else revision
    if not is_hub_name(name):
        raise UsageError(f"{plain(name)!r} is no name of a model on the Hub; expected org/name")
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision):
        raise UsageError(f"revision {plain(revision)!r} is no name of a branch, tag or commit")
    if file is not None and not is_plain(file):
        raise UsageError(f"file {plain(file)!r} is no path of a file in a repository")
    require_library()
    repo = repo_folder(name)
    try:
        found = listing(name, revision)
        names, opened = choose(found.sizes, file, lambda: _index(found, repo), f"{name}@{revision}")
        files = found.files(names)
    except HubError as error:
        return _from_cache(repo, name, revision, file, error)
    snapshot = repo / "snapshots" / found.commit
    missing = [f for f in files if size_of(snapshot / f.name) != f.size or not (snapshot / f.name).is_file()]
    if missing:
        _show_or_refuse(found, files, missing, repo)
        download(found, missing, repo)
    _remember(repo, found)
    return snapshot / opened


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads: HF_HUB_CACHE, or below HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(name: str) -> Path:
    """The cache's folder of one model, there or not."""
    return cache_folder() / f"models--{name.replace('/', '--')}"


def require_library() -> None:
    """huggingface_hub since 1.0 has its HTTP session from httpx, which can stream."""
    try:
        from huggingface_hub import __version__ as version
        from huggingface_hub import constants  # noqa: F401
    except ImportError:
        version = "0 (none)"
    except ValueError as error:  # it reads the environment as it is imported
        raise UsageError(f"huggingface_hub refuses the environment ({plain(error)}); check the HF_ variables") from None
    if version.startswith("0"):
        raise BitNetError(f"models by name need huggingface_hub 1.0 or later, found {version}; pip install -U huggingface_hub")


def _index(found: Listing, repo: Path) -> bytes:
    """The index of shards, downloaded already now: it tells what else is needed."""
    (index,) = found.files([INDEX])
    if index.size > MAX_INDEX_BYTES:
        where = f"{found.name}@{found.revision}: {INDEX}"
        raise FormatError(f"{where} has {size_text(index.size)}; expected at most {size_text(MAX_INDEX_BYTES)}")
    path = repo / "snapshots" / found.commit / INDEX
    if size_of(path) != index.size:
        download(found, [index], repo)
    return path.read_bytes()


def _from_cache(repo: Path, name: str, revision: str, file: str | None, error: HubError) -> Path:
    """What an earlier run downloaded, where the hub gave `error` instead of an answer."""
    commit = revision
    if not (repo / "snapshots" / revision).is_dir():
        with suppress(OSError, UnicodeDecodeError):
            commit = (repo / "refs" / revision).read_text()
    snapshot = repo / "snapshots" / commit
    if not ID.fullmatch(commit) or not snapshot.is_dir():
        if error.offline:
            raise HubError(
                f"HF_HUB_OFFLINE is set, and {name}@{revision} is not in the cache {repo.parent}; unset it to download"
            ) from None
        raise error
    try:
        there = [path for path in snapshot.rglob("*") if path.is_file()]
        sizes: dict[str, int | None] = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in there}
        _, opened = choose(sizes, file, (snapshot / INDEX).read_bytes, f"{name}@{revision}")
    except BitNetError as missing:
        raise HubError(f"{error}, and the cache has only a part: {missing}") from None
    if not error.offline:
        say(f"notice: {error}; running {name} from the cache (commit {commit[:12]})")
    return snapshot / opened


def _show_or_refuse(found: Listing, files: Sequence[HubFile], missing: Sequence[HubFile], repo: Path) -> None:
    """The cost, on stderr, before anything of it is spent."""
    blobs, cache = repo / "blobs", repo.parent
    total = sum(f.size for f in files)
    todo = sum(max(0, f.size - max(size_of(blobs / f.id), size_of(part_of(blobs, f)))) for f in missing)
    weights = sum(f.size for f in files if f.name.lower().endswith((".safetensors", ".gguf")))
    free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
    memory = available_memory_bytes()
    say(f"{found.name}@{found.revision} (commit {found.commit[:12]}), licence: {found.licence}")
    say(f"  download  {size_text(todo)} of {size_text(total)} ({len(files)} files), {size_text(total - todo)} are cached")
    say(f"  disk      {size_text(free)} free for {cache}")
    say(f"  memory    about {size_text(weights)} for the weights, {'unknown' if memory is None else size_text(memory)} available")
    if todo > free:
        advice = "free some (bitnet list, bitnet rm), or set HF_HOME to a folder of a larger disk"
        raise BitNetError(f"{found.name} needs {size_text(todo)} of disk, {size_text(free)} are free for {cache}; {advice}")
    require_memory(f"{found.name} (its weights alone)", weights)


def _remember(repo: Path, found: Listing) -> None:
    """Notes the commit of a branch or tag, for when the hub is away. A cache that cannot be written is used as it is."""
    ref = repo / "refs" / found.revision
    with suppress(OSError):
        if found.revision != found.commit and (not ref.is_file() or ref.read_text() != found.commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            made = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            made.write_text(found.commit)
            os.replace(made, ref)
