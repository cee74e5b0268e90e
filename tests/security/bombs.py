"""Small files that cost a decoder much time or memory: what each is, and how it is made."""

import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.support.pictures import encoded
from tests.support.recordings import voice, write


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None) -> bytes:
    """A grey PNG with further chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _tiff(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A little-endian TIFF of one directory: tag, type, count and the bytes of each value."""
    body, directory = b"", struct.pack("<H", len(entries))
    at = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        stored = value
        if len(value) > 4:
            stored = struct.pack("<I", at + len(body))
            body += value
        directory += struct.pack("<HHI", tag, kind, count) + stored.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + body


def _picture_tags(width: int, height: int) -> list[tuple[int, int, int, bytes]]:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1}
    return [(tag, 4, 1, struct.pack("<I", value)) for tag, value in tags.items()]


def progressive_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + b"\xff\xd9"


def application_segments(count: int) -> bytes:
    """A JPEG with many parts of EXIF, which are put together one by one."""
    whole = encoded(Image.new("L", (64, 64)), "JPEG")
    flood = _jpeg_segment(0xE1, b"Exif\0\0" + bytes(65_000)) * count
    return whole[:2] + flood + whole[2:]


def exif_rationals(count: int) -> bytes:
    """A PNG whose EXIF has one value of many fractions."""
    exif = _tiff([(0x0112, 3, 1, b"\6\0"), (0x9999, 5, count, bytes(8 * count))])
    return _png(64, 64, _chunk(b"eXIf", exif))


def strip_offsets(count: int) -> bytes:
    """A TIFF of 64 x 64 pixels with an offset for each of millions of strips."""
    entries = [*_picture_tags(64, 64), (273, 4, count, bytes(4 * count))]
    entries += [(278, 4, 1, struct.pack("<I", 1)), (279, 4, count, bytes(4 * count))]
    return _tiff(sorted(entries))


def huge_tile(side: int) -> bytes:
    """A TIFF of 64 x 64 pixels in one tile that is much larger."""
    tile = zlib.compress(bytes(2**20))
    entries = [entry for entry in _picture_tags(64, 64) if entry[0] != 259]
    entries += [(259, 3, 1, b"\x08\0"), (322, 4, 1, struct.pack("<I", side))]
    entries += [(323, 4, 1, struct.pack("<I", side)), (324, 4, 1, struct.pack("<I", 8))]
    entries += [(325, 4, 1, struct.pack("<I", len(tile)))]
    return _tiff(sorted(entries)) + tile


def portable_comments(count: int) -> bytes:
    """A PPM whose header is comments."""
    return b"P6\n" + b"#\n" * count + b"64 64\n255\n" + bytes(3 * 64 * 64)


def avif_of_another_size(side: int) -> bytes:
    """An AVIF whose frame is larger than the file says."""
    whole = encoded(Image.new("RGB", (side, side), "teal"), "AVIF", speed=10)
    return whole.replace(struct.pack(">II", side, side), struct.pack(">II", 64, 64))


def compressed_text(megabytes: int) -> bytes:
    """A PNG with texts and a profile that unpack to a thousand times their size."""
    packed = zlib.compress(bytes(megabytes * 2**20), 9)
    texts = [_chunk(b"zTXt", b"a%d\0\0" % number + packed) for number in range(20)]
    international = _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed)
    return _png(64, 64, *texts, international, _chunk(b"iCCP", b"p\0\0" + packed))


def pixels_for_ever(megabytes: int) -> bytes:
    """A PNG with more pixels than it has room for."""
    return _png(64, 64, pixels=zlib.compress(bytes(megabytes * 2**20), 9))


def png_chunks(count: int) -> bytes:
    """A PNG of many small chunks."""
    return _png(64, 64, *[_chunk(b"abCd", b"")] * count)


def tiny_tiles(side: int) -> bytes:
    """A JPEG 2000 picture that says that each of its tiles is one pixel."""
    whole = bytearray(encoded(Image.new("L", (side, side)), "JPEG2000"))
    size = whole.index(b"\xff\x51")
    whole[size + 22 : size + 30] = struct.pack(">II", 1, 1)
    return bytes(whole)


def gif_frames(count: int) -> bytes:
    """A GIF of many frames."""
    frames = [Image.new("L", (64, 64), number % 256) for number in range(256)]
    whole = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = whole.index(b"\x21\xf9")
    return whole[:first] + whole[first:-1] * (count // 256) + b";"


PICTURES: dict[str, Callable[[], bytes]] = {
    "progressive scans": lambda: progressive_scans(1000, 20_000),
    "progressive scans, small": lambda: progressive_scans(64, 200_000),
    "APP1 segments": lambda: application_segments(500),
    "EXIF fractions": lambda: exif_rationals(3_000_000),
    "strip offsets": lambda: strip_offsets(5_000_000),
    "a huge tile": lambda: huge_tile(20_000),
    "a huge tile of 4 GB": lambda: huge_tile(65_000),
    "PPM comments": lambda: portable_comments(10_000_000),
    "AVIF of another size": lambda: avif_of_another_size(1000),
    "compressed text": lambda: compressed_text(50),
    "pixels for ever": lambda: pixels_for_ever(100),
    "PNG chunks": lambda: png_chunks(1_000_000),
    "tiny tiles": lambda: tiny_tiles(500),
    "GIF frames": lambda: gif_frames(50_000),
}


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def _mov(
    sizes: bytes, chunks: bytes, places: bytes, times: bytes, edits: bytes = b"", data: bytes = b""
) -> bytes:
    """A mov file with 16-bit sound and the given tables."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    length = 2**31 - 1
    movie = struct.pack(">IIIIIIH10x", 0, 0, 0, 48_000, length, 0x10000, 0x100)
    track = struct.pack(">IIIIII8xHHHH", 7, 0, 0, 1, 0, length, 0, 0, 0x100, 0)
    sound = struct.pack(">I4sIIHH", 36, b"sowt", 0, 1, 0, 0) + bytes(4)
    sound += struct.pack(">HHHHI", 1, 16, 0, 0, 48_000 << 16)
    tables = _box(
        b"stbl",
        _box(b"stsd", struct.pack(">II", 0, 1), sound),
        *(_box(*each) for each in ((b"stts", times), (b"stsc", chunks), (b"stsz", sizes))),
        _box(b"stco", places),
    )
    reference = _box(b"dref", struct.pack(">II", 0, 1), _box(b"url ", struct.pack(">I", 1)))
    media = _box(
        b"mdia",
        _box(b"mdhd", struct.pack(">IIIIIHH", 0, 0, 0, 48_000, length, 0, 0)),
        _box(b"hdlr", struct.pack(">I4s4s12xB", 0, b"mhlr", b"soun", 0)),
        _box(b"minf", _box(b"smhd", bytes(8)), _box(b"dinf", reference), tables),
    )
    edit_box = _box(b"edts", _box(b"elst", edits)) if edits else b""
    head = _box(b"tkhd", track + matrix + bytes(8))
    header = _box(b"mvhd", movie + matrix + bytes(28))
    moov = _box(b"moov", header, _box(b"trak", head, edit_box, media))
    return _box(b"ftyp", b"qt  \0\0\0\0qt  ") + _box(b"mdat", data) + moov


DATA_AT = 28  # of a mov file's samples


def same_bytes(count: int, samples: int) -> bytes:
    """A mov file each of whose chunks lies at the same place."""
    return _mov(
        sizes=struct.pack(">III", 0, 2, count * samples),
        chunks=struct.pack(">IIIII", 0, 1, 1, samples, 1),
        places=struct.pack(">II", 0, count) + struct.pack(">I", DATA_AT) * count,
        times=struct.pack(">IIII", 0, 1, count * samples, 0),
        data=bytes(max(samples * 2, 64)),
    )


def edit_list(edits: int, samples: int) -> bytes:
    """A mov file whose edit list plays all of it, again and again."""
    each = struct.pack(">IiI", 1, 0, 0x10000) + struct.pack(">IiI", 1, samples - 1, 0x10000)
    return _mov(
        sizes=struct.pack(">III", 0, 0, samples) + struct.pack(">I", 2) * samples,
        chunks=struct.pack(">IIIII", 0, 1, 1, 1, 1),
        places=struct.pack(">II", 0, samples) + struct.pack(">I", DATA_AT) * samples,
        times=struct.pack(">IIII", 0, 1, samples, 1),
        edits=struct.pack(">II", 0, 2 * edits) + each * edits,
        data=bytes(64),
    )


def amr_without_data(count: int) -> bytes:
    """Frames of an AMR file that hold nothing."""
    return b"#!AMR\n" + b"\x7c" * count


def mp3_without_end(megabytes: int) -> bytes:
    """The headers of mp3 frames, over and over."""
    return b"\xff\xfb\x90\x64" * (megabytes * 2**18)


def mp3_tags(count: int) -> bytes:
    """One ID3 tag after another, and a recording behind them."""
    tag = b"ID3\4\0\0\0\0\0\x0a" + b"TXXX\0\0\0\0\0\0"
    return tag * count + write(voice(0.5, 48_000), 48_000, "mp3", "mp3")


def damaged_packets(count: int) -> bytes:
    """AAC frames whose header is right and whose content is not."""
    return (b"\xff\xf1\x4c\x40\x02\x1f\xfc" + b"\xff" * 9) * count


def ogg_streams(count: int) -> bytes:
    """One short Ogg file after another, each with a serial number of its own."""
    return write(voice(0.1, 48_000), 48_000, "ogg", "libopus") * count


def wav_chunks(count: int) -> bytes:
    """A wav file of many chunks that say nothing."""
    whole = write(voice(0.5, 48_000), 48_000)
    return whole[:12] + b"junk\0\0\0\0" * count + whole[12:]


def flac_pictures(count: int) -> bytes:
    """A FLAC file with a large block of padding, many times."""
    whole = write(voice(0.5, 48_000), 48_000, "flac", "flac")
    block = b"\1" + (2**20).to_bytes(3, "big") + bytes(2**20)
    return whole[:42] + block * count + whole[42:]


def matroska_levels(count: int) -> bytes:
    """Matroska's elements in one another."""
    whole = write(voice(0.5, 48_000), 48_000, "matroska", "aac")
    tags = b"\x67\xc8\x01\xff\xff\xff\xff\xff\xff\xff" * count  # SimpleTag, of unknown size
    return whole + b"\x12\x54\xc3\x67\x01\xff\xff\xff\xff\xff\xff\xff" + tags


def wav_of_many_channels(seconds: int) -> bytes:
    """A wav file of the highest rate, with 255 channels."""
    header = struct.pack("<HHIIHH", 1, 255, 192_000, 192_000 * 255, 255, 8)
    data = bytes(255 * 192_000 * seconds)
    body = b"WAVEfmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


RECORDINGS: dict[str, Callable[[], bytes]] = {
    "a sample table of the same bytes": lambda: same_bytes(600, 1),
    "a large sample table of the same bytes": lambda: same_bytes(20_000, 1),
    "a sample table of huge chunks": lambda: same_bytes(20_000, 100_000),
    "an edit list": lambda: edit_list(10_000, 40_000),
    "AMR without data": lambda: amr_without_data(20_000_000),
    "mp3 headers": lambda: mp3_without_end(30),
    "ID3 tags": lambda: mp3_tags(1_000_000),
    "damaged packets": lambda: damaged_packets(1_000_000),
    "Ogg streams": lambda: ogg_streams(5000),
    "wav chunks": lambda: wav_chunks(2_000_000),
    "FLAC blocks": lambda: flac_pictures(30),
    "Matroska levels": lambda: matroska_levels(300_000),
    "wav of many channels": lambda: wav_of_many_channels(1),
}


def noise(num_bytes: int, start: bytes) -> bytes:
    """Random bytes behind the first bytes of a format."""
    return start + np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8).tobytes()


STARTS = {
    "an mp3": b"ID3\4\0\0\0\0\0\0",
    "an AAC stream": b"\xff\xf1\x4c\x40",
    "an Ogg page": b"OggS\0\2",
    "a Matroska file": b"\x1aE\xdf\xa3",
    "an MPEG stream": b"G@\0\x10",
}
RECORDINGS |= {
    f"noise in {name}": lambda start=start: noise(10_000_000, start)  # type: ignore[misc]
    for name, start in STARTS.items()
}
