import base64
import gzip
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputTooLargeError,
    InputUrlBlockedError,
    InvalidInputError,
)
from tests.conftest import MediaServer
from tests.support.waiting import AT_ONCE_SECONDS, wait_until
from worker import addresses
from worker.media import download


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., Any]:
    """`fetch(url, ...)` downloads with private addresses allowed, and returns the bytes."""

    def fetch(
        url: str, *, max_bytes: int = 1000, timeout_seconds: float = 5.0, allow_private: bool = True
    ) -> bytes:
        target = tmp_path / "file"
        download.download(
            url,
            target,
            max_bytes=max_bytes,
            timeout_seconds=timeout_seconds,
            field="image",
            allow_private=allow_private,
        )
        return target.read_bytes()

    return fetch


@contextmanager
def raw_server(answer: Any, context: Any = None, requests: Any = None) -> Iterator[Any]:
    """The port of a server that hands each connection to `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    if context is not None:
                        connection = context.wrap_socket(connection, server_side=True)
                    request = connection.recv(65536)
                    if requests is not None:
                        requests.append(request)
                    answer(connection)
                except OSError:
                    pass  # the client left
                finally:
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate and key of `localhost` and 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's TLS; the client trusts it."""
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def localhost_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of addresses, but for one: stands in for a server somewhere on the internet."""
    rule = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda ip: ip == "127.0.0.1" or rule(ip))


def http_answer(body: bytes = b"", status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_what_the_server_sends_is_what_is_written(
    fetch: Callable[..., Any], media_server: MediaServer
) -> None:
    body = bytes(range(256)) * 3

    assert fetch(media_server.add("/face.png", body)) == body


def test_a_query_and_odd_characters_reach_the_server(
    fetch: Callable[..., Any], media_server: MediaServer
) -> None:
    media_server.add("/%C3%BC", b"x")

    assert fetch(media_server.url + "/ü?sig=a%2Fb&x=ü") == b"x"
    assert media_server.requests == [("GET", "/%C3%BC?sig=a%2Fb&x=%C3%BC")]


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x",
        "https://localhost/x",
        "https://2130706433/x",
        "https://0x7f000001/x",
        "https://0177.0.0.1/x",
        "https://127.1/x",
        "https://0/x",
        "https://10.0.0.1/x",
        "https://100.64.0.1/x",
        "https://169.254.169.254/latest/meta-data/",
        "https://192.168.1.1/x",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://[::ffff:a9fe:a9fe]/x",
        "https://[fe80::1]/x",
        "https://[fd00::1]/x",
        "https://user:password@127.0.0.1/x",
        "https://example.com@127.0.0.1/x",
        "https://127.0.0.1\\@example.com/x",
        "http://93.184.216.34/plain-http",
        "file:///etc/passwd",
        "ftp://93.184.216.34/x",
        "gopher://93.184.216.34/x",
    ],
)
def test_addresses_that_are_not_public_and_https_are_never_contacted(
    fetch: Callable[..., Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("contacted"))

    with pytest.raises(InputUrlBlockedError) as caught:
        fetch(url, allow_private=False)

    assert caught.value.field == "image"
    assert "127" not in str(caught.value)


def test_a_name_of_which_one_address_is_private_is_refused(
    fetch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(2, 1, 6, "", (ip, 443)) for ip in ("93.184.216.34", "10.0.0.5")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with pytest.raises(InputUrlBlockedError):
        fetch("https://two-faced.example/x", allow_private=False)


@pytest.mark.parametrize(
    "url",
    [
        "https:///x",
        "https://h:99999/",
        f"https://{'a' * 70}.com/",
        "https://xn--/",
        "https://xn--a.com/",
        "https://xn--0/x",
    ],
)
def test_what_is_no_url_is_an_invalid_input(fetch: Callable[..., Any], url: str) -> None:
    with pytest.raises(InvalidInputError, match="well-formed"):
        fetch(url, allow_private=False)


def test_a_host_that_does_not_exist_may_be_tried_again(fetch: Callable[..., Any]) -> None:
    with pytest.raises(InputDownloadError, match="resolved") as caught:
        fetch("https://nothing.invalid/x?token=secret", allow_private=False)

    assert "invalid" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_redirects_are_followed(fetch: Callable[..., Any], media_server: MediaServer) -> None:
    media_server.add("/end", b"here")
    media_server.add("/middle", status=307, location="end")
    start = media_server.add("/start", status=302, location=media_server.url + "/middle")

    assert fetch(start) == b"here"


def test_a_ring_of_redirects_ends(fetch: Callable[..., Any], media_server: MediaServer) -> None:
    url = media_server.add("/ring", status=302, location="/ring")

    with pytest.raises(InputDownloadError, match="redirects"):
        fetch(url)
    assert len(media_server.requests) == 6


@pytest.mark.parametrize(
    "location",
    [
        "https://169.254.169.254/latest/meta-data/",
        "https://127.0.0.2/x",
        "file:///etc/passwd",
        "http://127.0.0.1:{port}/plain",
        "//[::1]/x",
    ],
)
def test_a_redirect_is_held_to_the_same_rule(
    fetch: Callable[..., Any], tls: ssl.SSLContext, localhost_is_public: None, location: str
) -> None:
    requests: list[bytes] = []

    def answer(connection: Any) -> None:
        requests.append(connection)
        target = location.format(port=connection.getsockname()[1])
        connection.sendall(http_answer(status="302 Found", Location=target))

    with raw_server(answer, tls) as port, pytest.raises(InputUrlBlockedError):
        fetch(f"https://127.0.0.1:{port}/", allow_private=False)

    assert len(requests) == 1


def test_the_address_that_was_checked_is_dialled_and_the_name_not_asked_again(
    fetch: Callable[..., Any],
    tls: ssl.SSLContext,
    localhost_is_public: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.getaddrinfo
    asked: list[str] = []
    requests: list[bytes] = []

    def turncoat(
        host: str, *arguments: Any, **options: Any
    ) -> list[
        tuple[Any, socket.SocketKind, int, str, tuple[str, int]]
        | tuple[Any, socket.SocketKind, int, str, tuple[str, int, int, int] | tuple[int, bytes]]
    ]:  # public at first, private from then on
        asked.append(host)
        is_first = host == "localhost" and asked.count(host) == 1
        return real("127.0.0.1" if is_first or host != "localhost" else "127.0.0.9", *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", turncoat)
    with raw_server(lambda c: c.sendall(http_answer(b"ok")), tls, requests) as port:
        assert fetch(f"https://localhost:{port}/x", allow_private=False) == b"ok"

    assert asked.count("localhost") == 1
    assert f"\r\nHost: localhost:{port}\r\n".encode() in requests[0]


def test_a_certificate_of_another_name_is_refused(
    fetch: Callable[..., Any],
    tls: ssl.SSLContext,
    localhost_is_public: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **__: real("127.0.0.1", *rest))

    with (
        raw_server(lambda c: c.sendall(http_answer(b"ok")), tls) as port,
        pytest.raises(InputDownloadError, match="certificate"),
    ):
        fetch(f"https://other.example:{port}/", allow_private=False)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    fetch: Callable[..., Any], certificate: Path, localhost_is_public: None
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    with (
        raw_server(lambda c: c.sendall(http_answer(b"ok")), context) as port,
        pytest.raises(InputDownloadError, match="certificate"),
    ):
        fetch(f"https://localhost:{port}/", allow_private=False)


def test_a_file_over_the_limit_is_refused_before_it_is_read(
    fetch: Callable[..., Any], media_server: MediaServer
) -> None:
    with pytest.raises(InputTooLargeError, match="1000 bytes"):
        fetch(media_server.add("/large", b"x" * 1001))
    assert fetch(media_server.add("/just", b"x" * 1000)) == b"x" * 1000


def test_a_file_of_unknown_length_is_read_up_to_the_limit_only(fetch: Callable[..., Any]) -> None:
    sent = []

    def endless(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)
            sent.append(65536)

    with raw_server(endless) as port, pytest.raises(InputTooLargeError):
        fetch(f"http://127.0.0.1:{port}/")
    assert sum(sent) < 2**24


def test_chunks_are_put_together(fetch: Callable[..., Any]) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )

    with raw_server(lambda c: c.sendall(chunked)) as port:
        assert fetch(f"http://127.0.0.1:{port}/") == b"abcde"


def test_a_chunk_of_a_negative_size_is_not_read_without_limit(fetch: Callable[..., Any]) -> None:
    sent = []

    def endless(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        while True:
            connection.sendall(b"x" * 65536)
            sent.append(65536)

    with raw_server(endless) as port, pytest.raises((InputTooLargeError, InputDownloadError)):
        fetch(f"http://127.0.0.1:{port}/")
    assert sum(sent) < 2**24


@pytest.mark.parametrize("location", ["http://[", "https://h:99999/", "https://exa mple/", "//"])
def test_a_redirect_to_what_is_no_url_is_refused(
    fetch: Callable[..., Any], media_server: MediaServer, location: str
) -> None:
    url = media_server.add("/start", status=302, location=location)

    with pytest.raises((InputDownloadError, InvalidInputError)):
        fetch(url)


@pytest.mark.parametrize("status", [204, 206, 302, 401, 404, 429, 500])
def test_only_a_plain_ok_is_a_download(
    fetch: Callable[..., Any], media_server: MediaServer, status: int
) -> None:
    with pytest.raises(InputDownloadError, match=str(status)):
        fetch(media_server.add("/x", b"error page", status=status))


def test_an_answer_that_breaks_off_is_not_taken_for_the_whole(
    fetch: Callable[..., Any], media_server: MediaServer
) -> None:
    with pytest.raises(InputDownloadError, match="broke off"):
        fetch(media_server.add("/cut", b"x" * 900, cut_after_bytes=500))


def test_what_is_not_http_is_a_failed_download(fetch: Callable[..., Any]) -> None:
    with (
        raw_server(lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n")) as port,
        pytest.raises(InputDownloadError),
    ):
        fetch(f"http://127.0.0.1:{port}/")


def test_a_closed_port_is_a_failed_download(fetch: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with pytest.raises(InputDownloadError, match="reached"):
        fetch(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "drip",
    [
        b"",  # not a byte
        b"H",
        b"HTTP/1.1 200 OK\r\nX: ",  # a header that never ends
        b"HTTP/1.1 200 OK\r\n\r\n",  # a body that never ends
        b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_slow_drip_ends_at_the_deadline(
    fetch: Callable[..., Any], tls: ssl.SSLContext, scheme: str, drip: bytes
) -> None:
    def answer(connection: Any) -> None:
        connection.settimeout(60)
        connection.sendall(drip)
        while drip:
            time.sleep(0.05)
            connection.sendall(b"a")
        connection.recv(1)  # until the client leaves

    with raw_server(answer, tls if scheme == "https" else None) as port:
        began = time.monotonic()
        with pytest.raises(InputDownloadError, match=r"limit of 0\.3 s"):
            fetch(f"{scheme}://127.0.0.1:{port}/", timeout_seconds=0.3)
        assert time.monotonic() - began < AT_ONCE_SECONDS


def test_a_tls_handshake_that_never_ends_ends_at_the_deadline(fetch: Callable[..., Any]) -> None:
    with (
        raw_server(lambda _: time.sleep(0.6)) as port,
        pytest.raises(InputDownloadError, match="limit"),
    ):
        fetch(f"https://127.0.0.1:{port}/", timeout_seconds=0.3)


def test_no_thread_and_no_socket_outlives_a_download(
    fetch: Callable[..., Any], media_server: MediaServer
) -> None:
    url = media_server.add("/x", b"x")
    before = threading.active_count()

    for _ in range(5):
        fetch(url)

    wait_until(lambda: threading.active_count() <= before)  # the server has threads too


def test_a_store_must_be_public_and_https_if_a_client_chose_it(localhost_is_public: None) -> None:
    for url in ("http://93.184.216.34", "https://169.254.169.254", "https://10.1.2.3:9000"):
        with pytest.raises(InputUrlBlockedError) as caught:
            download.check_endpoint(url, field="s3Config.endpointUrl")
        assert caught.value.field == "s3Config.endpointUrl"
    download.check_endpoint("https://127.0.0.1:9000", field="x")


# Addresses as they are given


@pytest.mark.parametrize("target", ["/f/a%2cb.png?sig=x%2fy", "/f/a%2Cb.png?sig=x%2Fy%20+&e=;'()"])
def test_every_escape_stays_as_it_was_written(fetch: Callable[..., Any], target: str) -> None:
    requests: list[bytes] = []
    with raw_server(
        lambda connection: connection.sendall(http_answer(b"x")), requests=requests
    ) as port:
        assert fetch(f"http://127.0.0.1:{port}{target}") == b"x"

    assert requests[0].startswith(f"GET {target} HTTP/1.1\r\n".encode())


def test_a_redirect_may_be_written_in_utf_8(fetch: Callable[..., Any]) -> None:
    requests: list[bytes] = []

    def answer(connection: Any) -> None:
        if len(requests) == 1:
            location = "/bild/größe.png?ü=ß".encode()
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
        else:
            connection.sendall(http_answer(b"picture"))

    with raw_server(answer, requests=requests) as port:
        assert fetch(f"http://127.0.0.1:{port}/a") == b"picture"

    assert requests[1].startswith(b"GET /bild/gr%C3%B6%C3%9Fe.png?%C3%BC=%C3%9F HTTP/1.1\r\n")


def test_a_name_and_a_password_in_the_address_are_sent_to_its_host_alone(
    fetch: Callable[..., Any],
) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    file = http_answer(b"file")
    with raw_server(lambda connection: connection.sendall(file), requests=second) as elsewhere:
        there = http_answer(status="302 Found", Location=f"http://127.0.0.1:{elsewhere}/file")
        with raw_server(lambda connection: connection.sendall(there), requests=first) as port:
            assert fetch(f"http://user:p%40ss@127.0.0.1:{port}/a") == b"file"

    assert b"Authorization: Basic " + base64.b64encode(b"user:p@ss") in first[0]
    assert b"authorization" not in second[0].lower()


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "x-gzip"])
def test_what_is_stored_compressed_is_undone(fetch: Callable[..., Any], encoding: str) -> None:
    content = b"sound " * 100
    body = zlib.compress(content) if encoding == "deflate" else gzip.compress(content)

    answer = http_answer(body, **{"Content-Encoding": encoding})
    with raw_server(lambda connection: connection.sendall(answer)) as port:
        assert fetch(f"http://127.0.0.1:{port}/a") == content


def test_a_bomb_ends_at_the_limit_and_costs_no_memory(fetch: Callable[..., Any]) -> None:
    body = gzip.compress(bytes(300 * 2**20))
    answer = http_answer(body, **{"Content-Encoding": "gzip"})
    tracemalloc.start()
    with (
        raw_server(lambda connection: connection.sendall(answer)) as port,
        pytest.raises(InputTooLargeError),
    ):
        fetch(f"http://127.0.0.1:{port}/a", max_bytes=2**20)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_a_compression_that_is_not_undone_is_told(fetch: Callable[..., Any], encoding: str) -> None:
    answer = http_answer(b"x", **{"Content-Encoding": encoding})
    with (
        raw_server(lambda connection: connection.sendall(answer)) as port,
        pytest.raises(InputDownloadError, match="compressed"),
    ):
        fetch(f"http://127.0.0.1:{port}/a")


def test_a_name_server_that_does_not_answer_ends_at_the_deadline(
    fetch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    begun = time.monotonic()

    with pytest.raises(InputDownloadError, match="longer than the limit"):
        fetch("https://slow.example/x", timeout_seconds=0.5)

    assert time.monotonic() - begun < AT_ONCE_SECONDS


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("hangs", ["before the head", "in the head", "in the body"])
def test_a_stop_is_met_while_the_server_hangs(tmp_path: Path, hangs: str) -> None:
    stopped = threading.Event()

    def answer(connection: Any) -> None:
        if hangs != "before the head":
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nfew"
            connection.sendall(whole if hangs == "in the body" else whole[:20])
        stopped.set()
        connection.recv(1)  # until the client leaves

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    with raw_server(answer) as port:
        begun = time.monotonic()
        with pytest.raises(Stopped):
            download.download(
                f"http://127.0.0.1:{port}/a",
                tmp_path / "file",
                max_bytes=1000,
                timeout_seconds=60,
                field="image",
                allow_private=True,
                check=check,
            )
        assert time.monotonic() - begun < AT_ONCE_SECONDS
