"""What a file says of its own making: that a model made it, which one, from what, signed by whom.

Two layers. Plain metadata is written into every file: IPTC's digital source type in XMP, and a
comment. A C2PA manifest, signed with the operator's certificate, is added where there is one and
the format has a place for it: in an mp4 and a jpeg, not in a webm. docs/provenance.md is the
operator's page.
"""

import io
import json
import logging
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from xml.sax.saxutils import escape

from PIL import Image

from worker.settings import Settings

if TYPE_CHECKING:
    from c2pa import Signer

Provenance = Literal["metadata", "c2pa"]

logger = logging.getLogger(__name__)

# Source: IPTC NewsCodes, Digital Source Type.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Source: Adobe, XMP Specification Part 3, 1.1.9: the box of an MPEG-4 file.
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
GENERATOR = "avatar-worker"
ASSERTION = "avatar-worker.generation"
SIGNED_TYPES = ("video/mp4", "image/jpeg")
# Of what is added to a file. Three kilobytes, and the certificate's chain twice.
MAX_ADDED_BYTES = 65_536
# Nobody but who checks the file knows which authorities are trusted.
UNTRUSTED = "signingCredential.untrusted"
# Beyond it the library keeps its copy of a file on the disk. With its own 512 MiB a video of 211 MB
# took 400 MB of memory, and so 200; signing it took 2 s.
LIBRARY_SETTINGS = {"core": {"backing_store_memory_threshold_in_mb": 32}}
COPIES = 3  # of a video on the disk while it is signed
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True, slots=True)
class Making:
    """How one video was made."""

    model: str
    version: str  # of the worker
    seed: int
    image_sha256: str
    audio_sha256: tuple[str, ...]  # of each recording


@dataclass(frozen=True, slots=True)
class Credentials:
    """The operator's certificate and key, which go together."""

    certificate: bytes  # PEM: the signer's first, then those that vouch for it
    key: bytes = field(repr=False)  # PEM
    algorithm: str  # as C2PA names it

    @classmethod
    def of(cls, settings: Settings) -> "Credentials | None":
        """Those that are set; None: there are none.

        Raises:
            RuntimeError: one of the two is missing, cannot be read, is none, or has expired.
        """
        given, private = settings.c2pa_certificate, settings.c2pa_private_key
        if given is None and private is None:
            return None
        if given is None or private is None:
            missing = "C2PA_CERTIFICATE" if given is None else "C2PA_PRIVATE_KEY"
            raise RuntimeError(
                f"{missing} is missing: the certificate and its key are set together"
            )
        if find_spec("c2pa") is None:
            raise RuntimeError("C2PA_CERTIFICATE is set, and c2pa-python is not installed")
        certificate = _pem("C2PA_CERTIFICATE", given.get_secret_value(), "CERTIFICATE")
        key = _pem("C2PA_PRIVATE_KEY", private.get_secret_value(), "PRIVATE KEY")
        return cls(certificate, key, _algorithm(certificate, key))

    def sign(
        self, source: BinaryIO, target: BinaryIO, content_type: str, making: Making | None
    ) -> None:
        """Writes the file at `source` with a signed manifest to `target`.

        Raises:
            C2paError: it could not be signed.
        """
        from c2pa import Builder, Context

        manifest = json.dumps(_manifest(content_type, making))
        with (
            Context.from_dict(LIBRARY_SETTINGS) as context,
            self._signer() as signer,
            Builder(manifest, context) as builder,
        ):
            builder.sign(signer, content_type, source, target)

    def check(self) -> None:
        """Returns if what they sign is valid: a small picture is signed and read again.

        Raises:
            RuntimeError: it is not; says why.
        """
        from c2pa import C2paError, Reader

        picture, signed = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (16, 16)).save(picture, "JPEG")
        picture.seek(0)
        problem = "C2PA_CERTIFICATE: files signed with it are not valid"
        try:
            self.sign(picture, signed, "image/jpeg", None)
            signed.seek(0)
            with Reader("image/jpeg", signed) as reader:
                told = json.loads(reader.json())
        except C2paError as error:
            raise RuntimeError(f"{problem}: {type(error).__name__}") from None
        faults = {each["code"] for each in told.get("validation_status", ())} - {UNTRUSTED}
        if faults or told.get("validation_state") == "Invalid":
            raise RuntimeError(f"{problem}: {', '.join(sorted(faults)) or 'no reason is told'}")

    def _signer(self) -> "Signer":
        from c2pa import C2paSignerInfo, Signer

        return Signer.from_info(
            C2paSignerInfo(
                alg=self.algorithm.encode(),
                sign_cert=self.certificate,
                private_key=self.key,
                ta_url=None,
            )
        )


def mark_video(
    path: Path, content_type: str, making: Making, credentials: Credentials | None
) -> Provenance:
    """Adds to a finished video what it says of its making; what of it could be added.

    A file that cannot be signed keeps the plain metadata: the video is worth more, and the result
    says which it is.
    """
    if content_type == "video/mp4":
        body = XMP_BOX + xmp(making)
        with path.open("ab") as file:
            file.write(struct.pack(">I4s", 8 + len(body), b"uuid") + body)
    return _signed(path, content_type, making, credentials)


def mark_picture(path: Path, making: Making, credentials: Credentials | None) -> Provenance:
    """The same of a jpeg, which has its XMP already."""
    return _signed(path, "image/jpeg", making, credentials)


def xmp(making: Making) -> bytes:
    """An XMP packet: what kind of source it is, and what made it. The same for the same making."""
    tool = escape(f"{making.model}, {GENERATOR} {making.version}")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        f"<xmp:CreatorTool>{tool}</xmp:CreatorTool>"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


def _signed(
    path: Path, content_type: str, making: Making, credentials: Credentials | None
) -> Provenance:
    if credentials is None or content_type not in SIGNED_TYPES:
        return "metadata"
    from c2pa import C2paError

    signed = path.with_name(f"{path.name}.signed")
    try:
        with path.open("rb") as source, signed.open("w+b") as target:
            credentials.sign(source, target, content_type, making)
    except C2paError as error:
        signed.unlink(missing_ok=True)
        logger.error("a file could not be signed: %s", type(error).__name__)
        return "metadata"
    except BaseException:
        signed.unlink(missing_ok=True)
        raise
    signed.replace(path)
    return "c2pa"


def _manifest(content_type: str, making: Making | None) -> dict[str, Any]:
    """Source: C2PA Technical Specification 2.1, 18 Standard Assertions."""
    created: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}
    assertions = [{"label": "c2pa.actions", "data": {"actions": [created]}}]
    generator = {"name": GENERATOR}
    if making is not None:
        generator["version"] = making.version
        created["softwareAgent"] = {"name": making.model, "version": making.version}
        [first, *others] = making.audio_sha256
        recordings = [first, *others] if others else first
        facts = {
            "model": making.model,
            "worker_version": making.version,
            "seed": making.seed,
            "inputs": {"image_sha256": making.image_sha256, "audio_sha256": recordings},
        }
        assertions.append({"label": ASSERTION, "data": facts})
    return {
        "claim_generator_info": [generator],
        "format": content_type,
        "assertions": assertions,
    }


def _pem(name: str, given: str, kind: str) -> bytes:
    """The PEM text that is given, or lies in the file that is named. Never told in an error."""
    text = given.replace("\\n", "\n").strip()
    if not text.startswith("-----BEGIN"):
        try:
            text = Path(given).read_text()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text"
            raise RuntimeError(f"{name}: neither PEM text nor a file: {reason}") from None
    if f"{kind}-----" not in text:
        raise RuntimeError(f"{name}: holds no {kind} in PEM")
    return text.strip().encode() + b"\n"


def _algorithm(certificate: bytes, key: bytes) -> str:
    """The signature that the key makes, as C2PA names it.

    Raises:
        RuntimeError: the two do not go together, cannot be read, or the certificate is not valid
            now.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        signer = x509.load_pem_x509_certificates(certificate)[0]
    except ValueError:
        raise RuntimeError("C2PA_CERTIFICATE: cannot be read") from None
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise RuntimeError("C2PA_PRIVATE_KEY: cannot be read, or has a password") from None
    if private.public_key() != signer.public_key():
        raise RuntimeError("C2PA_PRIVATE_KEY: is not the key of C2PA_CERTIFICATE's first")
    now = datetime.now(UTC)
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        ended = "has expired" if now > signer.not_valid_after_utc else "is not valid yet"
        raise RuntimeError(f"C2PA_CERTIFICATE: {ended}")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    curve = private.curve.name if isinstance(private, ec.EllipticCurvePrivateKey) else ""
    if curve not in ALGORITHMS:
        raise RuntimeError("C2PA_PRIVATE_KEY: must be EC (P-256, P-384, P-521), Ed25519 or RSA")
    return ALGORITHMS[curve]
