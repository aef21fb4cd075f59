"""A Hub of one machine: what pushing to and loading from a model repository needs, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Every revision is this one: repositories are not written to while they are read."""


class Handler(BaseHTTPRequestHandler):
    """Answers the client of huggingface_hub; repositories are dicts of the server."""

    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.answer(b"{}", 404, X_Error_Code=code, X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        files = self.server.repositories.get(repo)
        if files is None:
            return self.missing("RepoNotFound")
        if not api:
            return self.answer_file(files, "/".join(parts[4:]))
        if parts[4:5] == ["tree"]:
            return self.answer_json(
                [
                    {"type": "file", "path": path, "size": len(body), "oid": oid(body)}
                    for path, body in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        return self.answer_json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

    def answer_file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.missing("EntryNotFound")
        self.server.downloads.add(path)
        return self.answer(
            files[path],
            ETag=f'"{oid(files[path])}"',
            X_Repo_Commit=COMMIT,
            Content_Type="application/octet-stream",
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            self.server.repositories.setdefault(repo, {})
            return self.answer_json({"url": f"{self.server.url}/{repo}", "id": repo})
        if parts[:2] != ["api", "models"]:
            return self.answer_json({"warnings": [], "errors": []})  # of the card's yaml
        repo = "/".join(parts[2:4])
        files = self.server.repositories[repo]
        if parts[4] == "preupload":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
            ]
            return self.answer_json({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit_url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        return self.answer_json({"commitUrl": commit_url, "commitOid": COMMIT})


class HubServer(ThreadingHTTPServer):
    """Repositories by name, each a dict of files; and which files were asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.downloads: set[str] = set()


def oid(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """Serve an empty Hub for a while."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
