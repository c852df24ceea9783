"""A stand-in for the Hugging Face Hub on loopback: the few requests that huggingface_hub makes for a model, no more.

Its answers follow the Hub's: the JSON of ``/api/models``, the headers of ``/resolve``, and X-Error-Code on refusals.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model's commits, each a set of files, and the branches that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None
    """Where there is one, only its bearer sees the repository."""

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class StandInHub:
    """What it holds, and what it was asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    """Where there is one, every answer has it."""

    def publish(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Give a repository a new commit on a branch; returns the commit."""
        repository = self.repositories.setdefault(repo, Repository())
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        if self.status is not None:
            return self.status, {}, b""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository = self.repositories.get("/".join(parts[:2]))
        if repository is None or repository.token not in (None, token):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        found = repository.files(parts[3] if len(parts) > 3 else "main")
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = found
        if api:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return 200, {}, json.dumps({"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings}).encode()
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        name = "/".join(parts[4:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, files[name]


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files, to publish them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def serve() -> Iterator[StandInHub]:
    """A stand-in Hub that listens on a free port of 127.0.0.1."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, headers, body = hub.answer(self.path, token)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  (http.server's name)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
