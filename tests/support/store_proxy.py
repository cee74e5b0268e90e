"""A store for tests: settings of a bucket, and what stands before moto's server and watches."""

import contextlib
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import requests

from avatar_client.contract.bucket import BucketSettings


def bucket_at(endpoint_url: Any, **options: Any) -> BucketSettings:
    """Settings of a bucket somewhere; the keys are those of the test server."""
    defaults = {"access_key_id": "test-access-key", "secret_access_key": "test-secret-key"}
    return BucketSettings(**{"endpoint_url": endpoint_url, **defaults, **options})


class Proxy:
    """In front of the test server: keeps what passes, and does wrong when told to."""

    def __init__(self, target: Any) -> None:
        self.seen: list[tuple[str, str, Any]] = []  # (method, path, headers)
        self.failures: list[
            Any
        ] = []  # for the next requests: (status, code of the store) or seconds to wait
        self.left_out: tuple[str, ...] = ()  # headers, in small letters, that do not pass
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.seen.append((self.command, self.path, dict(self.headers)))
                failure = proxy.failures.pop(0) if proxy.failures else 0
                if isinstance(failure, tuple):
                    status, content = (
                        failure[0],
                        f"<Error><Code>{failure[1]}</Code></Error>".encode(),
                    )
                    headers: Mapping[str, str] = {}
                else:
                    time.sleep(failure or 0)
                    sent = {
                        name: value
                        for name, value in self.headers.items()
                        if name.lower() not in proxy.left_out
                    }
                    answer = requests.request(
                        self.command, target + self.path, headers=sent, data=body
                    )
                    status, content, headers = answer.status_code, answer.content, answer.headers
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower().startswith("x-amz") or name.lower() in ("content-type", "etag"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def headers_of(proxy: Proxy) -> list[dict[str, str]]:
    return [{name.lower(): value for name, value in seen[2].items()} for seen in proxy.seen]


def calls_of(proxy: Proxy) -> list[str]:
    return [method for method, path, _ in proxy.seen if "object-lock" not in path]
