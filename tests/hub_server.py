"""A Hugging Face Hub on 127.0.0.1, as far as huggingface_hub needs one to list a repository and download its files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "5" * 40
_MODEL = re.compile(r"/api/models/(?P<repo>[^/?]+/[^/?]+)\?blobs=true")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/main/(?P<name>.+)")


@dataclass
class Hub:
    """Its repositories, what goes wrong with it, and what it was asked."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next downloads break, one each
    statuses: list[int] = field(default_factory=list)  # of the next downloads, one each
    status: int | None = None  # what it answers to everything
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def downloads(self) -> list[tuple[str, str | None]]:
        """(file, Range) of each GET of a file."""
        found = ((_FILE.fullmatch(path), span) for method, path, span in self.asked if method == "GET")
        return [(match["name"], span) for match, span in found if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_args: Any) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if hub.status is not None:
            self._send(hub.status, b"the hub is out of order", {})
        elif model := _MODEL.fullmatch(self.path):
            self._model(model["repo"])
        elif file := _FILE.fullmatch(self.path):
            self._file(file["repo"], file["name"], body)
        else:
            self._send(404, b"", {})

    def _refused(self, repo: str, *, asks_for_a_file: bool) -> bool:
        """Of a gated repository the hub tells everybody what is in it."""
        if asks_for_a_file and repo in self.hub.gated and self.headers.get("Authorization") != "Bearer hf_let_me_in":
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif repo not in self.hub.repos:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        else:
            return False
        return True

    def _model(self, repo: str) -> None:
        if not self._refused(repo, asks_for_a_file=False):
            files = [{"rfilename": n, "size": len(d), "blobId": _sha(d)} for n, d in self.hub.repos[repo].items()]
            about = {"id": repo, "sha": COMMIT, "siblings": files}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, name: str, body: bool) -> None:
        if self._refused(repo, asks_for_a_file=True):
            return
        if name not in self.hub.repos[repo]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if body and self.hub.statuses and (status := self.hub.statuses.pop(0)) != 200:
            self._send(status, b"", {})
            return
        data = self.hub.repos[repo][name]
        headers = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body or self.command == "HEAD":
            return
        if "ETag" in headers and self.hub.cut_after:
            self.wfile.write(data[: self.hub.cut_after.pop(0)])
            self.close_connection = True  # with less than was promised
        else:
            self.wfile.write(data)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, reachable at `hub.url` for the length of a `with`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
