"""An S3-compatible object store of one bucket on disk, as an application to mount.

It does what boto3's uploads and a browser's player ask for. Any other operation is answered with
NotImplemented, never taken for a plain one. Every request must be signed, by header or address.

An object is one file: its data, then a JSON object with what is known of it, then the length of
that. So one rename brings both, and a reader keeps what it has opened.
"""

import hmac
import io
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from functools import partial
from hashlib import md5, sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, unquote_to_bytes
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import anyio
from anyio import from_thread, to_thread
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 5 * 2**30  # S3's limit for one request
MAX_KEY_BYTES = 1024
MAX_XML_BYTES = 4 * 2**20  # a list of 10,000 parts is smaller
MAX_URL_SECONDS = 604_800
MAX_SKEW_SECONDS = 900
IDLE_SECONDS = 60.0  # without a byte of a body
THREADS = 32  # an upload holds one until it ends
BLOCK_BYTES = 2**18
LENGTH_BYTES = 4  # of the description's length, at the end of a file

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
CHUNKED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
SHA256 = re.compile("[0-9a-f]{64}")
AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 +Credential=([^, ]+), *SignedHeaders=([^, ]+), *Signature=([^, ]+)"
)
STATUS = {
    "AccessDenied": 403,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidRange": 416,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "SignatureDoesNotMatch": 403,
}  # of the other codes: 400
KEPT_HEADERS = {"cache-control", "content-disposition", "content-type"}
LISTING = {"continuation-token", "encoding-type", "list-type", "max-keys", "prefix"}


class S3Error(Exception):
    """A refusal, as S3 words it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Description:
    """What stands behind the data in a file."""

    key: str
    headers: dict[str, str]  # as they were sent, and are answered
    etag: str  # with its quotation marks
    size_bytes: int


class ObjectStore:
    """The bucket in a directory, which belongs to this object alone. `app` serves it.

    Args:
        directory: where the bucket's folder is, or will be made.
        max_bytes_per_object: a larger one is refused, also if it comes in parts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        access_key_id: str,
        secret_access_key: str,
        region: str = "us-east-1",
        bucket: str = "avatars",
        max_bytes_per_object: int = MAX_OBJECT_BYTES,
    ) -> None:
        self._access_key_id = access_key_id
        # its payload is unsigned where no header says otherwise; all else is as in a signed header
        self._signer = S3SigV4QueryAuth(Credentials(access_key_id, secret_access_key), "s3", region)
        self._bucket = bucket
        self._max_bytes = max_bytes_per_object
        self._folder = directory / bucket
        self._objects = self._folder / "objects"
        self._uploads = self._folder / "uploads"  # in parts: a folder for each
        self._unfinished = self._folder / "unfinished"
        _remove(self._unfinished)  # of a process that was killed
        for folder in (self._objects, self._uploads, self._unfinished):
            folder.mkdir(parents=True, exist_ok=True)
        self._threads = anyio.CapacityLimiter(THREADS)
        methods = ["GET", "HEAD", "PUT", "POST", "DELETE"]
        # a signed address is the right to read, on whichever page it stands
        cors = Middleware(
            CORSMiddleware,
            allow_origins=["*"],
            allow_methods=["GET", "HEAD"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
        self.app = Starlette(
            routes=[Route("/{path:path}", self._serve, methods=methods)], middleware=[cors]
        )

    def delete_older_than(self, seconds: float) -> None:
        """Deletes the objects that were put so long ago, and the uploads that paused so long."""
        limit = time.time() - seconds
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    _remove(path) if path.is_dir() else path.unlink()

    async def _serve(self, request: Request) -> Response:
        return await to_thread.run_sync(self._answer, request, limiter=self._threads)

    def _answer(self, request: Request) -> Response:
        try:
            query_string = request.scope["query_string"].decode("latin-1")
            query = dict(parse_qsl(query_string, keep_blank_values=True))
            self._authorize(request, query)
            return self._act(request, query)
        except S3Error as error:
            code, message = error.code, str(error)
        except OSError as error:
            logger.error("the object store: %s", error)
            code, message = "InternalError", error.strerror or type(error).__name__
        response = _xml("Error", {"Code": code, "Message": message}, status=STATUS.get(code, 400))
        if "expect" in request.headers:
            # the client keeps its body back, and must not be waited for on this connection
            response.headers["connection"] = "close"
        return response

    def _authorize(self, request: Request, query: Mapping[str, str]) -> None:
        """Returns if the owner of the secret key has signed the request, and not too long ago."""
        headers = request.headers
        presigned = "X-Amz-Signature" in query
        if presigned:
            names = ("Credential", "SignedHeaders", "Signature", "Date")
            credential, signed_headers, signature, date = (
                query.get(f"X-Amz-{name}", "") for name in names
            )
        elif match := AUTHORIZATION.fullmatch(headers.get("authorization", "")):
            credential, signed_headers, signature = match.groups()
            date = headers.get("x-amz-date", "")
        else:
            raise S3Error("AccessDenied", "the request is not signed")
        signed = set(signed_headers.split(";"))
        if not {"host", *(name for name in headers if name.startswith("x-amz-"))} <= signed:
            raise S3Error("AccessDenied", "a header that must be signed is not")

        copy = AWSRequest(
            request.method,
            _url_to_sign(request),
            headers={name: ",".join(headers.getlist(name)) for name in signed},
        )
        copy.context["timestamp"] = date
        signer = self._signer
        if credential.partition("/")[0] != self._access_key_id:
            raise S3Error("InvalidAccessKeyId", "there is no such access key")
        if credential != signer.scope(copy):
            raise S3Error("AuthorizationHeaderMalformed", "signed for another day or region")
        text = signer.string_to_sign(copy, signer.canonical_request(copy))
        if not hmac.compare_digest(signer.signature(text, copy).encode(), signature.encode()):
            raise S3Error("SignatureDoesNotMatch", "the signature does not fit the request")

        age_seconds = _age_seconds(date)
        if presigned:
            life_seconds = _number(query, "X-Amz-Expires", MAX_URL_SECONDS)
            if not -MAX_SKEW_SECONDS <= age_seconds <= life_seconds:
                raise S3Error("AccessDenied", "Request has expired")
        elif abs(age_seconds) > MAX_SKEW_SECONDS:
            raise S3Error("RequestTimeTooSkewed", "the clocks of client and store differ")

    def _act(self, request: Request, query: Mapping[str, str]) -> Response:
        key = self._key(request)
        names = {name for name in query if not name.startswith("X-Amz-") and name != "x-id"}
        match request.method, bool(key), sorted(names):
            case "PUT" | "POST", _, _ if _is_special(request):
                pass
            case "GET" | "HEAD", True, []:
                return self._get(request, key)
            case "PUT", True, []:
                payload = _payload(request, self._max_bytes)
                return _etag(self._write(self._path(key), payload, key, _kept_headers(request)))
            case "DELETE", True, []:
                self._path(key).unlink(missing_ok=True)
                return Response(status_code=204)
            case "POST", True, ["uploads"]:
                return self._create_upload(request, key)
            case "PUT", True, ["partNumber", "uploadId"]:
                return self._put_part(request, key, query)
            case "POST", True, ["uploadId"]:
                return self._complete_upload(request, key, query["uploadId"])
            case "DELETE", True, ["uploadId"]:
                _remove(self._upload(key, query["uploadId"])[0])
                return Response(status_code=204)
            case "HEAD", False, []:
                return Response()
            case "GET", False, _ if "list-type" in names <= LISTING:
                return self._list(query)
        raise S3Error("NotImplemented", "this store does no such thing")

    def _key(self, request: Request) -> str:
        try:
            path = unquote_to_bytes(request.scope["raw_path"]).decode()
        except UnicodeDecodeError:
            raise S3Error("InvalidURI", "the key is not UTF-8") from None
        bucket, _, key = path.removeprefix(request.scope["root_path"])[1:].partition("/")
        if bucket != self._bucket:
            raise S3Error("NoSuchBucket", "there is no such bucket")
        if len(key.encode()) > MAX_KEY_BYTES:
            raise S3Error("KeyTooLongError", f"a key has at most {MAX_KEY_BYTES} bytes")
        if re.search(r"[\x00-\x1f\x7f\ufffe\uffff]", key):  # a listing, being XML, cannot say them
            raise S3Error("InvalidArgument", "a key holds no control characters")
        return key

    # Objects

    def _path(self, key: str) -> Path:
        return self._objects / sha256(key.encode()).hexdigest()

    def _get(self, request: Request, key: str) -> Response:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self._path(key).open("rb"))
            except FileNotFoundError:
                raise S3Error("NoSuchKey", "there is no such object") from None
            found = _describe(file)
            if request.headers.get("if-match", found.etag) != found.etag:
                raise S3Error("PreconditionFailed", "the object has changed")
            asked = None
            if request.headers.get("if-range", found.etag) == found.etag:
                asked = _range(request.headers.get("range", ""), found.size_bytes)
            part = asked or range(found.size_bytes)
            headers = {
                "content-type": "binary/octet-stream",
                **found.headers,
                "accept-ranges": "bytes",
                "content-length": str(len(part)),
                # what a client has put must not run as a page of this host
                "content-security-policy": "sandbox",
                "etag": found.etag,
                "last-modified": formatdate(os.fstat(file.fileno()).st_mtime, usegmt=True),
                "x-content-type-options": "nosniff",
            }
            if asked:
                headers["content-range"] = f"bytes {part[0]}-{part[-1]}/{found.size_bytes}"
            status = 206 if asked else 200
            if request.method == "HEAD":
                return Response(status_code=status, headers=headers)
            stack.pop_all()
            return FileResponse(file, part, status, headers)

    def _list(self, query: Mapping[str, str]) -> Response:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        found = []
        for path in self._objects.iterdir():
            with suppress(FileNotFoundError), path.open("rb") as file:
                item = _describe(file)
                if item.key.startswith(prefix) and item.key > after:
                    changed = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
                    found.append((item.key, item, changed.strftime("%Y-%m-%dT%H:%M:%SZ")))
        found.sort(key=lambda item: item[0])
        page = found[: _number(query, "max-keys", 1000, default=1000)]
        truncated = 0 < len(page) < len(found)
        as_url = query.get("encoding-type") == "url"
        fields = {
            "Name": self._bucket,
            "KeyCount": len(page),
            "IsTruncated": str(truncated).lower(),
            **({"EncodingType": "url"} if as_url else {}),
            **({"NextContinuationToken": page[-1][0]} if truncated else {}),
        }
        contents = [
            {
                "Key": quote(key) if as_url else key,
                "LastModified": changed,
                "ETag": item.etag,
                "Size": item.size_bytes,
            }
            for key, item, changed in page
        ]
        return _xml("ListBucketResult", fields, contents)

    def _write(
        self,
        target: Path,
        blocks: Iterable[bytes],
        key: str,
        headers: dict[str, str],
        etag: str | None = None,
    ) -> str:
        """The ETag of the file that now stands at `target`. If `blocks` raise, none is written."""
        path = self._unfinished / uuid.uuid4().hex
        digest, size = md5(usedforsecurity=False), 0
        try:
            with path.open("xb") as file:
                for block in blocks:
                    digest.update(block)
                    size += file.write(block)
                description = Description(key, headers, etag or f'"{digest.hexdigest()}"', size)
                text = json.dumps(asdict(description)).encode()
                file.write(text + len(text).to_bytes(LENGTH_BYTES, "big"))
                file.flush()
                os.fsync(file.fileno())
            path.replace(target)
        finally:
            path.unlink(missing_ok=True)
        return description.etag

    # Uploads in parts: a file for each part, and one without data for the description

    def _create_upload(self, request: Request, key: str) -> Response:
        folder = self._uploads / uuid.uuid4().hex
        folder.mkdir()
        self._write(folder / "upload", [], key, _kept_headers(request))
        fields = {"Bucket": self._bucket, "Key": key, "UploadId": folder.name}
        return _xml("InitiateMultipartUploadResult", fields)

    def _upload(self, key: str, upload_id: str) -> tuple[Path, dict[str, str]]:
        """The folder of an upload, and the headers that its object will have."""
        if re.fullmatch("[0-9a-f]{32}", upload_id):
            folder = self._uploads / upload_id
            with suppress(FileNotFoundError), (folder / "upload").open("rb") as file:
                upload = _describe(file)
                if upload.key == key:
                    return folder, upload.headers
        raise S3Error("NoSuchUpload", "there is no such upload")

    def _put_part(self, request: Request, key: str, query: Mapping[str, str]) -> Response:
        folder, _ = self._upload(key, query["uploadId"])
        number = _number(query, "partNumber", 10_000)
        payload = _payload(request, self._max_bytes)
        try:
            return _etag(self._write(folder / str(number), payload, key, {}))
        except FileNotFoundError:
            raise S3Error("NoSuchUpload", "the upload has ended meanwhile") from None

    def _complete_upload(self, request: Request, key: str, upload_id: str) -> Response:
        folder, headers = self._upload(key, upload_id)
        etags = _part_etags(b"".join(_payload(request, MAX_XML_BYTES)))
        parts = []
        for number, etag in etags.items():
            try:
                with (folder / str(number)).open("rb") as file:
                    parts.append((Path(file.name), _describe(file)))
            except FileNotFoundError:
                raise S3Error("InvalidPart", "a part was not uploaded") from None
            if parts[-1][1].etag.strip('"') != etag:
                raise S3Error("InvalidPart", "a part is not the one that was uploaded")
        if sum(part.size_bytes for _, part in parts) > self._max_bytes:
            raise S3Error("EntityTooLarge", f"over {self._max_bytes} bytes")

        def joined() -> Iterator[bytes]:
            for path, part in parts:
                with path.open("rb") as file:
                    yield from _blocks(file, range(part.size_bytes))

        digest = md5(b"".join(map(bytes.fromhex, etags.values())), usedforsecurity=False)
        etag = f'"{digest.hexdigest()}-{len(parts)}"'
        self._write(self._path(key), joined(), key, headers, etag)
        _remove(folder)
        fields = {"Bucket": self._bucket, "Key": key, "ETag": etag}
        return _xml("CompleteMultipartUploadResult", fields)


class FileResponse(StreamingResponse):
    """Part of an open file, which may be replaced or deleted meanwhile.

    Starlette's own opens the file after its headers are sent, when it may be gone.
    """

    def __init__(self, file: BinaryIO, part: range, status: int, headers: dict[str, str]) -> None:
        super().__init__(_blocks(file, part), status, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


class Body(io.RawIOBase):
    """The body of a request as a file, to be read in a thread."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._received = b""
        self._more = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._more and not self._received:
            try:
                message = from_thread.run(self._receive)
            except TimeoutError:
                raise S3Error("RequestTimeout", "the client sends nothing any more") from None
            if message["type"] == "http.disconnect":
                raise S3Error("IncompleteBody", "the client has hung up")
            self._received, self._more = message.get("body", b""), message.get("more_body", False)
        size = min(len(buffer), len(self._received))
        buffer[:size], self._received = self._received[:size], self._received[size:]
        return size

    async def _receive(self) -> Message:
        with anyio.fail_after(IDLE_SECONDS):
            return await self._request.receive()


def _payload(request: Request, max_bytes: int) -> Iterator[bytes]:
    """The data that a request carries. Raises at its end if it is not whole and as signed."""
    headers = request.headers
    kind = headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
    length = headers.get("x-amz-decoded-content-length" if kind == CHUNKED else "content-length")
    body = io.BufferedReader(Body(request), BLOCK_BYTES)
    if kind == CHUNKED:
        blocks = _unchunked(body)
    elif kind == "UNSIGNED-PAYLOAD" or SHA256.fullmatch(kind):
        blocks = iter(partial(body.read, BLOCK_BYTES), b"")
    else:
        raise S3Error("NotImplemented", "this store takes no chunks with signatures")
    digest, size = sha256(), 0
    if length is not None and re.fullmatch(r"\d{1,18}", length) and int(length) > max_bytes:
        raise S3Error("EntityTooLarge", f"over {max_bytes} bytes")
    for block in blocks:
        size += len(block)
        if size > max_bytes:
            raise S3Error("EntityTooLarge", f"over {max_bytes} bytes")
        digest.update(block)
        yield block
    if length not in (None, str(size)):
        raise S3Error("IncompleteBody", "the body is not as long as it should be")
    if SHA256.fullmatch(kind) and digest.hexdigest() != kind:
        raise S3Error("XAmzContentSHA256Mismatch", "the body is not the one that was signed")


def _unchunked(body: BinaryIO) -> Iterator[bytes]:
    """The data of `size CRLF data CRLF` and so on, until a size of 0.

    The checksum behind it is not compared: TCP has one, and the length is checked.
    """
    while True:
        match = re.fullmatch(rb"([0-9a-fA-F]{1,15})\r\n", body.readline(64))
        if match is None:
            raise S3Error("IncompleteBody", "a chunk without its size")
        left = int(match[1], 16)
        if left == 0:
            return
        while left and (block := body.read(min(left, BLOCK_BYTES))):
            left -= len(block)
            yield block
        body.readline(2)


def _part_etags(body: bytes) -> dict[int, str]:
    """The ETag of each part that a finished upload is made of, by ascending number."""
    try:
        root = ElementTree.fromstring(body)  # noqa: S314  # signed, and expat limits entities
        parts = [
            (int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "").strip('"'))
            for part in root.findall("{*}Part")
        ]
    except (ElementTree.ParseError, ValueError):
        raise S3Error("MalformedXML", "this is no list of parts") from None
    if not parts:
        raise S3Error("MalformedXML", "this is no list of parts")
    etags = dict(parts)
    if list(etags) != sorted(etags) or len(etags) != len(parts):
        raise S3Error("InvalidPartOrder", "the parts are not in their order")
    return etags


def _url_to_sign(request: Request) -> str:
    """Path and query as they came, less the signature."""
    path, query = (request.scope[name].decode("latin-1") for name in ("raw_path", "query_string"))
    pairs = [pair for pair in query.split("&") if not pair.startswith("X-Amz-Signature=")]
    # a server may pass a bare # on in the path, where a URL would end
    return f"http://store{path}?{'&'.join(pairs)}".replace("#", "%23")


def _age_seconds(date: str) -> float:
    try:
        at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise S3Error("AccessDenied", "the date is no date") from None
    return (datetime.now(UTC) - at).total_seconds()


def _is_special(request: Request) -> bool:
    """Whether a write is a copy, has a condition, or brings data that only its reader unpacks."""
    encoding = request.headers.get("content-encoding", "aws-chunked")
    special = {"if-match", "if-none-match", "x-amz-copy-source"}
    return encoding != "aws-chunked" or not special.isdisjoint(request.headers)


def _kept_headers(request: Request) -> dict[str, str]:
    return {
        name: value
        for name, value in request.headers.items()
        if name in KEPT_HEADERS or name.startswith("x-amz-meta-")
    }


def _number(
    query: Mapping[str, str], name: str, maximum: int, *, default: int | None = None
) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text) or int(text) > maximum:
        raise S3Error("InvalidArgument", f"{name} must be a number up to {maximum}")
    return int(text)


def _range(header: str, size_bytes: int) -> range | None:
    """The bytes asked for; None, which means all of them, if the header is not one plain range."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header)
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        part = range(max(size_bytes - int(last), 0), size_bytes)
    elif last and int(last) < int(first):
        return None
    else:
        part = range(int(first), min(int(last or size_bytes) + 1, size_bytes))
    if not part:
        raise S3Error("InvalidRange", f"the object has {size_bytes} bytes")
    return part


def _describe(file: BinaryIO) -> Description:
    end = file.seek(-LENGTH_BYTES, os.SEEK_END)
    length = int.from_bytes(file.read(LENGTH_BYTES), "big")
    file.seek(end - length)
    return Description(**json.loads(file.read(length)))


def _blocks(file: BinaryIO, part: range) -> Iterator[bytes]:
    file.seek(part.start)
    left = len(part)
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        left -= len(block)
        yield block


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a part may arrive meanwhile


def _etag(etag: str) -> Response:
    return Response(headers={"etag": etag})


def _xml(
    name: str,
    fields: Mapping[str, object],
    contents: Iterable[Mapping[str, object]] = (),
    *,
    status: int = 200,
) -> Response:
    """An answer with an element that holds the fields, and one `Contents` for each of those."""
    root = Element(name, {} if name == "Error" else {"xmlns": NAMESPACE})
    for field, value in fields.items():
        SubElement(root, field).text = str(value)
    for item in contents:
        element = SubElement(root, "Contents")
        for field, value in item.items():
            SubElement(element, field).text = str(value)
    content = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return Response(content, status, media_type="application/xml")
