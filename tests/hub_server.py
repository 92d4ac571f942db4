# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that speaks as much of the Hub's HTTP protocol as the stock client uses for models.

Written from the client's source (huggingface_hub 1.33 and 2.4): whoami, repo creation, branches, pre-upload, the LFS
batch API with upload to and download from another host, commits as NDJSON, resolve, tree, model info, and the error
codes by which the client tells its exceptions apart. Xet is not spoken: run the client with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0%s" % (len(self.content), self.content)).hexdigest()


@dataclass
class Repo:
    owner: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> path -> file

    def __post_init__(self) -> None:
        self.commit("main", {}, b"initial commit")

    def commit(self, branch: str, files: dict[str, File], data: bytes) -> str:
        sha = hashlib.sha1(self.branches.get(branch, "").encode() + data).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    status: int


class HubError(Exception):
    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubServer(ThreadingHTTPServer):
    """`users` maps tokens to names; `requests` has everything that was asked, in order."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.verified: set[str] = set()
        self.requests: list[Request] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # another host for the client, as the Hub's own storage is: no token may reach it
        self.storage_endpoint = f"http://localhost:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    def text(self, repo_id: str, path: str, revision: str = "main") -> str:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[revision]][path].content.decode()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.body = self.read_body()
        try:
            status, headers, content = self.answer(path)
        except HubError as error:
            status, headers, content = error.status, error.headers, {"error": str(error)}
        self.server.requests.append(Request(self.command, path, self.token, status))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, path: str) -> tuple[int, dict[str, str], Any]:
        method = self.command.replace("HEAD", "GET")
        for verb, pattern, handle in ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                return handle(self, **match.groupdict())
        raise HubError(501, None, f"{self.command} {path} is not spoken here")

    # ---- who may do what --------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        if self.token is not None and self.token not in self.server.users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self.server.users.get(self.token or "")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and repo.owner != user:
            raise HubError(403, None, "You are not allowed to write to this repository")
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    # ---- the endpoints ----------------------------------------------------------------------------------------------

    def whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        return 200, {}, {"type": "user", "name": user, "orgs": []}

    def create(self) -> Any:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        if asked.get("organization") not in (None, user):
            raise HubError(403, None, f"You don't have the rights to create a model under {asked['organization']}")
        repo_id = f"{user}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repos:
            return 409, {}, {"error": "You already created this model repo", **url}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[repo_id] = Repo(user, private)
        return 200, {}, url

    def validate_yaml(self) -> Any:
        self.user()
        return 200, {}, {}

    def branch(self, repo_id: str, name: str) -> Any:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise HubError(409, None, f"Reference already exists: {name}")
        repo.branches[name] = self.files(repo, json.loads(self.body).get("startingPoint", "main"))[0]
        return 200, {}, {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        _, files = self.files(self.repo(repo_id, write=True), revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            known = {"oid": files[path].oid} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {}, {"files": answers}

    def lfs_batch(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        objects: list[dict[str, Any]] = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.storage:
                upload = f"{self.server.storage_endpoint}/storage/{item['oid']}?signature=put"
                verify = f"{self.server.endpoint}/{repo_id}.git/info/lfs/objects/verify"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        asked = json.loads(self.body)
        if len(self.server.storage.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, None, "The object was not uploaded")
        self.server.verified.add(asked["oid"])
        return 200, {}, {}

    def storage(self, oid: str) -> Any:
        if self.command != "PUT":
            return 200, {"ETag": f'"{oid}"'}, self.server.storage[oid]
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "The content does not match its SHA-256")
        self.server.storage[oid] = self.body
        return 200, {"ETag": f'"{oid}"'}, {}

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id, write=True)
        files = dict(self.files(repo, revision)[1])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.verified:
                    raise HubError(400, None, f"LFS pointer to a missing object: {value['path']}")
                files[value["path"]] = File(self.server.storage[value["oid"]], is_lfs=True)
        sha = repo.commit(revision, files, self.body)
        return 200, {}, {"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self.repo(repo_id)
        sha, files = self.files(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        return 200, {}, {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> Any:
        sha, files = self.files(self.repo(repo_id), revision)
        entries = []
        for path, file in files.items():
            if folder is None or path.startswith(f"{folder}/"):
                entries.append({"type": "file", "path": path, "size": len(file.content), "oid": file.oid})
        if folder is not None and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}", **{"X-Repo-Commit": sha})
        return 200, {}, entries

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        sha, files = self.files(self.repo(repo_id), revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if not file.is_lfs:
            return 200, headers, file.content
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        location = f"{self.server.storage_endpoint}/storage/{file.oid}?signature=get"
        return 302, {**headers, **linked, "Location": location}, b""


ID, REVISION = r"(?P<repo_id>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{ID}/branch/(?P<name>.+)", Handler.branch),
    ("POST", rf"/api/models/{ID}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{ID}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{ID}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]+)", Handler.storage),
    ("GET", r"/storage/(?P<oid>[0-9a-f]+)", Handler.storage),
    ("GET", rf"/api/models/{ID}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api/models/{ID}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("GET", rf"/{ID}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", rf"/api/models/{ID}", Handler.info),
]
