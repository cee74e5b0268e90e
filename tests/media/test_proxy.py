"""An operator's proxy, by which what is fetched and what is stored goes."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputUrlBlockedError,
    UploadError,
    WorkerError,
)
from tests.conftest import BucketServer, MediaServer
from worker.media import download
from worker.media.storage import Storage


class ConnectProxy:
    """Takes CONNECT to any name, and connects to one server of this machine."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None  # None: it refuses
        self.heads: list[list[str]] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                received = client.recv(4096)
                if not received:
                    return
                head += received
            self.heads.append(head.decode().splitlines())
            if self.target is None:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            with socket.create_connection(self.target) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                threading.Thread(target=self._pipe, args=(client, server), daemon=True).start()
                self._pipe(server, client)

    @staticmethod
    def _pipe(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    proxy = ConnectProxy()
    for name in ("https_proxy", "all_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:p%40ss@"))
    yield proxy
    proxy.close()


def fetch(url: str, target: Path, **changes: Any) -> bytes:
    options: dict[str, Any] = {
        "max_bytes": 1000,
        "timeout_seconds": 10.0,
        "field": "image",
        "allow_private": True,
        **changes,
    }
    download.download(url, target, **options)
    return target.read_bytes()


def store_at(url: str, **changes: Any) -> Storage:
    keys = {"access_key_id": "test-access-key", "secret_access_key": "test-secret-key"}
    return Storage(BucketSettings(endpoint_url=url, name="avatars", **keys, **changes))


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 0)


def test_downloads_and_the_store_go_by_the_proxy(
    proxy: ConnectProxy, media_server: MediaServer, object_store: BucketServer, tmp_path: Path
) -> None:
    media_server.add("/x", b"content")
    proxy.target = place(media_server.url)
    assert fetch("http://media.example.com/x", tmp_path / "x") == b"content"

    proxy.target = place(object_store.endpoint_url)
    (tmp_path / "v").write_bytes(b"a video")
    store = store_at("http://10.9.8.7:9000", prefix="proxied")
    store.check()
    store.put(tmp_path / "v", "proxied/1.mp4", content_type="video/mp4")
    assert "proxied/1.mp4" in set(object_store.keys())

    asked = {head[0] for head in proxy.heads}
    assert asked == {
        "CONNECT media.example.com:80 HTTP/1.1",
        "CONNECT 10.9.8.7:9000 HTTP/1.1",
    }
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in proxy.heads[0]


@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_what_no_proxy_names_and_this_machine_are_reached_directly(
    proxy: ConnectProxy,
    media_server: MediaServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    url = media_server.add("/x", b"content")
    assert fetch(url, tmp_path / "x") == b"content"
    monkeypatch.setenv(variable, ".example.com")
    with pytest.raises(InputDownloadError):
        fetch("http://media.example.com/x", tmp_path / "x")
    assert proxy.heads == []


def test_of_a_clients_name_the_proxy_is_asked_for_the_address_that_was_checked(
    proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        known = {"public.example.com": "93.184.216.34", "private.example.com": "10.0.0.1"}
        return real(known.get(host, host), *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InputDownloadError):  # the proxy refuses
        fetch("https://public.example.com/x", tmp_path / "x", allow_private=False)
    assert [head[0] for head in proxy.heads] == ["CONNECT 93.184.216.34:443 HTTP/1.1"]
    for act in (
        lambda: fetch("https://private.example.com/x", tmp_path / "x", allow_private=False),
        lambda: store_at("https://private.example.com", from_client=True).head("a"),
    ):
        with pytest.raises(InputUrlBlockedError):
            act()
    assert len(proxy.heads) == 1


def test_a_proxy_that_refuses_or_is_not_there_is_a_failed_connection(
    proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    acts: list[Callable[[], Any]] = [
        lambda: fetch("http://media.example.com/x", tmp_path / "x"),
        lambda: store_at("http://10.9.8.7:9000").head("a"),
    ]
    told: list[WorkerError] = []
    for address in (proxy.url, "http://127.0.0.1:9", "http://me:hush-hush@127.0.0.1:9"):
        monkeypatch.setenv("HTTPS_PROXY", address)
        for act in acts:
            with pytest.raises((InputDownloadError, UploadError)) as caught:
                act()
            told.append(caught.value)
    assert all(error.retryable for error in told)
    assert not [error for error in told if "127.0.0.1" in str(error) or "hush" in str(error)]
