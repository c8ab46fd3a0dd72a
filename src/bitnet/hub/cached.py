"""What the cache holds, and how to free it. Deleting is huggingface_hub's, which knows what else links to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet.errors import BitNetError, UsageError
from bitnet.hub import cache_folder, is_hub_name, repo_folder, require_library
from bitnet.hub.needs import INDEX, choose, plain

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

PREFIX = "models--"


@dataclass(frozen=True)
class CachedModel:
    """One revision of one model. `revisions`: the branches and tags that point to it; `last_used`: seconds since 1970, None if unknown."""

    name: str
    revisions: list[str]
    commit: str  # empty: a download that has not got to its first file
    size: int  # bytes; revisions of one model may share some
    unfinished: int  # bytes of downloads that were interrupted, of the model as a whole
    last_used: float | None
    state: str  # "ready", or why it does not run from here


def cached_models() -> list[CachedModel]:
    """All models in the cache, by name."""
    require_library()
    cache = _scan()
    repos = {repo.repo_path.name: repo for repo in cache.repos} if cache is not None else {}
    folders = sorted(path for path in cache_folder().glob(f"{PREFIX}*") if path.is_dir())
    return [model for folder in folders for model in _of_folder(folder, repos.get(folder.name))]


def _of_folder(folder: Path, repo: CachedRepoInfo | None) -> list[CachedModel]:
    name, unfinished = folder.name.removeprefix(PREFIX).replace("--", "/"), _unfinished(folder)
    if repo is None or not repo.revisions:
        return [CachedModel(name, [], "", 0, unfinished, None, "nothing complete; run it again, or remove it")]
    return [
        CachedModel(
            name,
            sorted(revision.refs),
            revision.commit_hash,
            revision.size_on_disk,
            unfinished,
            max((file.blob_last_accessed for file in revision.files), default=None),
            _state(revision) if is_hub_name(name) else "not org/name, the only names that run from here",
        )
        for revision in sorted(repo.revisions, key=lambda revision: -revision.last_modified)
    ]


def _state(revision: CachedRevisionInfo) -> str:
    sizes: dict[str, int | None] = {file.file_path.relative_to(revision.snapshot_path).as_posix(): 0 for file in revision.files}
    try:
        choose(sizes, None, (revision.snapshot_path / INDEX).read_bytes, "it")
    except UsageError:
        return "ready"  # several files to choose from
    except BitNetError as error:
        return str(error)
    return "ready"


@dataclass(frozen=True)
class Removal:
    """What `bitnet rm` is about to do. `size`: bytes that become free."""

    what: str
    size: int
    execute: Callable[[], None]


def removal(name: str, revision: str | None = None) -> Removal:
    """How to free a model, or one revision of it: a branch, tag, or commit's beginning. Raises `UsageError` if it is not there."""
    require_library()
    have = dict.fromkeys(model.name for model in cached_models())
    folder = repo_folder(name)
    if name not in have or not folder.is_dir():
        raise UsageError(f"no model {plain(name)!r} in the cache {cache_folder()}; it holds: {', '.join(have) or 'nothing'}")
    cache = _scan()
    repo = next((repo for repo in cache.repos if repo.repo_path.name == folder.name), None) if cache is not None else None
    chosen = _chosen(repo, revision, name)
    whole = repo is None or len(chosen) == len(repo.revisions)
    # Only this repository: two may have a commit of the same hash.
    strategy = replace(cache, repos=frozenset([repo])).delete_revisions(*chosen) if cache is not None and repo is not None else None
    size = (strategy.expected_freed_size if strategy else 0) + (_unfinished(folder) if whole else 0)

    def execute() -> None:
        if strategy is not None:
            strategy.execute()
        if whole:
            for left in (folder, folder.parent / ".locks" / folder.name):
                shutil.rmtree(left, ignore_errors=True)
        if whole and folder.exists():
            raise BitNetError(f"{folder} cannot be removed; check its permissions")

    return Removal(name if revision is None else f"{name}@{revision}", size, execute)


def _chosen(repo: CachedRepoInfo | None, revision: str | None, name: str) -> list[str]:
    """The commits to delete."""
    revisions = repo.revisions if repo is not None else frozenset()
    if revision is None:
        return [found.commit_hash for found in revisions]
    chosen = [found.commit_hash for found in revisions if revision in found.refs]
    chosen = chosen or [found.commit_hash for found in revisions if len(revision) >= 4 and found.commit_hash.startswith(revision)]
    if len(chosen) != 1:
        have = ", ".join(" = ".join([*sorted(found.refs), found.commit_hash[:12]]) for found in revisions) or "nothing complete"
        raise UsageError(f"{'no' if not chosen else 'more than one'} revision {plain(revision)!r} of {name} in the cache; it holds: {have}")
    return chosen


def _scan() -> HFCacheInfo | None:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(cache_folder())
    except (CacheNotFound, ValueError, RuntimeError):  # no cache yet; a file in its place; no home folder
        return None


def _unfinished(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blobs").glob("*.incomplete"))
