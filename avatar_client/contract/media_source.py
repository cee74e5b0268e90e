"""Where an input comes from: an address, or the bytes themselves in one of base64's forms."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Self
from urllib.parse import unquote

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

MIN_UNPADDED_CHARACTERS = 64  # a word or a path has no padding either, and no media is so short
_URL_SAFE = str.maketrans("-_", "+/")


class BlockedSchemeError(ValueError):
    """An address that is never fetched; whoever knows the field's whole name makes it ours."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where an input comes from: exactly one of an address and the bytes themselves."""

    url: str | None = None
    content: bytes | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, value: Any) -> Self:
        """A source from an https URL, a `data:` URI or plain base64.

        Raises:
            BlockedSchemeError: an address of another scheme.
            ValueError: none of the three.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError("must be a string: an https URL, a data: URI or base64")
        text = value.strip()
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
        if scheme is None:
            return cls(content=_decode_base64(value))
        if scheme[1].lower() == "data":
            head, comma, payload = text.partition(",")
            parameters = [part.strip().lower() for part in head.split(";")]
            if not comma or "base64" not in parameters[1:]:
                raise ValueError("a data: URI must be data:<type>;base64,<data>")
            return cls(content=_decode_base64(unquote(payload)))  # `+`, `/` and `=` may be escaped
        if scheme[1].lower() not in ("https", "http"):
            raise BlockedSchemeError("only https URLs are fetched")
        if len(text) > 4096 or not text.isprintable() or " " in text:
            raise ValueError("is not a well-formed URL")
        return cls(url=text)

    @property
    def digest(self) -> str:
        """Fingerprint of the source, for telling one request from another."""
        return hashlib.sha256(self.content or (self.url or "").encode()).hexdigest()


def _decode_base64(text: str) -> bytes:
    """The bytes of base64 in its common forms: with line breaks, for URLs, without padding.

    A blank inside is a `+` that a form has decoded: left out, it would shift all bits behind it.
    """
    lines = text.splitlines()
    whole = lines[0] if len(lines) == 1 else ""
    if whole != whole.strip() and len(whole) % 4 == 0:
        compact = whole  # a blank at its end is such a `+`, too, or the length would be another
    else:
        compact = "".join(line.strip(" \t") for line in lines)
        if whole != whole.strip() and len(compact) % 4:
            raise ValueError("is base64 with a blank at its end, which may stand for a '+'")
    if len(compact) % 4 and len(compact) < MIN_UNPADDED_CHARACTERS:
        raise ValueError("is neither an https URL, a data: URI nor base64")
    compact = compact.replace(" ", "+").translate(_URL_SAFE).rstrip("=")
    try:
        content = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raise ValueError("is neither an https URL, a data: URI nor base64") from None
    if not content:
        raise ValueError("is empty")
    return content


Media = Annotated[
    MediaSource,
    BeforeValidator(MediaSource.parse),
    PlainSerializer(lambda source: source.digest, return_type=str),
    WithJsonSchema({"type": "string"}),
]
