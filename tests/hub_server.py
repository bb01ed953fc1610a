"""A hub on this machine: what huggingface_hub asks of one for models, over files that are given as bytes.

It refuses as it is told to, cuts a download, counts what was asked, and keeps what is pushed.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "someone/tiny"


class Hub:
    """Repositories by name, and what befalls those who ask.

    Args:
        refusals: request's beginning -> status, headers, and how often it is refused.
        cut: bytes after which the next download of a file of that name ends early, once.
        asked: "METHOD path" of every request, in order, and what its Range header said.
        tokens: that were sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # name -> branch -> files
        self.private: set[str] = set()
        self.refusals: dict[str, tuple[int, Mapping[str, str], int]] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.tokens: set[str] = set()
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self.url = ""

    def add(self, folder: Path, repo: str = REPO) -> str:
        """Have the files of a folder as `main` of a repository; returns the commit."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        self.repos[repo] = {"main": files}
        return commit_of(files)

    def refuse(self, beginning: str, status: int, times: int = 1000, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.refusals[beginning] = status, named, times

    def count(self, beginning: str) -> int:
        return sum(line.startswith(beginning) for line, _ in self.asked)


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((f"{self.command} {path}", self.headers.get("Range")))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for beginning, (status, headers, times) in self.hub.refusals.items():
            if times and f"{self.command} {path}".startswith(beginning):
                self.hub.refusals[beginning] = status, headers, times - 1
                return self._send(status, b'{"error": "as told"}', headers)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *match.groups())
        self._send(404, b"{}")

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Of a branch or commit; None after an answer that there is none."""
        branches = self.hub.repos.get(repo)
        if branches is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        named = branches | {commit_of(files): files for files in branches.values()}
        if revision not in named:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return named[revision]

    # ---- fetching

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        files = self._files(repo, revision or "main")
        if files is not None:
            names = [{"rfilename": name} for name in files]
            private = repo in self.hub.private
            self._json({"id": repo, "sha": commit_of(files), "siblings": names, "private": private, "tags": []})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is not None:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )

    def file(self, _: bytes, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        if name not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(files)})
        content, status, extra = files[name], 200, {}
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(content)), **extra}
        if self.command == "GET" and name in self.hub.cut:
            content = content[: self.hub.cut.pop(name)]
            self.close_connection = True
        self._send(status, content, headers)

    # ---- pushing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            self.hub.repos[repo] = {"main": {}}
            self.hub.private |= {repo} if asked.get("visibility") == "private" or asked.get("private") else set()
        self._json({"url": f"{self.hub.url}/{repo}", "error": "You already created this model repo"}, status)

    def branch(self, _: bytes, repo: str, name: str) -> None:
        branches = self.hub.repos[repo]
        status = 409 if name in branches else 200
        branches.setdefault(name, dict(branches["main"]))
        self._json({}, status)

    def yaml(self, body: bytes) -> None:
        bad = "base_model: /" in json.loads(body)["content"]
        errors = [{"message": '"base_model" is no model id'}] if bad else []
        self._json({"errors": errors, "warnings": []}, 400 if bad else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"}
            for file in files
        ]  # fmt: skip
        self._json({"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            there = wanted["oid"] in self.hub.stored
            upload = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/store/{wanted['oid']}"}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **upload})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.repos[repo][revision]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        oid = commit_of(files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})


NAME, PART = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = [
    (rf"GET /api/models/{NAME}", _Handler.info),
    (rf"GET /api/models/{NAME}/revision/{PART}", _Handler.info),
    (rf"GET /api/models/{NAME}/tree/{PART}", _Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/{PART}/(.+)", _Handler.file),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{NAME}/branch/{PART}", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.yaml),
    (rf"POST /api/models/{NAME}/preupload/{PART}", _Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /store/(\w+)", _Handler.store),
    (rf"POST /api/models/{NAME}/commit/{PART}", _Handler.commit),
]
