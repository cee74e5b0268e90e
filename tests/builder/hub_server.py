"""The part of the Hugging Face hub's protocol that downloads need, on loopback, with its failures.

A repository's listing, its files' addresses with commit and hash in the headers, a redirect of the
large files to another host name, and ranges. What goes wrong is set by path.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "tencent/HunyuanVideo-Avatar"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_SUFFIXES = (".pt", ".safetensors")  # kept by LFS: the hub knows their sha256


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class HubServer:
    """One repository at one commit."""

    files: dict[str, bytes]
    repository: str = REPOSITORY
    commit: str = COMMIT
    cut_at: dict[str, list[int]] = field(default_factory=dict)  # bytes of each answer, in turn
    held_at: dict[str, int] = field(default_factory=dict)  # bytes after which an answer waits ...
    release: threading.Event = field(default_factory=threading.Event)  # ... for this
    waiting: threading.Event = field(default_factory=threading.Event)  # an answer waits
    status: dict[str, list[int]] = field(default_factory=dict)  # of the next answers, in turn
    served_instead: dict[str, bytes] = field(default_factory=dict)  # than what the listing says
    listed_bytes: dict[str, int] = field(default_factory=dict)  # sizes that the listing says
    token: str | None = None  # that files need
    ignores_ranges: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # served: file, Range
    large_file_authorizations: list[str | None] = field(default_factory=list)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes huggingface_hub talk to this server."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def ranges(self, path: str) -> list[str | None]:
        """The ranges that were asked of a file; None: all of it."""
        return [asked for name, asked in self.requests if name == path]

    def siblings(self) -> list[dict[str, Any]]:
        return [
            {"rfilename": path} | self._facts(path, "blobId", "pointerSize") for path in self.files
        ]

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path} | self._facts(path, "oid", "pointerSize")
            for path in self.files
        ]

    def _facts(self, path: str, git_name: str, pointer_name: str) -> dict[str, Any]:
        content = self.files[path]
        size = self.listed_bytes.get(path, len(content))
        facts: dict[str, Any] = {"size": size, git_name: git_sha1(content)}
        if path.endswith(LARGE_SUFFIXES):
            sha256 = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"size": size, "sha256": sha256, "oid": sha256, pointer_name: 134}
        return facts


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{hub.repository}"):
            if self._refused("listing"):
                return
            content: Any = {"id": hub.repository, "sha": hub.commit, "siblings": hub.siblings()}
            if "/tree/" in path:
                content = hub.tree()
            revision = path.split("/")[6] if path.count("/") > 4 else "main"
            if revision not in ("main", hub.commit):
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return
            self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())
        elif path.startswith(f"/{hub.repository}/resolve/{hub.commit}/"):
            self._resolve(path.split(f"/resolve/{hub.commit}/")[1], body)
        elif path.startswith("/cdn/"):
            hub.large_file_authorizations.append(self.headers.get("Authorization"))
            self._content(path.removeprefix("/cdn/"), body)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, name: str, body: bool) -> None:
        hub = self.hub
        if self._refused(name):
            return
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, {"X-Error-Code": "GatedRepo"})
            return
        if name not in hub.files:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE_SUFFIXES):
            content = hub.files[name]
            headers = {
                "Location": f"http://localhost:{self.connection.getsockname()[1]}/cdn/{name}",
                "X-Repo-Commit": hub.commit,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
            self._send(302, headers)
        else:
            self._content(name, body)

    def _content(self, name: str, body: bool) -> None:
        hub = self.hub
        content = hub.served_instead.get(name, hub.files[name])
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{git_sha1(hub.files[name])}"'}
        start = 0
        if (asked := self.headers.get("Range")) and not hub.ignores_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status = 206 if "Content-Range" in headers else 200
        if not body:
            self._send(status, headers, content[start:], body=False)
            return
        hub.requests.append((name, self.headers.get("Range")))
        end = hub.cut_at[name].pop(0) if hub.cut_at.get(name) else len(content)
        held = hub.held_at.pop(name, None)
        self._headers(status, headers | {"Content-Length": str(len(content) - start)})
        if held is not None:
            self.wfile.write(content[start:held])
            self.wfile.flush()
            hub.waiting.set()
            hub.release.wait(60)
            start = held
        self.wfile.write(content[start : max(start, end)])
        self.close_connection = end < len(content)

    def _refused(self, name: str) -> bool:
        statuses = self.hub.status.get(name, [])
        if statuses:
            self._send(statuses.pop(0), {})
            return True
        return False

    def _send(
        self, status: int, headers: Mapping[str, str], content: bytes = b"", body: bool = True
    ) -> None:
        self._headers(status, {**headers, "Content-Length": str(len(content))})
        if body:
            self.wfile.write(content)

    def _headers(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
