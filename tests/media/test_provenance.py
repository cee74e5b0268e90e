"""What a video says of its making, read back by C2PA's own library, and by another one."""

import io
import json
import logging
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import av
import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from PIL import Image

from tests.support.certificates import signing_pair
from tests.support.loopback_server import LoopbackServer
from worker.media import signing_service
from worker.media.encoding import Encoding as VideoEncoding
from worker.media.inputs import AudioSegment
from worker.media.provenance import SOURCE_TYPE, Credentials, Making, mark_picture, mark_video, xmp
from worker.media.video import VideoFile, write_thumbnail, write_video
from worker.settings import Settings

MAKING = Making("demo", "0.1.0", 7, "1" * 64, ("2" * 64,))
FRAMES = np.random.default_rng(0).integers(0, 256, (25, 64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    return signing_pair()


@pytest.fixture(scope="module")
def credentials(pair: tuple[str, str]) -> Credentials:
    certificate, key = pair
    found = Credentials.of(Settings(c2pa_certificate=certificate, c2pa_private_key=key))
    assert found is not None
    return found


def written(path: Path, credentials: Credentials | None, container: Any = "mp4") -> VideoFile:
    encoding = VideoEncoding.of(container, None, None)
    return write_video(
        path / f"video.{container}",
        [FRAMES],
        fps=25.0,
        height=64,
        width=96,
        recording=AudioSegment.silent(1000),
        metadata={"seed": "7"},
        encoding=encoding,
        mark=lambda part: mark_video(part, f"video/{container}", MAKING, credentials),
    )


def read(content: bytes, content_type: str = "video/mp4") -> dict[str, Any]:
    with c2pa.Reader(content_type, io.BytesIO(content)) as reader:
        told: dict[str, Any] = json.loads(reader.json())
    return told


def box_names(content: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(content):
        names.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    return names


def test_a_signed_video_says_who_made_it_of_what_and_plays_from_its_beginning(
    credentials: Credentials, tmp_path: Path
) -> None:
    video = written(tmp_path, credentials)

    content = video.path.read_bytes()
    told = read(content)
    manifest = told["manifests"][told["active_manifest"]]
    assertions = {each["label"]: each["data"] for each in manifest["assertions"]}
    [actions] = [data for label, data in assertions.items() if label.startswith("c2pa.actions")]
    assert video.provenance == "c2pa"
    assert told["validation_state"] == "Valid"
    assert actions["actions"][0]["digitalSourceType"] == SOURCE_TYPE
    assert assertions["avatar-worker.generation"] == {
        "model": "demo",
        "worker_version": "0.1.0",
        "seed": 7,
        "inputs": {"image_sha256": "1" * 64, "audio_sha256": "2" * 64},
    }
    assert manifest["signature_info"]["issuer"] == "Example"
    names = box_names(content)
    assert names.index(b"moov") < names.index(b"mdat")
    assert xmp(MAKING) in content
    with av.open(io.BytesIO(content), "r") as container:
        assert len(list(container.decode(video=0))) == 25
    assert list(tmp_path.iterdir()) == [video.path]


def test_one_changed_byte_makes_a_signed_video_invalid(
    credentials: Credentials, tmp_path: Path
) -> None:
    content = bytearray(written(tmp_path, credentials).path.read_bytes())
    at = content.index(b"mdat") + 5000
    content[at] ^= 1

    assert read(bytes(content))["validation_state"] == "Invalid"


@pytest.mark.packages
def test_a_validator_of_other_hands_finds_the_same_and_the_changed_byte(
    credentials: Credentials, tmp_path: Path, javascript: Path
) -> None:
    video, picture = written(tmp_path, credentials).path, tmp_path / "thumbnail.jpg"
    write_thumbnail(FRAMES[0], picture, xmp(MAKING))
    mark_picture(picture, MAKING, credentials)
    files = [video, picture]
    for path, at in ((video, video.read_bytes().index(b"mdat") + 5000), (picture, -50)):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        files.append(path.with_stem("changed"))
        files[-1].write_bytes(content)

    done = subprocess.run(
        ["node", "provenance.mjs", *files],
        cwd=javascript,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    hashes = ["assertion.bmffHash", "assertion.dataHash"]
    for good, bad, name in zip(found[:2], found[2:], hashes, strict=True):
        assert (good["isValid"], good["failed"]) == (True, [])
        assert {"claimSignature.validated", f"{name}.match"} < set(good["passed"])
        assert "avatar-worker.generation" in good["assertions"]
        assert (bad["isValid"], bad["failed"]) == (False, [f"{name}.mismatch"])


def test_a_copied_stream_has_lost_manifest_and_xmp_and_keeps_the_comment(
    credentials: Credentials, tmp_path: Path
) -> None:
    video, copy = written(tmp_path, credentials), tmp_path / "copy.mp4"

    with av.open(str(video.path)) as source, av.open(str(copy), "w") as target:
        target.metadata.update(source.metadata)
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)

    content = copy.read_bytes()
    with pytest.raises(c2pa.C2paError.ManifestNotFound):
        read(content)
    assert SOURCE_TYPE.encode() not in content
    with av.open(str(copy)) as container:
        assert container.metadata["comment"].startswith("AI-generated")


def test_without_a_certificate_nothing_is_signed_and_the_metadata_still_say_it(
    tmp_path: Path,
) -> None:
    video = written(tmp_path, None)

    content = video.path.read_bytes()
    assert video.provenance == "metadata"
    with pytest.raises(c2pa.C2paError.ManifestNotFound):
        read(content)
    assert box_names(content)[-1] == b"uuid"
    assert content.endswith(xmp(MAKING))
    assert f"DigitalSourceType>{SOURCE_TYPE}<".encode() in content
    assert written(tmp_path, None).sha256 == video.sha256


def test_a_webm_has_no_place_for_a_manifest(credentials: Credentials, tmp_path: Path) -> None:
    video = written(tmp_path, credentials, "webm")

    assert video.provenance == "metadata"
    with av.open(str(video.path)) as container:
        assert container.metadata["DIGITAL_SOURCE_TYPE"] == SOURCE_TYPE
        assert container.metadata["COMMENT"].startswith("AI-generated")


def test_a_thumbnail_is_marked_and_signed_as_its_video_is(
    credentials: Credentials, tmp_path: Path
) -> None:
    path = tmp_path / "thumbnail.jpg"
    write_thumbnail(FRAMES[0], path, xmp(MAKING))
    assert mark_picture(path, MAKING, None) == "metadata"
    with Image.open(path) as picture:
        assert SOURCE_TYPE.encode() in picture.info["xmp"]

    assert mark_picture(path, MAKING, credentials) == "c2pa"

    content = path.read_bytes()
    assert read(content, "image/jpeg")["validation_state"] == "Valid"
    assert SOURCE_TYPE.encode() in content
    Image.open(path).load()


def test_what_is_set_is_tried_at_the_start_and_may_be_text_or_a_file(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "chain.pem").write_text(pair[0])
    (tmp_path / "key.pem").write_text(pair[1])
    one_line = [text.replace("\n", "\\n") for text in pair]  # as some forms send it
    files = [str(tmp_path / name) for name in ("chain.pem", "key.pem")]
    for certificate, key in (pair, one_line, files):
        found = Credentials.of(Settings(c2pa_certificate=certificate, c2pa_private_key=key))
        assert found is not None
        found.check()
    assert Credentials.of(Settings()) is None


def encrypted(key: str) -> str:
    private = load_pem_private_key(key.encode(), None)
    secret = BestAvailableEncryption(b"x")
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, k: (c, None), "C2PA_PRIVATE_KEY is missing"),
        (lambda c, k: (None, k), "C2PA_CERTIFICATE is missing"),
        (lambda c, k: (k, k), "C2PA_CERTIFICATE: holds no CERTIFICATE"),
        (lambda c, k: (c, c), "C2PA_PRIVATE_KEY: holds no PRIVATE KEY"),
        (lambda c, k: (c, "/nowhere/key.pem"), "C2PA_PRIVATE_KEY: neither PEM text nor a file"),
        (lambda c, k: (c, k[:80] + k[90:]), "C2PA_PRIVATE_KEY: cannot be read"),
        (lambda c, k: (c, encrypted(k)), "C2PA_PRIVATE_KEY: holds no|has a password"),
        (lambda c, k: (c[:80] + c[90:], k), "C2PA_CERTIFICATE: cannot be read"),
        (lambda c, k: (c, signing_pair()[1]), "is not the key of"),
        (lambda c, k: signing_pair(ends_in_days=-1), "C2PA_CERTIFICATE: has expired"),
    ],
)
def test_a_pair_that_is_no_use_is_refused_without_a_word_of_the_key(
    pair: tuple[str, str], change: Any, message: str
) -> None:
    certificate, key = change(*pair)
    settings = Settings(c2pa_certificate=certificate, c2pa_private_key=key)

    with pytest.raises(RuntimeError, match=message) as caught:
        Credentials.of(settings)

    told = f"{caught.value!r} {settings!r} {caught.value.__cause__!r}"
    assert not any(line in told for line in pair[1].splitlines()[1:-1])


def test_a_certificate_that_cannot_sign_media_is_found_out_at_the_start(
    pair: tuple[str, str],
) -> None:
    alone = pair[0].split("-----END CERTIFICATE-----")[1].strip() + "-----END CERTIFICATE-----\n"
    broken = Credentials(alone.encode(), "es256", pair[1].encode())  # of another key

    with pytest.raises(RuntimeError, match="files signed with it are not valid"):
        broken.check()


def test_a_video_that_cannot_be_signed_is_kept_and_says_so(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    useless = Credentials(pair[0].encode(), "es256", b"-----BEGIN PRIVATE KEY-----\n")
    assert "PRIVATE" not in repr(useless)

    with caplog.at_level(logging.ERROR):
        video = written(tmp_path, useless)

    assert video.provenance == "metadata"
    assert "could not be signed" in caplog.text
    assert "PRIVATE" not in caplog.text
    assert list(tmp_path.iterdir()) == [video.path]


# A service that signs


class SigningService(LoopbackServer):
    """Has the key, and answers as `answer` does: status and body for what is to be signed."""

    def __init__(self, answer: Callable[[bytes], tuple[int, bytes]]) -> None:
        self._answer = answer
        self.authorizations: list[str | None] = []

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        self.authorizations.append(request.headers["Authorization"])
        status, body = self._answer(request.rfile.read(int(request.headers["Content-Length"])))
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    @property
    def url(self) -> str:
        return self.origin.replace("//", "//worker:pass-word@") + "/sign?of=hidden-name"


def signed_by(key: str) -> Callable[[bytes], tuple[int, bytes]]:
    private = load_pem_private_key(key.encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return lambda content: (200, private.sign(content, ec.ECDSA(hashes.SHA256())))


def plain(key: str) -> Callable[[bytes], tuple[int, bytes]]:
    """The two numbers of the signature one after the other, and not in DER."""

    def answer(content: bytes) -> tuple[int, bytes]:
        numbers = decode_dss_signature(signed_by(key)(content)[1])
        return 200, b"".join(number.to_bytes(32) for number in numbers)

    return answer


@pytest.mark.parametrize("form", [signed_by, plain])
def test_a_service_signs_in_the_place_of_a_key(
    pair: tuple[str, str], tmp_path: Path, form: Callable[[str], Any]
) -> None:
    with SigningService(form(pair[1])) as service:
        settings = Settings(c2pa_certificate=pair[0], c2pa_signing_url=service.url)
        found = Credentials.of(settings)
        assert found is not None
        found.check()
        video = written(tmp_path, found)

    assert video.provenance == "c2pa"
    told = read(video.path.read_bytes())
    assert told["validation_state"] == "Valid"
    assert set(service.authorizations) == {"Basic d29ya2VyOnBhc3Mtd29yZA=="}
    assert "pass-word" not in f"{settings!r} {found!r}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda content: (403, b"hidden-name"), "it answered HTTP 403"),
        (lambda content: (200, bytes(10_000)), "more than a signature"),
        (lambda content: (200, b""), "files signed with it are not valid|no signature"),
        (lambda content: (200, b"x" * 64), "files signed with it are not valid"),
        (signed_by(signing_pair()[1]), "files signed with it are not valid"),
    ],
)
def test_a_service_that_does_not_sign_keeps_the_worker_from_starting_and_a_video_from_nothing(
    pair: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answer: Any,
    message: str,
) -> None:
    with SigningService(answer) as service:
        found = Credentials.of(Settings(c2pa_certificate=pair[0], c2pa_signing_url=service.url))
        assert found is not None
        with pytest.raises(RuntimeError, match=message) as caught:
            found.check()
        with caplog.at_level(logging.WARNING):
            video = written(tmp_path, found)

    assert video.provenance == "metadata"
    assert "a file could not be signed" in caplog.text
    told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert not [part for part in ("pass-word", "hidden-name", service.origin) if part in told]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/pass-word", "https://pass-word.invalid/", "pass-word", "ftp://x/"]
)
def test_a_service_that_is_not_there_is_found_out_at_the_start(
    pair: tuple[str, str], url: str
) -> None:
    found = Credentials.of(Settings(c2pa_certificate=pair[0], c2pa_signing_url=url))
    assert found is not None
    with pytest.raises(RuntimeError, match="C2PA_SIGNING_URL: ") as caught:
        found.check()
    assert "pass-word" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_service_that_never_answers_is_given_up(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_service, "ANSWER_SECONDS", 0.3)
    never = threading.Event()
    with SigningService(lambda _: (200, bytes(never.wait(60)))) as service:
        found = Credentials.of(Settings(c2pa_certificate=pair[0], c2pa_signing_url=service.url))
        assert found is not None
        with pytest.raises(RuntimeError, match=r"no answer in 0\.3 s"):
            found.check()
        never.set()


def test_a_service_and_a_key_are_not_set_together(pair: tuple[str, str]) -> None:
    certificate, key = pair
    url = "https://sign.example/"
    for settings in (
        Settings(c2pa_certificate=certificate, c2pa_private_key=key, c2pa_signing_url=url),
        Settings(c2pa_signing_url=url),
    ):
        with pytest.raises(RuntimeError, match=r"C2PA_SIGNING_URL: is set beside|is missing"):
            Credentials.of(settings)
