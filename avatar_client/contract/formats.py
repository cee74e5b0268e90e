"""The files that a video may come in, and what is encoded in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from avatar_client.contract.job_errors import InvalidInputError

Container = Literal["mp4", "webm"]
Codec = Literal["h264", "hevc", "vp9"]


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """One kind of file."""

    suffix: str
    content_type: str
    codecs: tuple[Codec, ...]  # of the picture; the first is taken where none is asked for


FORMATS: Mapping[Container, VideoFormat] = {
    "mp4": VideoFormat(".mp4", "video/mp4", ("h264", "hevc")),
    "webm": VideoFormat(".webm", "video/webm", ("vp9",)),
}
SUFFIXES = tuple(each.suffix for each in FORMATS.values())


def require_suffix(name: str, container: Container, field: str) -> None:
    """Returns unless the name is that of another kind of file.

    Raises:
        InvalidInputError: it is.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES and suffix != FORMATS[container].suffix:
        message = f"ends with {suffix}, and the video is {container}: see output.format"
        raise InvalidInputError(message, field=field)


def suffix_of(content_type: object) -> str:
    """The suffix for a file of that type; an mp4's for any that is unknown."""
    suffixes = (each.suffix for each in FORMATS.values() if each.content_type == content_type)
    return next(suffixes, FORMATS["mp4"].suffix)
