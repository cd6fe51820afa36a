"""A Hub on loopback: the HTTP endpoints that huggingface_hub, diffusers and datasets call, with real semantics.

Repositories with branches and commits, private ones, tokens of users, git blobs and LFS objects with checksums, ETags
and redirects. Faults are injected by the number of the request: an error status, a cut connection. Unmodified
clients are pointed at it by HF_ENDPOINT.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".onnx", ".parquet", ".png", ".bin", ".pt")


@dataclass(frozen=True)
class File:
    """The content of a file, and whether it is kept as a git blob or as an LFS object."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """git's hash: of the content, or of the pointer that stands for an LFS object."""
        content, size = self.content, len(self.content)
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    message: str
    files: dict[str, File]
    oid: str


@dataclass
class Repo:
    repo_type: str  # "model", "dataset" or "space"
    id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        files = {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        if self.repo_type == "space":  # the Hub starts a static Space with a card and a page
            files["index.html"] = File(b"<h1>Welcome to your static Space!</h1>", False)
            files["style.css"] = File(b"", False)
            files["README.md"] = File(b"---\ntitle: New\nsdk: static\n---\n", False)
        self.add("main", "initial commit", files)

    def add(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        history = self.branches.setdefault(branch, [])
        seed = json.dumps([self.id, branch, len(history), message, sorted((p, f.blob_id) for p, f in files.items())])
        history.append(Commit(message, files, hashlib.sha1(seed.encode()).hexdigest()))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch name, a PR reference or a commit hash means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.at(revision).files.items()}


class HubServer:
    """Serves until the `with` block ends. `tokens`: token -> user; a user may write to repos under their own name."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens, self.repos, self.objects = tokens, {}, {}
        self.requests: list[str] = []  # "METHOD /path" of all so far
        self.fault: Callable[[int, str], str | None] = lambda number, request: None
        self.lock = threading.RLock()
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        ports = [server.server_address[1] for server in self.servers]
        # LFS objects have a host of their own, as on the Hub: the client sends its token to the first only.
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> "HubServer":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def create(self, repo_id: str, repo_type: str = "model", private: bool = False, files: dict | None = None) -> Repo:
        """A repository, made by the test itself; `files`: path -> bytes."""
        repo = self.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private)
        if files:
            stored = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            self.objects |= {f.sha256: f.content for f in stored.values() if f.lfs}
            repo.add("main", "files", repo.at("main").files | stored)
        return repo


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
TYPE = r"(?P<repo_type>models|datasets|spaces)"
ROUTES = [  # method, path, name of the handling method; the first that matches serves
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/{TYPE}/{REPO}/branch/(?P<rev>[^/]+)", "create_branch"),
    ("POST", rf"/api/{TYPE}/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{TYPE}/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("GET", rf"/api/{TYPE}/{REPO}/tree/(?P<rev>[^/]+)(?P<path>/.*)?", "tree"),
    ("GET", rf"/api/{TYPE}/{REPO}/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"/api/{TYPE}/{REPO}", "info"),
    ("POST", rf"/(?P<repo_type>datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs-storage/(?P<oid>\w{64})", "lfs_put"),
    ("GET", r"/lfs-storage/(?P<oid>\w{64})", "lfs_get"),
    ("GET", rf"/(?P<repo_type>datasets/|spaces/)?{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers):
        self.status, self.message = status, message
        self.headers = headers | ({"X-Error-Code": code} if code else {})


class HubHandler(BaseHTTPRequestHandler):
    """One request. Writes need a token of the repo's owner; private repos do not exist for anyone else."""

    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_) -> None:  # tests read `requests` instead
        pass

    def do(self) -> None:
        hub, split = self.server_hub, urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.read_chunks()
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            number = len(hub.requests) - 1
        fault = hub.fault(number, hub.requests[number]) or ""
        if fault == "cut before":
            self.cut()
            return
        self.cut_after = fault == "cut after"  # done, but the answer is lost
        try:
            if fault[:3].isdigit():  # a status, and perhaps the Hub's code of the error
                raise Refusal(int(fault[:3]), "injected", fault[4:] or None)
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, split.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    with hub.lock:
                        getattr(self, name)(**{k: unquote(v) if v else v for k, v in match.groupdict().items()})
                    return
            raise Refusal(404, f"no such endpoint: {self.command} {path}")
        except Refusal as refusal:
            self.answer({"error": refusal.message}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, content, status: int = 200, **headers) -> None:
        if self.cut_after:
            self.cut()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- who, and what they may ----

    def user(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return None
        if token not in self.server_hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server_hub.tokens[token]

    def find(self, repo_type: str | None, repo: str, write: bool = False) -> Repo:
        target = self.server_hub.repos.get(((repo_type or "models").rstrip("/").removesuffix("s"), repo))
        user, owner = self.user(), repo.split("/")[0]
        if target is None or (target.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not target", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, f"you do not have write access to {repo}") if user else Refusal(401, "no token")
        return target

    def revision(self, repo: Repo, rev: str | None) -> Commit:
        commit = repo.at(rev or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    # ---- repositories ----

    def create_repo(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner, repo_type = wanted.get("organization") or user, wanted.get("type") or "model"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a {repo_type} under the namespace {owner}")
        if repo_type == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "a Space needs an sdk")
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.server_hub.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        if (repo_type, repo_id) in self.server_hub.repos:
            self.answer({"error": "You already created this repo", "url": url}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server_hub.create(repo_id, repo_type, private)
        self.answer({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_type: str, repo: str, rev: str) -> None:
        target = self.find(repo_type, repo, write=True)
        target.branches[rev] = list(target.branches["main"])
        self.answer({})

    def info(self, repo_type: str, repo: str, rev: str | None = None) -> None:
        target = self.find(repo_type, repo)
        commit = self.revision(target, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        more = {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        more |= dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        self.answer({"id": target.id, "sha": commit.oid, "private": target.private, "siblings": siblings, **more})

    # ---- files ----

    def entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        return entry

    def entries(self, commit: Commit, folder: str, recursive: bool) -> list[dict]:
        prefix, seen = f"{folder}/" if folder else "", {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    seen.setdefault(name, {"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
            if recursive or len(parts) == 1:
                seen[path] = self.entry(path, file)
        return list(seen.values())

    def tree(self, repo_type: str, repo: str, rev: str, path: str | None = None) -> None:
        commit = self.revision(self.find(repo_type, repo), rev)
        folder = (path or "").strip("/")
        entries = self.entries(commit, folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if folder and not entries:
            raise Refusal(404, "path does not exist", "EntryNotFound")
        self.answer(entries)

    def resolve(self, repo_type: str | None, repo: str, rev: str, path: str) -> None:
        commit = self.revision(self.find(repo_type, repo), rev)
        if path not in commit.files:
            raise Refusal(404, "Entry not target", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            location = f"{self.server_hub.storage_url}/lfs-storage/{file.sha256}"
            self.answer(b"", 302, **headers, Location=location)
        else:
            self.answer(file.content, ETag=f'"{file.blob_id}"', **headers)

    # ---- uploads ----

    def validate_yaml(self) -> None:
        block = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        metadata = (yaml.safe_load(block[1]) if block else None) or {}
        errors = [{"message": '"license" must be one of many'}] if metadata.get("license") == "Apache" else []
        warnings = [] if metadata else [{"message": "empty metadata"}]
        self.answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, repo_type: str, repo: str, rev: str) -> None:
        commit = self.revision(self.find(repo_type, repo, write=True), rev)
        files = []
        for wanted in json.loads(self.body)["files"]:
            existing = commit.files.get(wanted["path"])
            mode = "lfs" if wanted["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            if existing is not None:
                answer["oid"] = existing.sha256 if existing.lfs else existing.blob_id
            files.append(answer)
        self.answer({"files": files, "commitOid": commit.oid})

    def lfs_batch(self, repo_type: str | None, repo: str) -> None:
        self.find(repo_type, repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.objects:
                href = f"{self.server_hub.storage_url}/lfs-storage/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have that hash")
        self.server_hub.objects[oid] = self.body
        self.answer(b"")

    def lfs_get(self, oid: str) -> None:
        self.answer(self.server_hub.objects[oid], ETag=f'"{oid}"')

    def commit(self, repo_type: str, repo: str, rev: str) -> None:
        """All or nothing: the files change together at the end, in one new commit."""
        target = self.find(repo_type, repo, write=True)
        files, message = dict(self.revision(target, rev).files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.objects:
                    raise Refusal(400, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = File(self.server_hub.objects[value["oid"]], True)
        commit = target.add(rev, message, files)
        url = f"{self.server_hub.url}/{repo}/commit/{commit.oid}"
        self.answer({"success": True, "commitOid": commit.oid, "commitUrl": url})
