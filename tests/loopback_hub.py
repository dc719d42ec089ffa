"""A small Hugging Face Hub on loopback: real HTTP for the real client, faults on demand.

It speaks what huggingface_hub 1.x and 2.x need (without Xet) to create, commit (LFS included), branch, list
and download.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"
USERS = {WRITER: ("alice", ["lab"], "write"), READER: ("bob", [], "read")}


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def commit(self, revision: str, files: dict[str, bytes]) -> str:
        content = [(name, hashlib.sha256(data).digest()) for name, data in sorted(files.items())]
        sha = hashlib.sha1(repr(content).encode()).hexdigest()
        self.commits[sha], self.refs[revision] = files, sha
        return sha


class LoopbackHub:
    """`with LoopbackHub() as hub:` ... `hub.url`.

    `hub.faults[word] = [503, "cut", ...]`: what happens to the next requests whose method and path contain
    `word`: a status, "cut" (the connection drops half way), "lost" (done, but the answer is lost), "drip"
    (ten bytes a second), "stall" (one byte), or "hang" (no answer until the server is closed).
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: Counter = Counter()
        self.closed = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # polls quickly
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], **options) -> None:
        """Make a repository with whatever files, as no client of ours would."""
        self.repositories[repo_id] = Repository(**options)
        self.repositories[repo_id].commit("main", dict(files))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self):
        hub, address = self.server_hub, urlsplit(self.path)
        self.path_only, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") else self._sized()
        self.fault, name = None, f"{self.command} {self.path_only}"
        hub.requests[name] += 1
        for word, waiting in hub.faults.items():
            if word in name and waiting:
                self.fault = waiting.pop(0)
                break
        if self.fault == "hang":
            self.close_connection = hub.closed.wait(600)
            return None
        if isinstance(self.fault, int):
            return self._json(
                {"error": f"no: {self.headers.get('Authorization')}"}, self.fault, **{"Retry-After": "86400"}
            )
        self.user = USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        for method, pattern, action in ROUTES:
            if method == self.command and (found := pattern(self.path_only)) is not None:
                return action(self, *found)
        return self._json({"error": f"no route for {name}"}, 404)

    def _sized(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        if self.fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        if self.fault not in ("drip", "stall"):
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            if self.server_hub.closed.wait(0.1 if self.fault == "drip" else None):
                return

    def _json(self, value, status: int = 200, **headers):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository if this user may see (or change) it; else the answer has been given."""
        found = self.server_hub.repositories.get(repo_id)
        mine = self.user and repo_id.split("/")[0] in (self.user[0], *self.user[1])
        if found is None or (found.private and not mine):
            status = 401 if self.user is None else 404
            self._json({"error": "Repository not found"}, status, **{"X-Error-Code": "RepoNotFound"})
        elif write and not (mine and self.user[2] == "write"):
            self._json({"error": "forbidden"}, 403)
        else:
            return found
        return None

    def _files(self, repo_id: str, revision: str):
        repository = self._repository(repo_id)
        if repository is None:
            return None
        found = repository.files(revision)
        if found is None:
            self._json({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        return found

    # What the routes do

    def whoami(self):
        if self.user is None:
            return self._json({"error": "Invalid username or password."}, 401)
        name, orgs, role = self.user
        about = {"type": "user", "name": name, "orgs": [{"name": org} for org in orgs]}
        return self._json(about | {"auth": {"accessToken": {"role": role}}})

    def may_write(self, repo_id):
        if self._repository(repo_id, write=True):
            self._json({})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or (self.user or ('',))[0]}/{asked['name']}"
        if self.user is None:
            return self._json({"error": "Unauthorized"}, 401)
        if repo_id.split("/")[0] not in (self.user[0], *self.user[1]) or self.user[2] != "write":
            return self._json({"error": "forbidden"}, 403)
        url = {"url": f"{self.server_hub.url}/{repo_id}"}
        if repo_id in self.server_hub.repositories:
            return self._json(url | {"error": "You already created this model repo"}, 409)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.server_hub.repositories[repo_id] = Repository(private)
        return self._json(url)

    def branch(self, repo_id, name):
        if repository := self._repository(repo_id, write=True):
            if name in repository.refs:
                return self._json({"error": "exists"}, 409)
            repository.refs[name] = repository.refs["main"]
            self._json({})

    def preupload(self, repo_id, revision):
        if repository := self._repository(repo_id, write=True):
            _, stored = repository.files(revision) or ("", {})
            names = [file["path"] for file in json.loads(self.body)["files"]]
            self._json({"files": [self._upload_mode(name, stored.get(name)) for name in names]})

    @staticmethod
    def _upload_mode(name: str, stored: bytes | None) -> dict:
        """How a file is to be sent; `oid` tells the client whether it has changed."""
        large = name.endswith((".safetensors", ".png"))
        about = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if stored is None:
            return about
        if large:
            return about | {"oid": hashlib.sha256(stored).hexdigest()}
        return about | {"oid": hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()}

    def batch(self, repo_id):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.server_hub.blobs:
                url = f"{self.server_hub.url}/lfs/{asked['oid']}"
                asked["actions"] = {"upload": {"href": url}, "verify": {"href": url + "/verify"}}
            objects.append(asked)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "checksum"}, 400)
        self.server_hub.blobs[oid] = self.body
        return self._json({})

    def verify(self, oid):
        self._json({}, 200 if oid in self.server_hub.blobs else 404)

    def commit(self, repo_id, revision):
        if (repository := self._repository(repo_id, write=True)) is None:
            return
        found = repository.files(revision)
        if found is None:
            return self._json({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        files = dict(found[1])
        for line in filter(None, self.body.split(b"\n")):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
        pull = "create_pr" in self.query
        ref = f"refs/pr/{sum(r.startswith('refs/pr') for r in repository.refs) + 1}" if pull else revision
        sha = repository.commit(ref, files)
        url = f"{self.server_hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        self._json(answer | ({"pullRequestUrl": f"{url}/discussions/{ref.split('/')[-1]}"} if pull else {}))

    def info(self, repo_id, revision="main"):
        if found := self._files(repo_id, revision):
            self._json(self._about(repo_id, *found))

    def _about(self, repo_id, sha, files):
        siblings = [{"rfilename": k, "size": len(v)} for k, v in files.items()]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "siblings": siblings,
            "tags": [],
            "private": False,
            "downloads": 0,
            "likes": 0,
        }

    def tree(self, repo_id, revision):
        if found := self._files(repo_id, revision):
            self._json([self._leaf(k, v) for k, v in found[1].items()])

    def paths(self, repo_id, revision):
        if found := self._files(repo_id, revision):
            asked = json.loads(self.body)["paths"]
            self._json([self._leaf(k, v) for k, v in found[1].items() if k in asked])

    @staticmethod
    def _leaf(path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def models(self):
        wanted, author = self.query.get("filter", []), self.query.get("author", [None])[0]
        rows = []
        for repo_id, repository in self.server_hub.repositories.items():
            sha, files = repository.files("main")
            card = files.get("README.md", b"").decode()
            tagged = all(f"- {tag}\n" in card or f"library_name: {tag}\n" in card for tag in wanted)
            if tagged and not repository.private and (author is None or repo_id.startswith(author + "/")):
                rows.append(self._about(repo_id, sha, files))
        self._json(rows)

    def resolve(self, repo_id, revision, path):
        found = self._files(repo_id, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self._json(
                {"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
        content = files[path]
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if (asked := self.headers.get("Range")) and self.command == "GET":
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], headers)
        return self._send(200, content, headers)


def _route(pattern: str):
    """`/api/models/{id}/x/{rev}`: {id} is two parts of a path, {rest} all that remain, other names one."""
    kinds = {"id": r"([^/]+/[^/]+)", "rest": r"(.+)"}
    parts = re.split(r"\{(\w+)\}", pattern)
    fixed, names = parts[::2], parts[1::2]
    groups = [kinds.get(name, r"([^/]+|refs/pr/\d+)") for name in names] + [""]
    regex = re.compile("".join(re.escape(text) + group for text, group in zip(fixed, groups, strict=True)))
    return lambda path: m.groups() if (m := regex.fullmatch(path)) else None


ROUTES = [
    ("GET", _route("/api/whoami-v2"), _Handler.whoami),
    ("GET", _route("/api/models/{id}/auth-check/write"), _Handler.may_write),
    ("POST", _route("/api/repos/create"), _Handler.create),
    ("POST", _route("/api/validate-yaml"), lambda self: self._json({"errors": [], "warnings": []})),
    ("GET", _route("/api/models"), _Handler.models),
    ("POST", _route("/api/models/{id}/branch/{name}"), _Handler.branch),
    ("POST", _route("/api/models/{id}/preupload/{rev}"), _Handler.preupload),
    ("POST", _route("/api/models/{id}/commit/{rev}"), _Handler.commit),
    ("POST", _route("/api/models/{id}/paths-info/{rev}"), _Handler.paths),
    ("GET", _route("/api/models/{id}/revision/{rev}"), _Handler.info),
    ("GET", _route("/api/models/{id}/tree/{rev}"), _Handler.tree),
    ("GET", _route("/api/models/{id}"), _Handler.info),
    ("POST", _route("/{id}.git/info/lfs/objects/batch"), _Handler.batch),
    ("PUT", _route("/lfs/{oid}"), _Handler.store),
    ("POST", _route("/lfs/{oid}/verify"), _Handler.verify),
    ("GET", _route("/{id}/resolve/{rev}/{rest}"), _Handler.resolve),
    ("HEAD", _route("/{id}/resolve/{rev}/{rest}"), _Handler.resolve),
]
