"""A fake Hugging Face hub on loopback that accepts and serves small files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_loopback-secret-that-no-log-may-show"


class Hub:
    """Repositories by name: {path: content}. `private`: the visibility that was requested when a repository was
    created."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.refusal: int | None = None
        """Status of the answers to commits; None: they are accepted."""

    def environment(self, home: Path) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[2:3] == ["resolve"]:
            return self._file("/".join(parts[:2]), "/".join(parts[4:]))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            url = {"url": f"{self.url}/{name}", "name": name}
            if name in self.files:
                return 409, {"error": "You already created this model repo", **url}
            self.files[name], self.private[name] = {}, asked.get("private", asked.get("visibility") == "private")
            return 200, url
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        name, kind = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            }
        if kind == "commit":
            return self._commit(name, body)
        if kind == "tree":
            return 200, [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in self.files[name].items()
            ]
        return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "private": self.private[name]}

    def _file(self, name: str, path: str) -> tuple[int, object]:
        content = self.files.get(name, {}).get(path)
        return (404, {"error": "Entry not found"}) if content is None else (200, content)

    def _commit(self, name: str, body: bytes) -> tuple[int, object]:
        if self.refusal is not None:
            return self.refusal, {"error": f"no, {TOKEN} may not"}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del self.files[name][entry["value"]["path"]]
        self.commits += 1
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}"}


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, content = hub.answer(self.command, self.path, body) if known else (401, {"error": "who are you"})
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(text).hexdigest()}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_HEAD = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
