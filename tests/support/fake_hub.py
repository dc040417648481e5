"""The Hugging Face hub's HTTP interface, as far as a model's upload asks it, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_writes"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub got.

    Attributes:
        address: where it listens.
        repositories: by name, the request that made it.
        branches: that were made.
        objects: contents of large files by their sha256.
        files: by name, what was committed.
        commits: each commit's branch and message.
        asked: every request, method and path.
    """

    address: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, which takes `TOKEN` alone."""
    hub = Hub()

    class Answer(_Answer):
        """To requests of this hub."""

        known = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Answer(BaseHTTPRequestHandler):
    known: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """What a repository holds."""
        hub, path = self._begin()
        name = path.removeprefix("/api/models/").split("/revision/")[0]
        if path.startswith("/api/models/") and name in hub.repositories:
            self._say({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0})
        else:
            self._say({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        """A large file's bytes."""
        hub, path = self._begin()
        hub.objects[path.rsplit("/", 1)[1]] = self._body()
        self._say({})

    def do_POST(self) -> None:
        """Everything else."""
        hub, path = self._begin()
        body = self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._say({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(hub, json.loads(body))
        elif path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif "/branch/" in path:
            hub.branches.append(path.rsplit("/", 1)[1])
            self._say({})
        elif "/preupload/" in path:
            asked = [each["path"] for each in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in asked}
            files = [{"path": n, "uploadMode": mode, "shouldIgnore": False, "oid": None} for n, mode in modes.items()]
            self._say({"files": files})
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.address}/bytes/{o['oid']}"}}} for o in objects]
            self._say({"transfer": "basic", "objects": actions})
        elif "/commit/" in path:
            self._commit(hub, path.rsplit("/", 1)[1], body)
        else:
            self._say({"error": f"no such thing: {path}"}, 404)

    def _create(self, hub: Hub, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        if asked.get("organization") == "stranger":
            self._say({"error": "You don't have the rights"}, 403)
            return
        status = 409 if name in hub.repositories else 200
        hub.repositories.setdefault(name, asked)
        self._say({"url": f"{hub.address}/{name}", "id": name}, status)

    def _commit(self, hub: Hub, branch: str, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append((branch, value["summary"]))
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                hub.files[value["path"]] = content
        address = f"{hub.address}/{next(iter(hub.repositories))}/commit/{COMMIT}"
        self._say({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})

    def _begin(self) -> tuple[Hub, str]:
        path = urlsplit(self.path).path
        self.known.asked.append(f"{self.command} {path}")
        return self.known, path

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, answer: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A context in which huggingface_hub takes it for the hub."""
    with serving() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # files go by HTTP, not by the hub's own storage
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
