"""A hub on this machine: the endpoints that huggingface_hub calls to make a repository, upload to it and read it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_test_of_liborth"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"").hexdigest()])


class Hub(ThreadingHTTPServer):
    """Repositories by name; `log` has every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[str] = []
        self.refuse: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, document=None, status=200, raw=None, **headers):
        body = json.dumps(document if document is not None else {}).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(size), unquote(self.path).partition("?")[0]
        self.server.log.append(f"{self.command} {path}")
        status = next((code for part, code in self.server.refuse.items() if part in path), 0)
        if status:
            self.answer({"error": "refused"}, status)
        elif not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "who are you?"}, 401)
        else:
            return path, body
        return None, b""

    def do_PUT(self):
        path, body = self.begin()
        if path is not None:
            oid = path.removeprefix("/store/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.stored[oid] = body
            self.answer(raw=b"")

    def do_GET(self):
        path, _ = self.begin()
        if path is None:
            return
        if "/resolve/" in path:
            self.file(path)
            return
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        repo = self.server.repos.get(name)
        if repo is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": file} for file in sorted(repo.files)]
        known = {"id": name, "modelId": name, "private": repo.private, "sha": repo.commits[-1], "siblings": siblings}
        if "/tree/" in path:
            self.answer([{"type": "file", "path": file, "size": len(raw), "oid": "0" * 40} for file, raw in repo.files.items()])
        else:
            self.answer({**known, "tags": [], "downloads": 0})

    do_HEAD = do_GET  # noqa: N815

    def file(self, path):
        name, _, rest = path.strip("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        repo = self.server.repos[name]
        raw = repo.files[file]
        sha = repo.commits[-1] if commit == "main" else commit
        self.answer(raw=raw, ETag=f'"{hashlib.sha1(raw).hexdigest()}"', X_Repo_Commit=sha)

    def do_POST(self):
        path, body = self.begin()
        if path is None:
            return
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.server.repos else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos.setdefault(name, Repo(bool(private)))
            self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name}, status)
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            put = lambda oid: {"upload": {"href": f"{self.server.address}/store/{oid}"}}  # noqa: E731
            self.answer({"transfer": "basic", "objects": [{**one, "actions": put(one["oid"])} for one in objects]})
        elif "/preupload/" in path:
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"  # noqa: E731
            files = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            self.commit("/".join(path.removeprefix("/api/models/").split("/")[:2]), body)
        else:
            self.answer({"error": f"no such endpoint: {path}"}, 404)

    def commit(self, name, body):
        repo, lines = self.server.repos[name], [json.loads(line) for line in body.decode().splitlines() if line]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.stored[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        repo.commits.append(oid)
        url = f"{self.server.address}/{name}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
