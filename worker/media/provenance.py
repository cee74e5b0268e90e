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

from worker.media.signing_service import SigningServiceError, signature_of
from worker.settings import Settings

if TYPE_CHECKING:
    from c2pa import Signer
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

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
    """The operator's certificate, and its key or the address of the service that has it."""

    certificate: bytes  # PEM: the signer's first, then those that vouch for it
    algorithm: str  # as C2PA names it
    key: bytes | None = field(default=None, repr=False)  # PEM
    signing_url: str = field(default="", repr=False)  # where there is no key

    @classmethod
    def of(cls, settings: Settings) -> "Credentials | None":
        """Those that are set; None: there are none.

        Raises:
            RuntimeError: one of them is missing or too much, cannot be read, is none, or has
                expired.
        """
        given, private = settings.c2pa_certificate, settings.c2pa_private_key
        service = settings.c2pa_signing_url
        if given is None and private is None and service is None:
            return None
        if given is None:
            raise RuntimeError("C2PA_CERTIFICATE is missing: it is set together with what signs")
        if private is None and service is None:
            raise RuntimeError(
                "C2PA_PRIVATE_KEY is missing: the certificate needs its key, or C2PA_SIGNING_URL"
            )
        if private is not None and service is not None:
            raise RuntimeError("C2PA_SIGNING_URL: is set beside C2PA_PRIVATE_KEY; leave out one")
        if find_spec("c2pa") is None:
            raise RuntimeError("C2PA_CERTIFICATE is set, and c2pa-python is not installed")
        certificate = _pem("C2PA_CERTIFICATE", given.get_secret_value(), "CERTIFICATE")
        public = _public_key(certificate)
        if service is not None:
            return cls(certificate, _algorithm(public), signing_url=service.get_secret_value())
        assert private is not None
        key = _pem("C2PA_PRIVATE_KEY", private.get_secret_value(), "PRIVATE KEY")
        _require_pair(key, public)
        return cls(certificate, _algorithm(public), key)

    def sign(
        self, source: BinaryIO, target: BinaryIO, content_type: str, making: Making | None
    ) -> None:
        """Writes the file at `source` with a signed manifest to `target`.

        Raises:
            C2paError: it could not be signed.
            SigningServiceError: the service gave no signature.
        """
        from c2pa import Builder, C2paError, Context

        manifest = json.dumps(_manifest(content_type, making))
        failures: list[SigningServiceError] = []
        with (
            Context.from_dict(LIBRARY_SETTINGS) as context,
            self._signer(failures) as signer,
            Builder(manifest, context) as builder,
        ):
            try:
                builder.sign(signer, content_type, source, target)
            except C2paError:
                if failures:  # the library does not tell what its callback has raised
                    raise failures[0] from None
                raise

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
        except SigningServiceError as error:
            raise RuntimeError(f"C2PA_SIGNING_URL: {error}") from None
        except C2paError as error:
            raise RuntimeError(f"{problem}: {type(error).__name__}") from None
        faults = {each["code"] for each in told.get("validation_status", ())} - {UNTRUSTED}
        if faults or told.get("validation_state") == "Invalid":
            raise RuntimeError(f"{problem}: {', '.join(sorted(faults)) or 'no reason is told'}")

    def _signer(self, failures: list[SigningServiceError]) -> "Signer":
        """What signs; it adds to `failures` why there is no signature."""
        from c2pa import C2paSignerInfo, C2paSigningAlg, Signer

        def ask(content: bytes) -> bytes:
            try:
                return signature_of(content, self.signing_url)
            except SigningServiceError as error:
                failures.append(error)
                return b""

        if self.key is None:
            algorithm = C2paSigningAlg[self.algorithm.upper()]
            return Signer.from_callback(ask, algorithm, self.certificate.decode())
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
    except (C2paError, SigningServiceError) as error:
        signed.unlink(missing_ok=True)
        told = str(error) if isinstance(error, SigningServiceError) else ""
        logger.error("a file could not be signed: %s %s", type(error).__name__, told)
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


def _public_key(certificate: bytes) -> "CertificatePublicKeyTypes":
    """That of the signer.

    Raises:
        RuntimeError: the certificate cannot be read, or is not valid now.
    """
    from cryptography import x509

    try:
        signer = x509.load_pem_x509_certificates(certificate)[0]
    except ValueError:
        raise RuntimeError("C2PA_CERTIFICATE: cannot be read") from None
    now = datetime.now(UTC)
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        ended = "has expired" if now > signer.not_valid_after_utc else "is not valid yet"
        raise RuntimeError(f"C2PA_CERTIFICATE: {ended}")
    return signer.public_key()


def _require_pair(key: bytes, public: "CertificatePublicKeyTypes") -> None:
    """Returns if that is the private one of the two.

    Raises:
        RuntimeError: it is not, or cannot be read.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise RuntimeError("C2PA_PRIVATE_KEY: cannot be read, or has a password") from None
    if private.public_key() != public:
        raise RuntimeError("C2PA_PRIVATE_KEY: is not the key of C2PA_CERTIFICATE's first")


def _algorithm(public: "CertificatePublicKeyTypes") -> str:
    """The signature that goes with the key, as C2PA names it.

    Raises:
        RuntimeError: C2PA has none.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(public, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(public, rsa.RSAPublicKey):
        return "ps256"
    curve = public.curve.name if isinstance(public, ec.EllipticCurvePublicKey) else ""
    if curve not in ALGORITHMS:
        raise RuntimeError(
            "C2PA_CERTIFICATE: its key must be EC (P-256, P-384, P-521), Ed25519 or RSA"
        )
    return ALGORITHMS[curve]
