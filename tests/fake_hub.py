"""A hub on this machine: what huggingface_hub asks over HTTP, answered from a dictionary, with the faults of real hubs and networks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf", ".bin")  # in LFS: named by SHA-256


@dataclass
class Repo:
    """`files`: name -> bytes; `revisions`: branch -> commit. The rest are faults, and are off."""

    files: dict[str, bytes]
    licence: str = "mit"
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    token: str | None = None  # private: only this one may read it
    listed_sizes: dict[str, int] = field(default_factory=dict)  # instead of the true ones
    listed_twice: str | None = None
    bare: bool = False  # lists names only, neither sizes nor ids
    etag: str | None = None  # instead of the true ones
    altered: dict[str, bytes] = field(default_factory=dict)  # what is sent instead
    cut: dict[str, list[int]] = field(default_factory=dict)  # each request for it breaks off after so many bytes, while there are numbers
    ranges: bool = True
    unsatisfiable: bool = False  # answers 416 to every range
    chunked: bool = False  # sends no Content-Length
    delay_s: float = 0.0  # between blocks of 64 KB
    redirect: str | None = None  # where large files really are: another FakeHub's address
    stolen: list[str] = field(default_factory=list)  # Authorization headers that came with a request to the redirect's target


def blob_id(name: str, content: bytes) -> str:
    if name.lower().endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """`with FakeHub({"org/name": Repo(...)}) as hub:` serves at `hub.url` and notes every request in `hub.log`."""

    def __init__(self, repos: dict[str, Repo] | None = None):
        self.repos = repos or {}
        self.log: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case
        self.status: int | None = None  # instead of every answer
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [path.split("/resolve/", 1)[1].split("/", 1)[1] for method, path, _ in self.log if method == "GET" and "/resolve/" in path]

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of each request for the file."""
        return [headers.get("range") for method, path, headers in self.log if method == "GET" and path.endswith(f"/{name}")]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *client: Any) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or resolve
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._refuse(404, "RepoNotFound")
        given = self.headers.get("Authorization")
        if repo.token is not None and given != f"Bearer {repo.token}":
            return self._refuse(401, "RepoNotFound")
        if repo.gated and (resolve or given is None):
            return self._refuse(403 if given else 401, "GatedRepo")
        commit = repo.revisions.get(match[2] or "main") or (match[2] if match[2] in repo.revisions.values() else None)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if listing:
            return self._list(match[1], repo, commit)
        if resolve and match[3] in repo.files:
            return self._send_file(repo, commit, match[3])
        return self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, name: str, repo: Repo, commit: str) -> None:
        def entry(file: str, content: bytes) -> dict[str, Any]:
            if repo.bare:
                return {"rfilename": file}
            size, identity = repo.listed_sizes.get(file, len(content)), repo.etag or blob_id(file, content)
            lfs = {"lfs": {"sha256": identity, "size": size, "pointerSize": 130}} if file.lower().endswith(LARGE) else {}
            return {"rfilename": file, "size": size, "blobId": identity if not lfs else "0" * 40, **lfs}

        siblings = [entry(file, content) for file, content in repo.files.items()]
        siblings += [sibling for sibling in siblings if sibling["rfilename"] == repo.listed_twice]
        body = json.dumps({"id": name, "sha": commit, "tags": [f"license:{repo.licence}"], "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repo: Repo, commit: str, name: str) -> None:
        large = name.lower().endswith(LARGE)
        identity = repo.etag or blob_id(name, repo.files[name])
        content = repo.altered.get(name, repo.files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{identity}"', "Accept-Ranges": "bytes"}
        if repo.redirect is not None and large:
            headers |= {"Location": repo.redirect + self.path, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{identity}"'}
            return self._answer(302, headers, b"")
        if "Authorization" in self.headers:
            repo.stolen.append(self.headers["Authorization"])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked or not repo.ranges:
            return self._answer(200, headers, content, repo, name)
        start = int(asked[1])
        if start >= len(content) or repo.unsatisfiable:
            return self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._answer(206, headers, content[start:], repo, name)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, repo: Repo | None = None, name: str = "") -> None:
        chunked = repo is not None and repo.chunked and self.command == "GET"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repo.cut.get(name) if repo is not None else None
        sent = body[: cuts.pop(0)] if cuts else body
        try:
            for at in range(0, len(sent), 1 << 16):
                block = sent[at : at + (1 << 16)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
                if repo is not None and repo.delay_s:
                    time.sleep(repo.delay_s)
            if chunked and len(sent) == len(body):
                self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        if len(sent) < len(body):
            self.close_connection = True
