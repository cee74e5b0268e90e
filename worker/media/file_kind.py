"""What a file is that could not be decoded, in words that say what to do about it.

Told by its first bytes, never by its name or its declared type.
"""

import re

HEAD_BYTES = 4096

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_EXPORT = "export it as JPEG or PNG"
_KINDS = [  # a pattern at the file's start, what it is, what helps
    (rb"\s*(?:<!--.*?-->\s*)*(?:<!doctype html|<html|<head|<body)", "a web page",
     "give the address of the file itself, not of a page that shows or shares it"),
    (rb"\s*(?:<\?xml.*?\?>\s*)?(?:<!--.*?-->\s*)*<svg", "an SVG drawing", _EXPORT),
    (rb"\s*(?:<\?xml.*?\?>\s*)?<Error>", "an error message of an object store",
     "check the address and whether it has expired"),
    (rb"\s*<\?xml", "an XML document", "give the address of the file itself"),
    (rb"\s*[{\[]\s*[\"{\[\]}]", "a JSON document", "give the address of the file itself"),
    (rb"version https://git-lfs", "a Git LFS pointer", "give the address of the file itself"),
    (rb"#EXTM3U|\[playlist\]|ffconcat", "a playlist", "give the recording itself"),
    (rb"%PDF-", "a PDF document", _EXPORT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing", _EXPORT),
    (rb"\x1f\x8b", "compressed with gzip", "send it uncompressed"),
    (rb"PK\x03\x04", "a ZIP archive", "send the file that is in it"),
    (rb"7z\xbc\xaf'\x1c|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive",
     "send the file that is in it"),
    (rb"8BPS", "a Photoshop document", _EXPORT),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", _EXPORT),
    (rb"\x00\x00[\x01\x02]\x00", "an icon", _EXPORT),
    (rb"\x0a[\x00\x02\x03\x04\x05]\x01[\x01\x02\x04\x08]", "a PCX picture", _EXPORT),
    (rb"FUJIFILMCCD-RAW|II.{6}CR|IIU\x00|IIRO|MMOR|\x00MRM", "a camera's raw picture", _EXPORT),
    (rb"\x76\x2f\x31\x01", "an OpenEXR picture", _EXPORT),
    (rb"#\?RADIANCE|#\?RGBE", "a Radiance HDR picture", _EXPORT),
    (rb"DDS |\xabKTX", "a texture", _EXPORT),
    (rb"MThd", "a MIDI file, which holds notes and no sound", "render it to wav or mp3"),
    (rb"\xff\xd8\xff", "a damaged JPEG picture", "send it again"),
    (rb"\x89PNG", "a damaged PNG picture", "send it again"),
    (rb"GIF8[79]a", "a damaged GIF picture", "send it again"),
    (rb"RIFF....WEBP", "a damaged WebP picture", "send it again"),
    (rb"(?:II\*\x00|MM\x00\*|II\+\x00|MM\x00\+)",
     "a TIFF picture of a kind that is not read, or a damaged one", _EXPORT),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", "a damaged BMP picture", _EXPORT),
    (rb"RIFF....(?:WAVE|AVI )|RF64....WAVE", "a wav or avi file", ""),
    (rb"ID3|\xff[\xfb\xf3\xf2\xfa]", "an mp3 file", ""),
    (rb"fLaC|OggS|FORM....AIF|#!AMR|\x1aE\xdf\xa3", "a sound or video file", ""),
]  # fmt: skip
_COMPILED = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind, remedy)
    for pattern, kind, remedy in _KINDS
]


def describe(head: bytes) -> str | None:
    """ "is a web page; give ..." for the first `HEAD_BYTES` of a file; None for an unknown one."""
    if not head:
        return "is empty"
    if brand := _isobmff_brand(head):
        return brand
    for pattern, kind, remedy in _COMPILED:
        if pattern.match(head):
            return f"is {kind}; {remedy}" if remedy else f"is {kind}"
    return None


def _isobmff_brand(head: bytes) -> str | None:
    """The words for a file of the MP4 family, by the brands in its first box."""
    if head[4:8] != b"ftyp":
        return None
    size = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in (8, *range(16, min(size, len(head)) - 3, 4))}
    if b"avif" in brands or b"avis" in brands:
        return f"is a damaged AVIF picture; {_EXPORT}"
    if brands & _HEIF_BRANDS:
        return "is a HEIC or HEIF picture, which is not read; export it as JPEG"
    if b"crx " in brands:
        return f"is a camera's raw picture; {_EXPORT}"
    return "is an mp4, mov or m4a file"
