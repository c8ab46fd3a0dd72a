"""Files of the hub into the cache: resumed, checked, linked.

A missing file is appended to blobs/<id>.incomplete by HTTP ranges, so that an interrupted run loses nothing (huggingface_hub's own download
begins anew). It becomes blobs/<id> once its size and checksum are right, and snapshots/<commit>/<name> links to it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bitnet import __version__
from bitnet.errors import BitNetError, FormatError
from bitnet.hub.needs import plain, size_text
from bitnet.hub.remote import HubError, HubFile, Listing, explained

TRIES = 5  # requests in a row that bring nothing new
CHUNK_BYTES = 1 << 20
PATIENCE_S = 2.0


def say(line: str) -> None:
    """To stderr, where progress belongs."""
    if sys.stderr is not None:  # closed by the caller
        print(line, file=sys.stderr, flush=True)


def download(found: Listing, files: Sequence[HubFile], repo: Path) -> None:
    """Downloads, checks and links each file below `repo`, the model's folder in the cache. Interrupted, it leaves what arrived."""
    from filelock import FileLock  # huggingface_hub's own locks, in the same places

    blobs, locks = repo / "blobs", repo.parent / ".locks" / repo.name
    with Progress(found.name, sum(file.size for file in files)) as progress:
        try:
            blobs.mkdir(parents=True, exist_ok=True)
            locks.mkdir(parents=True, exist_ok=True)
            for file in files:
                with FileLock(locks / f"{file.id}.lock"):
                    if not blobs.joinpath(file.id).is_file() or size_of(blobs / file.id) != file.size:
                        _download_blob(found, file, blobs, progress)
                    _link(blobs / file.id, repo / "snapshots" / found.commit / file.name)
                progress.before_bytes += file.size
        except KeyboardInterrupt:
            say("interrupted; what was downloaded is kept, and the same command goes on from there")
            raise
        except OSError as error:
            reason = error.strerror or plain(error)
            raise BitNetError(f"cannot write to the cache {repo.parent} ({reason}); what was downloaded is kept, run again") from None


def _download_blob(found: Listing, file: HubFile, blobs: Path, progress: Progress) -> None:
    """Appends to the part until it is whole, then makes it the blob. A connection that breaks is opened again, TRIES times in vain."""
    part = part_of(blobs, file)
    most, vain = size_of(part), 0
    while not part.exists() or size_of(part) != file.size:
        failure: HubError | None = None
        try:
            with explained(found.name, found.revision):
                _append(found, file, part, progress)
        except HubError as error:
            failure = error
        vain = 0 if size_of(part) > most else vain + 1
        most = max(most, size_of(part))
        lasting = failure is not None and failure.status is not None and failure.status < 500 and failure.status not in (408, 429)
        if failure is not None and (lasting or vain >= TRIES):
            raise HubError(f"{failure}. {size_text(size_of(part))} of {file.name} are kept; run again to go on from there") from None
        if vain >= TRIES:
            raise HubError(f"{found.name}: the hub does not give {file.name} to its end; try again later")
        time.sleep(0 if failure is None else min(0.25 * 2**vain, 4.0))
    _check(part, file, f"{found.name}@{found.revision}")
    os.replace(part, blobs / file.id)


def _append(found: Listing, file: HubFile, part: Path, progress: Progress) -> None:
    """One request for the bytes that the part does not have. Never writes more than the listing announced."""
    from huggingface_hub import constants, get_session, hf_hub_url

    utils: Any = import_module("huggingface_hub.utils")  # does not export to type checkers what it documents
    where = f"{found.name}@{found.revision}: {file.name}"
    at = size_of(part)
    headers = {**utils.build_hf_headers(library_name="bitnet", library_version=__version__), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={at}-"} if at else {}
    url = hf_hub_url(found.name, file.name, revision=found.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
        if response.status_code == 416 and at:  # the file is not longer than what we have: from the start
            part.unlink()
            return
        utils.hf_raise_for_status(response)
        at, announced = _position(response, at, where)
        if announced is not None and announced != file.size:
            raise FormatError(f"{where}: the hub sends {announced:,} bytes and had listed {file.size:,}; try again later")
        with open(part, "r+b" if part.exists() else "wb") as out:
            out.truncate(at)
            out.seek(at)
            for chunk in response.iter_raw():
                at += len(chunk)
                if at > file.size:
                    raise FormatError(f"{where}: the hub sends more than the {file.size:,} bytes that it had listed; try again later")
                out.write(chunk)
                progress(at)
    if at < file.size and announced is None:
        raise FormatError(f"{where}: the hub sends {at:,} bytes and had listed {file.size:,}; try again later")


def _position(response: Any, at: int, where: str) -> tuple[int, int | None]:
    """(where in the file the answer begins, the size of the whole file or None). A server may ignore the range, and begin anew."""
    ranged = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
    if response.status_code == 206 and ranged and int(ranged[1]) == at:
        return at, None if ranged[2] == "*" else int(ranged[2])
    if response.status_code != 200:
        raise FormatError(f"{where}: the hub answers {response.status_code} with another range than asked for; try again later")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _check(part: Path, file: HubFile, where: str) -> None:
    """The id of a large file is its SHA-256; of a small one git's SHA-1, or where a mirror serves it that of its plain bytes."""
    identity = file.id.lower()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", identity):
        return
    sums = [hashlib.sha256()] if len(identity) == 64 else [hashlib.sha1(b"blob %d\0" % file.size), hashlib.sha1()]
    with open(part, "rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            for checksum in sums:
                checksum.update(chunk)
    if identity not in [checksum.hexdigest() for checksum in sums]:
        part.unlink()
        advice = "it was altered on the way, and is not kept; run again"
        raise FormatError(f"{where}: {file.name} has the checksum {sums[0].hexdigest()}, expected {identity}; {advice}")


def _link(blob: Path, pointer: Path) -> None:
    """Makes `pointer` a relative link to `blob`, a copy where links are not to be had."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    made = pointer.with_name(f"{pointer.name}.{os.getpid()}.tmp")
    made.unlink(missing_ok=True)
    try:
        made.symlink_to(os.path.relpath(blob, pointer.parent))
    except (OSError, NotImplementedError):
        shutil.copyfile(blob, made)
    os.replace(made, pointer)


def part_of(blobs: Path, file: HubFile) -> Path:
    """Where the file grows."""
    return blobs / f"{file.id}.incomplete"


def size_of(path: Path) -> int:
    """In bytes; 0 for what is not there."""
    return path.stat().st_size if path.exists() else 0


class Progress:
    """A bar at a terminal, a line for each tenth elsewhere; nothing within the first two seconds. Called with the bytes of one file."""

    def __init__(self, title: str, total_bytes: int):
        self.before_bytes = 0  # of the files that are done
        self._title, self._total = title, total_bytes
        self._start = time.monotonic()
        self._tenth = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, file_bytes: int) -> None:
        done, elapsed_s = self.before_bytes + file_bytes, time.monotonic() - self._start
        if elapsed_s < PATIENCE_S:
            return
        if sys.stderr is None or not sys.stderr.isatty():
            if (tenth := 10 * done // max(1, self._total)) > self._tenth:
                self._tenth = tenth
                say(f"  {self._title}: {size_text(done)} of {size_text(self._total)} after {elapsed_s:.0f} s")
            return
        if self._bar is None:
            self._bar, self._task = _terminal_bar(self._title, self._total)
        self._bar.update(self._task, completed=done)

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _terminal_bar(title: str, total_bytes: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total_bytes)
    bar.start()
    return bar, task
