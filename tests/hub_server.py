"""A Hub on loopback: the HTTP endpoints that huggingface_hub, diffusers and datasets call, with real semantics.

Repositories with branches and commits, private ones, tokens of users, git blobs and LFS objects with checksums, ETags,
ranges and redirects. Faults are injected by the number of the request: an error status, a cut connection, a delay. The
unmodified clients are pointed at it by HF_ENDPOINT, in other processes.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", ...})
        hub.repo("alice/model").files()["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".pt")


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
        content = self.content
        if self.lfs:
            content = b"version https://git-lfs.github.com/spec/v1\n" + (
                f"oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    message: str
    files: dict[str, File]
    oid: str


@dataclass
class Repo:
    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        files = {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        if self.kind == "space":  # the Hub starts a Space with a card
            files["README.md"] = File(
                b"---\ntitle: New\nsdk: gradio\nsdk_version: 5.0.0\napp_file: app.py\n---\n", False
            )
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
        self.ranges: list[str] = []  # Range headers of all so far
        self.fault: Callable[[int, str], str | None] = lambda number, request: None
        self.lock = threading.RLock()
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        # LFS objects have an address of their own, as the Hub's have: clients take the two hosts differently
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        ports = [server.server_address[1] for server in self.servers]
        # Two host names, as the real ones are: the client sends its token to the first only.
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> "HubServer":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def create(self, repo_id: str, kind: str = "model", private: bool = False, files: dict | None = None) -> Repo:
        """A repository, made by the test itself; `files`: path -> bytes."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        if files:
            stored = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            self.objects |= {f.sha256: f.content for f in stored.values() if f.lfs}
            repo.add("main", "files", repo.at("main").files | stored)
        return repo


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
ROUTES = [  # method, path, name of the handling method; the first that matches serves
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("PUT", rf"/api/{KIND}/{REPO}/settings", "settings"),
    ("POST", rf"/api/{KIND}/{REPO}/branch/(?P<rev>[^/]+)", "create_branch"),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{KIND}/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("GET", rf"/api/{KIND}/{REPO}/tree/(?P<rev>[^/]+)(?P<path>/.*)?", "tree"),
    ("GET", rf"/api/{KIND}/{REPO}/refs", "refs"),
    ("GET", rf"/api/{KIND}/{REPO}/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"/api/{KIND}/{REPO}", "info"),
    ("POST", rf"/(?P<kind>datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs-storage/(?P<oid>\w{64})", "lfs_put"),
    ("GET", r"/lfs-storage/(?P<oid>\w{64})", "lfs_get"),
    ("POST", r"/lfs-verify", "lfs_verify"),
    ("GET", rf"/(?P<kind>datasets/|spaces/)?{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers):
        self.status, self.message, self.code, self.headers = status, message, code, headers


class HubHandler(BaseHTTPRequestHandler):
    """One request. Writes need a token of the repo's owner; private repos do not exist for anyone else."""

    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_) -> None:  # tests read `requests` instead
        pass

    def do(self) -> None:
        hub, split = self.server_hub, urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            number = len(hub.requests) - 1
        fault = hub.fault(number, hub.requests[number])
        if fault and fault.startswith("slow "):
            time.sleep(float(fault.split()[1]))
            fault = None
        if fault == "cut before":
            self.cut()
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.read_chunks()
        if fault == "cut after reading":
            self.cut()
            return
        if fault and fault.isdigit():
            self.answer({"error": "injected"}, int(fault), **({"Retry-After": "1"} if fault == "429" else {}))
            return
        self.cut_after = fault == "cut after"  # done, but the answer is lost
        self.cut_half = fault == "cut half"  # only half of the answer arrives
        hub.ranges.extend([self.headers["Range"]] if self.headers.get("Range") else [])
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, split.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    with hub.lock:
                        getattr(self, name)(**{k: unquote(v) if v else v for k, v in match.groupdict().items()})
                    return
            raise Refusal(404, f"no such endpoint: {self.command} {path}")
        except Refusal as refusal:
            headers = dict(refusal.headers)
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer({"error": refusal.message}, refusal.status, **headers)

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
        if getattr(self, "cut_after", False):
            self.cut()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if getattr(self, "cut_half", False) and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.cut()
        elif self.command != "HEAD":
            self.wfile.write(body)

    # ---- who, and what they may ----

    def user(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return None
        if token not in self.server_hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server_hub.tokens[token]

    def find(self, kind: str | None, repo: str, write: bool = False) -> Repo:
        found = self.server_hub.repos.get(((kind or "models").rstrip("/").removesuffix("s"), repo))
        user, owner = self.user(), repo.split("/")[0]
        if found is None or (found.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, f"you do not have write access to {repo}") if user else Refusal(401, "no token")
        return found

    def revision(self, repo: Repo, rev: str | None) -> Commit:
        commit = repo.at(rev or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        self.answer({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"accessToken": token}})

    # ---- repositories ----

    def create_repo(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner, kind = wanted.get("organization") or user, wanted.get("type") or "model"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {owner}")
        if kind == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "a Space needs an sdk")
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.server_hub.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        if (kind, repo_id) in self.server_hub.repos:
            self.answer({"error": "You already created this repo", "url": url}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server_hub.create(repo_id, kind, private)
        self.answer({"url": url, "name": repo_id, "id": repo_id})

    def settings(self, kind: str, repo: str) -> None:
        found, wanted = self.find(kind, repo, write=True), json.loads(self.body)
        if "visibility" in wanted:
            found.private = wanted["visibility"] == "private"
        self.answer({})

    def create_branch(self, kind: str, repo: str, rev: str) -> None:
        found = self.find(kind, repo, write=True)
        if rev in found.branches:
            raise Refusal(409, "Reference already exists")
        found.branches[rev] = list(found.branches["main"])
        self.answer({})

    def info(self, kind: str, repo: str, rev: str | None = None) -> None:
        found = self.find(kind, repo)
        commit = self.revision(found, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        now = "2026-01-01T00:00:00.000Z"
        self.answer(
            {
                "id": found.id,
                "sha": commit.oid,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": now,
                "createdAt": now,
                "gated": False,
                "disabled": False,
            }
        )

    def refs(self, kind: str, repo: str) -> None:
        found = self.find(kind, repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in found.branches.items()
            if not name.startswith("refs/pr/")
        ]
        self.answer({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

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

    def tree(self, kind: str, repo: str, rev: str, path: str | None = None) -> None:
        commit = self.revision(self.find(kind, repo), rev)
        folder = (path or "").strip("/")
        entries = self.entries(commit, folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if folder and not entries:
            raise Refusal(404, "path does not exist", "EntryNotFound")
        self.answer(entries)

    def paths_info(self, kind: str, repo: str, rev: str) -> None:
        commit = self.revision(self.find(kind, repo), rev)
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        everything = {e["path"]: e for e in self.entries(commit, "", recursive=True)}
        wanted = [paths] if isinstance(paths, str) else paths
        self.answer([everything[p] for p in wanted if p in everything])

    def resolve(self, kind: str | None, repo: str, rev: str, path: str) -> None:
        commit = self.revision(self.find(kind, repo), rev)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            location = f"{self.server_hub.storage_url}/lfs-storage/{file.sha256}"
            self.answer(b"", 302, **headers, Location=location)
        else:
            self.content(file.content, ETag=f'"{file.blob_id}"', **headers)

    def content(self, content: bytes, **headers) -> None:
        """A file, or the range of it that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers["Content-Type"] = "application/octet-stream"
        if wanted is None:
            self.answer(content, **headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start > end:
            self.answer(b"", 416, **{"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(content[start : end + 1], 206, **headers)

    # ---- uploads ----

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            metadata = yaml.safe_load(block[1]) if block else {}
            if not isinstance(metadata, dict):
                raise ValueError("the metadata is no mapping")
        except (yaml.YAMLError, ValueError) as e:
            self.answer({"errors": [{"message": str(e)}], "warnings": []}, 400)
            return
        self.answer({"errors": [], "warnings": [] if metadata else [{"message": "empty metadata"}]})

    def preupload(self, kind: str, repo: str, rev: str) -> None:
        commit = self.revision(self.find(kind, repo, write=True), rev)
        files = []
        for wanted in json.loads(self.body)["files"]:
            existing = commit.files.get(wanted["path"])
            mode = "lfs" if wanted["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            if existing is not None:
                answer["oid"] = existing.sha256 if existing.lfs else existing.blob_id
            files.append(answer)
        self.answer({"files": files, "commitOid": commit.oid})

    def lfs_batch(self, kind: str | None, repo: str) -> None:
        self.find(kind, repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server_hub.storage_url}/lfs-storage/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.server_hub.url}/lfs-verify", "header": {}},
                }
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have that hash")
        self.server_hub.objects[oid] = self.body
        self.answer(b"")

    def lfs_get(self, oid: str) -> None:
        if oid not in self.server_hub.objects:
            raise Refusal(404, "no such object")
        self.content(self.server_hub.objects[oid], ETag=f'"{oid}"')

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.server_hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "no such object of that size")
        self.answer({})

    def commit(self, kind: str, repo: str, rev: str) -> None:
        """All or nothing: the files change together at the end, in one new commit."""
        found = self.find(kind, repo, write=True)
        files, message = dict(self.revision(found, rev).files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.objects:
                    raise Refusal(400, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = File(self.server_hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        pull_request = None
        if "create_pr" in self.query:
            rev = f"refs/pr/{sum(b.startswith('refs/pr/') for b in found.branches) + 1}"
            found.branches[rev] = list(found.branches["main"])
            pull_request = f"{self.server_hub.url}/{repo}/discussions/{rev.split('/')[-1]}"
        commit = found.add(rev, message, files)
        url = f"{self.server_hub.url}/{repo}/commit/{commit.oid}"
        self.answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "pullRequestUrl": pull_request})
