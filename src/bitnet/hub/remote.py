"""What the hub says: the files of one commit, and its refusals as one line each. Requests, tokens, HF_* variables are huggingface_hub's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bitnet import __version__
from bitnet.errors import BitNetError, FormatError
from bitnet.hub.needs import is_plain, plain

ID = re.compile(r"[A-Za-z0-9][\w-]{0,127}", re.ASCII)  # a commit or a checksum: it names a file of the cache


class HubError(BitNetError):
    """The hub does not give what was asked for: it is away, or does not have it, or not for us.

    `status`: of its answer, None where there was none; `offline`: HF_HUB_OFFLINE is set.
    """

    def __init__(self, message: str, *, status: int | None = None, offline: bool = False):
        super().__init__(message)
        self.status = status
        self.offline = offline


@dataclass(frozen=True)
class HubFile:
    """A file. `name`: its path in the repository, plain; `id`: the blob's name, SHA-256 of a large file, git's SHA-1 of a small one."""

    name: str
    size: int  # bytes, as announced
    id: str


@dataclass(frozen=True)
class Listing:
    """One commit. `files`: by name, with the size, or None where the hub does not list it."""

    name: str
    revision: str
    commit: str
    licence: str
    sizes: dict[str, int | None]
    ids: dict[str, str]

    def files(self, names: Sequence[str]) -> list[HubFile]:
        """These files with size and id; the hub is asked once more for what it did not list."""
        return [self._file(name) for name in names]

    def _file(self, name: str) -> HubFile:
        size = self.sizes[name]
        if size is not None:
            return HubFile(name, size, self.ids[name])
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        with explained(self.name, self.revision):
            found = get_hf_file_metadata(hf_hub_url(self.name, name, revision=self.commit), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if found.size is None or found.size < 0 or found.etag is None or not ID.fullmatch(found.etag):
            raise FormatError(f"{self.name}@{self.revision}: the hub does not tell size and ETag of {name}; is HF_ENDPOINT a hub?")
        return HubFile(name, found.size, found.etag)


def listing(name: str, revision: str) -> Listing:
    """Asks the hub for the files of a revision. Raises `HubError`, and `FormatError` for a listing that cannot be."""
    from huggingface_hub import HfApi, constants

    with explained(name, revision):
        api = HfApi(library_name="bitnet", library_version=__version__)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        licence = _licence(info)
        entries = [(entry.rfilename, *_size_and_id(entry)) for entry in info.siblings or [] if is_plain(entry.rfilename)]
    commit = info.sha
    if not (isinstance(commit, str) and ID.fullmatch(commit)):
        raise FormatError(f"{name}@{revision}: the hub names {plain(commit)!r} as its commit; expected a hash")
    sizes = {file: size for file, size, _ in entries}
    if len(sizes) < len(entries):
        raise FormatError(f"{name}@{revision}: the hub lists a file twice; expected each once")
    return Listing(name, revision, commit, licence, sizes, {file: identity for file, _, identity in entries})


def _size_and_id(entry: Any) -> tuple[int | None, str]:
    size, identity = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
    known = isinstance(size, int) and size >= 0 and isinstance(identity, str) and ID.fullmatch(identity)
    return (size, identity) if known else (None, "")


def _licence(info: Any) -> str:
    card = info.card_data.get("license") if info.card_data else None
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if isinstance(tag, str) and tag.startswith("license:")]
    return plain(card if isinstance(card, str) else ", ".join(tags) or "not stated")


@contextmanager
def explained(name: str, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    httpx: Any = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # or httpx2: what this version is built on
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set", offline=True) from None
    except errors.GatedRepoError as error:
        todo = f"accept its licence on its page ({hub}/{name}), then set HF_TOKEN to a token of that account"
        raise HubError(f"{name} is gated; {todo}", status=error.response.status_code) from None
    except errors.RepositoryNotFoundError as error:
        todo = "check the name (nothing here is named so either), or set HF_TOKEN to a token that may read it"
        raise HubError(f"{hub} has no model {name}, or it is private; {todo}", status=error.response.status_code) from None
    except errors.RevisionNotFoundError as error:
        todo = "expected a branch, tag or commit, such as main"
        raise HubError(f"{name} has no revision {revision!r}; {todo}", status=error.response.status_code) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        closed = f"accept the licence on its page ({hub}/{name}), or set HF_TOKEN to a valid token that may read it"
        raise HubError(
            f"{hub} answers {status} for {name}; {closed if status in (401, 403) else 'try again later'}", status=status
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = plain(error) or type(error).__name__
        raise HubError(f"{hub} cannot be reached for {name} ({reason}); check the network, proxies and HF_ENDPOINT") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        todo = "check the network, proxies and HF_ENDPOINT"
        raise HubError(f"{hub} does not answer as a hub does ({type(error).__name__}: {plain(error)}); {todo}") from None
