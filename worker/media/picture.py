"""A picture as upright RGB pixels in sRGB, decoded by Pillow.

What lies beside the pixels (text, profiles, a missing end) does not decide whether they are read.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from avatar_client.contract.job_errors import UnsupportedMediaError
from worker.media import colour

# Formats that Pillow decodes itself. EPS, for one, it hands to an interpreter.
# JPEG includes MPO, which has no entry of its own: naming one is a KeyError.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM"]

MAX_PROFILE_BYTES = 8 * 2**20  # decompressed; printers' own have three million
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES  # Pillow's limit for profiles, too

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
XMP = b"XML:com.adobe.xmp\0"  # the text that may hold the orientation
MAX_XMP_BYTES = 2**20
JPEG_START, JPEG_END, JPEG_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xda"
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # no restart, and no pixel of 255
MAX_SCANS = 500  # cameras and optimisers write 10 to 70; each costs as much as a picture of one
# Bits that are no picture: where pixels are missing, a decoder shows other ones for them than for
# nothing.
JPEG_PROBE = bytes(range(17, 200, 3))


def open_picture(content: bytes) -> Image.Image:
    """The picture, of which the header alone has been read.

    Raises:
        UnsupportedMediaError: a JPEG of more scans than anybody makes.
        OSError, SyntaxError, ValueError, ...: it is none, or a damaged one.
    """
    if content.startswith(JPEG_START) and _has_too_many_scans(content):
        message = f"has more than {MAX_SCANS} scans; export it as a plain JPEG or PNG"
        raise UnsupportedMediaError(message, field="image")
    if content.startswith(PNG_SIGNATURE):
        content = _without_text(content)
    return Image.open(io.BytesIO(content), formats=FORMATS)


def decode(image: Image.Image, content: bytes) -> Image.Image:
    """Upright 8-bit sRGB pixels of an opened picture; alpha laid on white.

    Raises:
        UnsupportedMediaError: its numbers are of a kind that has no meaning as colours.
        OSError, SyntaxError, ValueError, ...: it is damaged.
    """
    try:
        image.load()
    except OSError:
        if image.format != "JPEG" or content.endswith(JPEG_END):
            raise
        image = _without_end(content)
    space = _code_points(image, content)
    image = _rgb(upright(image), space)
    return colour.from_space(image, space) if space is not None else image


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its side data say."""
    # what cannot be read of the side data says nothing of the orientation
    with suppress(OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image, space: colour.ColourSpace | None) -> Image.Image:
    """Any mode as 8-bit RGB; in sRGB, unless `space` says what is to be done about it."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion clips
        info = image.info
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.info = info
    if image.mode in ("I", "F"):
        message = "must have 8 or 16 bits a channel; export it as JPEG or PNG"
        raise UnsupportedMediaError(message, field="image")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer).convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile and space is None:
        image = colour.from_profile(image, profile)
    return image.convert("RGB")


def _code_points(image: Image.Image, content: bytes) -> colour.ColourSpace | None:
    """The colours that a picture names by code points, or a PNG by its gamma.

    A PNG's code points come before its profile, and its gamma after it; an AVIF's profile comes
    first.
    """
    if image.format == "PNG":
        chunks = {kind: body for kind, body in _png_chunks(content) if kind in (b"cICP", b"sRGB")}
        code_points = chunks.get(b"cICP", b"")
        if len(code_points) == 4:
            return colour.from_code_points(code_points[0], code_points[1])
        if "icc_profile" in image.info or b"sRGB" in chunks:
            return None
        return colour.from_gamma(image.info.get("gamma"), image.info.get("chromaticity"))
    if image.format == "AVIF" and "icc_profile" not in image.info:
        at = content.find(b"colrnclx")  # the first is the picture's own
        if at >= 0 and len(content) >= at + 12:
            return colour.from_code_points(*struct.unpack_from(">HH", content, at + 8))
    return None


def _has_too_many_scans(content: bytes) -> bool:
    """Whether the file's first JPEG has; others and what else may follow it do not count."""
    num_scans, at = 0, len(JPEG_START)
    while found := JPEG_MARKER.search(content, at):
        at = found.end()
        if found[1] == JPEG_END[1:]:
            break
        num_scans += found[1] == JPEG_SCAN
        if num_scans > MAX_SCANS:
            return True
        at += int.from_bytes(content[at : at + 2], "big")
    return False


def _without_end(content: bytes) -> Image.Image:
    """A JPEG whose end marker is missing, if only that is.

    Raises:
        OSError: pixels are missing, too.
    """
    images = []
    for tail in (b"", JPEG_PROBE):
        image = Image.open(io.BytesIO(content + tail + JPEG_END), formats=["JPEG"])
        image.load()
        images.append(image)
    if images[0].tobytes() != images[1].tobytes():
        raise OSError("the picture is cut short")
    return images[0]


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk, as far as the file goes on as it should."""
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if len(body) < length:
            break
        yield kind, body
        if kind == b"IEND":
            break
        at += 12 + length


def _without_text(content: bytes) -> bytes:
    """A PNG without its texts, and without a profile that is larger than any."""
    kept = [PNG_SIGNATURE]
    at = len(PNG_SIGNATURE)
    for kind, body in _png_chunks(content):
        whole = content[at : at + 12 + len(body)]
        at += len(whole)
        if kind in PNG_TEXT and not _is_small_xmp(body):
            continue
        if kind == b"iCCP" and not _is_small(body.partition(b"\0")[2][1:]):
            continue
        kept.append(whole)
    return b"".join([*kept, content[at:]])


def _is_small_xmp(body: bytes) -> bool:
    """Whether a text is XMP, and stays within the limits."""
    if not body.startswith(XMP) or len(body) > MAX_XMP_BYTES:
        return False
    is_compressed = body[len(XMP) : len(XMP) + 1] == b"\1"
    text = body[len(XMP) + 2 :].partition(b"\0")[2].partition(b"\0")[2]  # past two languages
    return not is_compressed or _is_small(text)


def _is_small(compressed: bytes) -> bool:
    """Whether what has been compressed stays within the limit."""
    reader = zlib.decompressobj()
    with suppress(zlib.error):
        reader.decompress(compressed, MAX_PROFILE_BYTES)
    return not reader.unconsumed_tail
