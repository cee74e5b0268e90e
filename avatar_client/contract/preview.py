"""The picture that a running job's progress may carry: a small JPEG as a `data:` URL.

Whoever reads it need not trust who wrote it: what is no plain JPEG of a small picture is refused
here, before anything decodes it.
"""

import base64
import binascii

MAX_CHARACTERS = 60_000  # of the URL: a progress stays small, however often it is asked for
MAX_SIDE = 2048  # px; a few bytes can name a picture that fills a memory
PREFIX = "data:image/jpeg;base64,"

START, END = b"\xff\xd8", b"\xff\xd9"
FRAME = 0xC0  # the marker of a baseline frame, whose header names the size
OTHER_FRAMES = {*range(0xC1, 0xD0)} - {0xC4, 0xC8, 0xCC}  # progressive and such, of many passes
SCAN = b"\xff\xda"


def fits(num_bytes: int, width: int, height: int) -> bool:
    """Whether a JPEG of such a size is small enough."""
    num_characters = len(PREFIX) + 4 * -(-num_bytes // 3)
    return (
        num_characters <= MAX_CHARACTERS
        and 0 < min(width, height) <= max(width, height) <= MAX_SIDE
    )


def to_data_url(jpeg: bytes) -> str:
    """The form in which the progress carries it.

    Raises:
        ValueError: it is too large, or no JPEG.
    """
    url = PREFIX + base64.b64encode(jpeg).decode()
    read(url)
    return url


def read(url: object) -> bytes:
    """The JPEG in a `data:` URL.

    Raises:
        ValueError: there is none, or it is too large.
    """
    if not isinstance(url, str) or not url.startswith(PREFIX):
        raise ValueError("a preview is a JPEG in a data: URL")
    if len(url) > MAX_CHARACTERS:
        raise ValueError(f"a preview has at most {MAX_CHARACTERS} characters")
    try:
        jpeg = base64.b64decode(url.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a preview is base64") from None
    if not fits(len(jpeg), *_size(jpeg)):
        raise ValueError(f"a preview has at most {MAX_SIDE} x {MAX_SIDE} pixels")
    return jpeg


def _size(jpeg: bytes) -> tuple[int, int]:
    """Width and height of a baseline JPEG of one scan, whose decoding takes one pass.

    Source: ITU-T T.81, annex B: marker, length, content, until the scan.

    Raises:
        ValueError: it is none.
    """
    if jpeg.startswith(START) and jpeg.endswith(END):
        position, sizes = len(START), []
        while position + 9 <= len(jpeg) and jpeg[position] == 0xFF:
            marker = jpeg[position + 1]
            if marker in OTHER_FRAMES:
                break
            if marker == FRAME:
                height = int.from_bytes(jpeg[position + 5 : position + 7])
                sizes.append((int.from_bytes(jpeg[position + 7 : position + 9]), height))
            if jpeg.startswith(SCAN, position):
                if len(sizes) == 1 and jpeg.count(SCAN, position) == 1:
                    return sizes[0]
                break
            position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    raise ValueError("a preview is a baseline JPEG")
