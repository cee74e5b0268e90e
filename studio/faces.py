"""The faces of a portrait, which an endpoint finds by a dry run: nothing is generated."""

import base64
import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageOps
from pydantic import Field, TypeAdapter, ValidationError

from avatar_client import EndpointError, JobFailedError
from avatar_client.contract.job_errors import InvalidInputError
from studio.connection import Connection

FIND_SECONDS = 600.0  # a worker may have to start first
PICTURE_SIDE = 1024  # px
NOT_TOLD = "the endpoint's worker is older than this page, and tells no faces"

Number = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Box = tuple[Number, Number, Number, Number]  # x, y, width, height in pixels of the upright portrait
_BOXES = TypeAdapter(Annotated[list[Box], Field(max_length=100)])


@dataclass(frozen=True, slots=True)
class Faces:
    """A portrait as a page shows it, and the boxes of its faces, from left to right."""

    picture: str  # a `data:` URL
    width: int  # px of the portrait
    height: int
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, portrait: Path, boxes: list[Box]) -> "Faces":
        """These faces in that portrait.

        Raises:
            InvalidInputError: the portrait cannot be read.
        """
        try:
            with Image.open(portrait) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise InvalidInputError("cannot be read", field="image") from None
        width, height = upright.size
        upright.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        content = io.BytesIO()
        upright.save(content, "JPEG", quality=80)
        encoded = base64.b64encode(content.getvalue()).decode()
        return cls(f"data:image/jpeg;base64,{encoded}", width, height, tuple(boxes))


async def find(connection: Connection, portrait: Path, fields: Mapping[str, Any]) -> Faces:
    """The faces that the endpoint finds.

    Args:
        fields: of the request, of which the resolution decides what is found.

    Raises:
        WorkerError: the portrait is none.
        EndpointError: the endpoint did not answer, or tells no faces.
        ValueError: an address or a key that cannot be one.
    """
    asked = {name: fields[name] for name in ("resolution",) if name in fields}
    async with connection.open() as endpoint:
        job = await endpoint.submit(portrait, _silence(), dry_run=True, **asked)
        try:
            status = await job.wait(timeout_seconds=FIND_SECONDS)
        except JobFailedError as failure:
            if failure.field == "image":
                raise InvalidInputError(failure.message, field="image") from None
            raise
    told = (status.output or {}).get("faces")
    try:
        boxes = _BOXES.validate_python([each["face_box"] for each in told or ()])
    except (ValidationError, TypeError, KeyError):
        raise EndpointError(NOT_TOLD) from None
    if told is None:
        raise EndpointError(NOT_TOLD)
    return Faces.of(portrait, boxes)


def _silence(seconds: float = 0.2, rate_hz: int = 16_000) -> bytes:
    """A recording, without which there is no request."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(bytes(2 * round(seconds * rate_hz)))
    return content.getvalue()
