"""A Hub on loopback: what the client of huggingface_hub asks of the real one to push and to load.

Repositories of models and of data sets with their commits, branches and tags; files that are kept
as LFS objects, uploaded whole or in parts and downloaded by a redirect; tokens, private and gated
repositories; and connections that break on demand. The client finds it by `HF_ENDPOINT`. It speaks
no xet, which the client would use of itself for LFS files: `HF_HUB_DISABLE_XET` turns that off.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from socket import SHUT_RDWR
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".bin", ".parquet", ".png", ".safetensors")
REPOSITORY = r"(?P<repository>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>models|datasets)/{REPOSITORY}"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"/(?P<kind>datasets/)?{REPOSITORY}\.git/info/lfs/objects/batch", "batch"),
    ("GET", rf"/(?P<kind>datasets/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    ("PUT", r"/objects/(?P<oid>\w+)", "upload"),
    ("PUT", r"/objects/(?P<oid>\w+)/(?P<part>\d+)", "upload_part"),
    ("POST", r"/objects/(?P<oid>\w+)/complete", "complete"),
    ("POST", r"/objects/(?P<oid>\w+)/verify", "verify"),
    ("GET", r"/objects/(?P<oid>\w+)", "object"),
]


class Token(NamedTuple):
    """Whose it is, and whether it may write."""

    user: str
    writes: bool


class File(NamedTuple):
    """What a repository holds under a path."""

    body: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    @property
    def blob_id(self) -> str:
        """Of the file as git keeps it: of an LFS file it keeps a pointer."""
        body = self.body
        if self.lfs:
            version = "version https://git-lfs.github.com/spec/v1"
            body = f"{version}\noid sha256:{self.sha256}\nsize {len(body)}\n".encode()
        return sha1(b"blob %d\0" % len(body) + body)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Repository:
    """Snapshots of all files by commit, and what branches and tags point to."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": File(b"", lfs=False)}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        parent = self.references.get(branch, "")
        listing = [f"{path} {file.blob_id}" for path, file in sorted(files.items())]
        commit = sha1("\n".join([parent, message, *listing]).encode())
        self.commits[commit] = files
        self.references[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        commit = self.references.get(revision, revision)
        if commit not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the main branch by path."""
        files = self.commits[self.references["main"]]
        return {path: file.body for path, file in files.items() if path != ".gitattributes"}


class RefusedError(Exception):
    """An answer that is an error, as the Hub words them."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """Answers one request of the client."""

    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        number = len(self.server.requests)
        self.server.requests.append(f"{self.command} {self.path}")
        cut = self.server.cut(number)
        if cut == "during":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.hang_up()
        self.body = self.read_body()
        wire = self.wfile
        if cut == "after":
            self.wfile = io.BytesIO()
        try:
            self.route()
        except RefusedError as refusal:
            self.refuse(refusal)
        if cut == "after":
            self.wfile = wire
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815  # as http.server calls them

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self) -> None:
        path = urlsplit(self.path).path
        command = "GET" if self.command == "HEAD" else self.command
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == command:
                named = {key: unquote(text) for key, text in match.groupdict().items() if text}
                named.pop("kind", None)
                if "repository" in named and "datasets/" in match.group(0):
                    named["repository"] = "datasets/" + named["repository"]
                with self.server.lock:
                    return getattr(self, f"answer_{name}")(**named)
        raise RefusedError(404, None, f"this Hub knows no {command} {path}")

    # Answering

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(json.dumps(content).encode(), status, Content_Type="application/json")

    def refuse(self, refusal: RefusedError) -> None:
        headers = {"X_Error_Message": refusal.message, "Content_Type": "application/json"}
        if refusal.code is not None:
            headers["X_Error_Code"] = refusal.code
        self.answer(json.dumps({"error": refusal.message}).encode(), refusal.status, **headers)

    def answer_bytes(self, body: bytes, **headers: str) -> None:
        """The whole, or the range that is asked for."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(body, **headers)
        first, last = int(span[1]), int(span[2] or len(body) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.answer(body[first : last + 1], 206, **headers)

    # Who may do what

    def token(self) -> Token | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.server.tokens:
            raise RefusedError(401, None, "Invalid credentials in Authorization header")
        return self.server.tokens[given]

    def readable(self, name: str) -> Repository:
        token = self.token()
        repository = self.server.repositories.get(name)
        owns = token is not None and name.split("/")[-2] == token.user
        if repository is None or (repository.private and not owns):
            status = 401 if token is None else 404  # as the Hub, which does not say which it is
            raise RefusedError(status, "RepoNotFound", "Repository not found")
        if repository.gated and not owns:
            raise RefusedError(403, "GatedRepo", "Access to this repository is restricted")
        return repository

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        self.check_writes(name.split("/")[-2])
        return repository

    def check_writes(self, owner: str) -> Token:
        token = self.token()
        if token is None:
            raise RefusedError(401, None, "Invalid username or password.")
        if not token.writes or owner != token.user:
            raise RefusedError(403, None, f"You don't have the rights to write in {owner}")
        return token

    # The API

    def answer_create(self) -> None:
        given = json.loads(self.body)
        token = self.token()
        owner = given["organization"] or (token.user if token else "")
        self.check_writes(owner)
        prefix = "datasets/" if given.get("type") == "dataset" else ""
        name = f"{prefix}{owner}/{given['name']}"
        exists = name in self.server.repositories
        if not exists:
            private = given.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
        answer = {"url": f"{self.server.url}/{name}", "name": f"{owner}/{given['name']}"}
        self.answer_json(answer, 409 if exists else 200)

    def answer_validate(self) -> None:
        self.answer_json({"warnings": [], "errors": []})

    def answer_whoami(self) -> None:
        token = self.token()
        if token is None:
            raise RefusedError(401, None, "Invalid username or password.")
        self.answer_json({"type": "user", "name": token.user, "orgs": []})

    def answer_info(self, repository: str, revision: str = "main") -> None:
        found = self.readable(repository)
        commit = found.resolve(revision)
        self.answer_json(
            {
                "id": repository.removeprefix("datasets/"),
                "sha": commit,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "siblings": [{"rfilename": path} for path in sorted(found.commits[commit])],
                "tags": [],
            }
        )

    def answer_tree(self, repository: str, revision: str, path: str = "") -> None:
        found = self.readable(repository)
        files = found.commits[found.resolve(revision)]
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        entries = [
            entry
            for entry in listed(files, files)
            if PurePosixPath(path) in PurePosixPath(entry["path"]).parents
            and (recursive or PurePosixPath(entry["path"]).parent == PurePosixPath(path))
        ]
        if path and not entries:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        self.answer_json(entries)

    def answer_paths_info(self, repository: str, revision: str) -> None:
        found = self.readable(repository)
        paths = json.loads(self.body)["paths"]
        self.answer_json(listed(found.commits[found.resolve(revision)], paths))

    def answer_preupload(self, repository: str, revision: str) -> None:
        found = self.writable(repository)
        held = found.commits[found.resolve(revision)]
        answers = []
        for path in (entry["path"] for entry in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(LFS_ENDINGS) and self.server.keeps_lfs else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": held[path].etag} if path in held else {}))
        self.answer_json({"files": answers})

    def answer_batch(self, repository: str) -> None:
        self.writable(repository)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = dict(asked)
            if asked["oid"] not in self.server.objects:
                answer["actions"] = self.upload_actions(**asked)
            answers.append(answer)
        self.answer_json({"transfer": "basic", "objects": answers})

    def upload_actions(self, oid: str, size: int) -> dict[str, Any]:
        url = f"{self.server.url}/objects/{oid}"
        actions: dict[str, dict[str, Any]] = {
            "upload": {"href": url},
            "verify": {"href": f"{url}/verify"},
        }
        part = self.server.part_size
        if part is not None and size > part:
            parts = range(1, -(-size // part) + 1)
            header = {"chunk_size": str(part)} | {str(n): f"{url}/{n}" for n in parts}
            actions["upload"] = {"href": f"{url}/complete", "header": header}
        return actions

    def answer_upload(self, oid: str) -> None:
        self.server.keep(oid, self.body)
        self.answer(b"")

    def answer_upload_part(self, oid: str, part: str) -> None:
        self.server.parts.setdefault(oid, {})[int(part)] = self.body
        self.answer(b"", ETag=f'"{sha1(self.body)}"')

    def answer_complete(self, oid: str) -> None:
        named = {entry["partNumber"]: entry["etag"] for entry in json.loads(self.body)["parts"]}
        parts = {number: self.server.parts[oid][number] for number in sorted(named)}
        if named != {number: f'"{sha1(body)}"' for number, body in parts.items()}:
            raise RefusedError(400, None, "the parts are not those that were uploaded")
        self.server.keep(oid, b"".join(parts.values()))
        self.answer_json({"success": True})

    def answer_verify(self, oid: str) -> None:
        given = json.loads(self.body)
        if given["oid"] != oid or len(self.server.objects.get(oid, b"")) != given["size"]:
            raise RefusedError(404, None, f"object {oid} was not uploaded")
        self.answer_json({})

    def answer_commit(self, repository: str, revision: str) -> None:
        found = self.writable(repository)
        files = dict(found.commits[found.resolve(revision)])
        header, *operations = map(json.loads, self.body.splitlines())
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise RefusedError(
                        400, None, f"LFS object {value['oid']} of {path} does not exist"
                    )
                files[path] = File(self.server.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[path]
        commit = found.commit(revision, files, header["value"]["summary"])
        url = f"{self.server.url}/{repository}/commit/{commit}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": commit})

    def answer_tag(self, repository: str, revision: str) -> None:
        found = self.writable(repository)
        found.references[json.loads(self.body)["tag"]] = found.resolve(revision)
        self.answer_json({})

    def answer_branch(self, repository: str, name: str) -> None:
        found = self.writable(repository)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.references[name] = found.resolve(start)
        self.answer_json({})

    # Files

    def answer_file(self, repository: str, revision: str, path: str) -> None:
        found = self.readable(repository)
        commit = found.resolve(revision)
        file = found.commits[commit].get(path)
        if file is None:
            headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": commit}
            return self.answer(b"Entry not found", 404, **headers)
        self.server.downloads.add(path)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{file.etag}"', "Accept_Ranges": "bytes"}
        if not file.lfs:
            return self.answer_bytes(file.body, **headers)
        headers |= {"X_Linked_ETag": f'"{file.etag}"', "X_Linked_Size": str(len(file.body))}
        location = f"{self.server.storage_url}/objects/{file.sha256}"
        return self.answer(b"", 302, Location=location, **headers)

    def answer_object(self, oid: str) -> None:
        self.answer_bytes(self.server.objects[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")


class HubServer(ThreadingHTTPServer):
    """A Hub of one machine.

    Attributes:
        repositories: by name, those of data sets as ``datasets/owner/name``.
        tokens: what they allow, by what the client sends.
        requests: every request so far, as method and path.
        downloads: paths of the files that were asked for.
        cut: says of the number of a request whether its connection breaks ``"during"`` it, half of
            its body read, or ``"after"`` it took effect and before it is answered.
        keeps_lfs: whether large kinds of files are uploaded as LFS objects, or all in the commit.
        part_size: above how many bytes an LFS object is uploaded in parts; ``None`` for never.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host to the client, which sends it no token.
        self.storage_url = f"http://localhost:{self.server_port}"
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {
            "write-token": Token("somebody", writes=True),
            "read-token": Token("somebody", writes=False),
            "other-token": Token("another", writes=True),
        }
        self.requests: list[str] = []
        self.downloads: set[str] = set()
        self.cut: Callable[[int], str | None] = lambda number: None
        self.keeps_lfs = True
        self.part_size: int | None = None

    def stop(self) -> None:
        """Be reached no more."""
        self.shutdown()
        self.server_close()

    def keep(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, None, f"what was uploaded is not object {oid}")
        self.objects[oid] = body


def listed(files: dict[str, File], paths: Iterable[str]) -> list[dict[str, Any]]:
    """Entries of the paths that are there, and of their folders, as the API lists them."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents}
    entries: dict[str, dict[str, Any]] = {}
    for path in paths:
        for folder in [path, *map(str, PurePosixPath(path).parents)]:
            if folder in folders - {"."}:
                entry = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": sha1(folder.encode()),
                }
                entries[folder] = entry
        if path in files:
            file = files[path]
            entry = {"type": "file", "path": path, "size": len(file.body), "oid": file.blob_id}
            if file.lfs:
                size = {"size": len(file.body), "pointerSize": 134}
                entry["lfs"] = {"oid": file.sha256, **size}
            entries[path] = entry
    return [entries[path] for path in sorted(entries)]


def sha1(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """Serve an empty Hub for a while."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
