"""Pictures of every kind that people send: which pixels, which way up, in which colours."""

import io
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from avatar_client.contract.job_errors import UnsupportedMediaError
from avatar_client.contract.media_source import MediaSource
from avatar_client.contract.request import JobInput
from tests.support import profiles
from tests.support.pictures import chart, encoded
from worker.media import picture
from worker.media.inputs import load_portrait
from worker.settings import Settings

TOLERANCE = 3.0  # of 255, in the mean


@pytest.fixture
def portrait(tmp_path: Path) -> Callable[..., Any]:
    """`portrait(content)` gives an image's pixels, (height, width, 3)."""

    def load(content: bytes, settings: Any = None) -> np.ndarray:
        image = load_portrait(MediaSource(content=content), tmp_path, settings or Settings())
        return np.asarray(image)

    return load


def as_ffmpeg_sees(content: bytes, tmp_path: Path) -> np.ndarray:
    """The pixels by the system's ffmpeg."""
    path = tmp_path / "picture"
    path.write_bytes(content)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-frames:v", "1"]
    done = subprocess.run(
        [*command, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    )
    return np.asarray(Image.open(io.BytesIO(done.stdout)))


FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "BMP": {},
    "GIF": {},
    "PPM": {},
}
MODES = ["RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA"]


def can_hold(format: str, mode: Any) -> bool:
    """Whether Pillow writes the mode into the format, and all its colours."""
    if (format, mode) in (("GIF", "RGB"), ("GIF", "RGBA"), ("AVIF", "P")):
        return False
    try:
        encoded(Image.new("RGB", (64, 48)).convert(mode), format)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg to compare")
@pytest.mark.parametrize("size", [(64, 48), (101, 67)])
@pytest.mark.parametrize("format", FORMATS)
def test_the_pixels_are_those_that_ffmpeg_sees(
    portrait: Callable[..., Any], tmp_path: Path, format: str, size: tuple[int, int]
) -> None:
    content = encoded(Image.fromarray(chart(size[1], size[0])), format, **FORMATS[format])

    difference = np.abs(portrait(content).astype(float) - as_ffmpeg_sees(content, tmp_path))

    assert difference.mean() <= TOLERANCE


@pytest.mark.parametrize(
    ("format", "mode"), [(f, m) for f in [*FORMATS, "AVIF"] for m in MODES if can_hold(f, m)]
)
def test_every_mode_keeps_its_colours(portrait: Callable[..., Any], format: str, mode: str) -> None:
    image = Image.fromarray(chart()).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(float)

    pixels = portrait(encoded(image, format, **FORMATS.get(format, {"quality": 90})))

    assert np.abs(pixels - expected).mean() <= TOLERANCE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_it_stands_upright(portrait: Callable[..., Any], format: str, orientation: int) -> None:
    upright = Image.fromarray(chart())
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose, which undoes the turn
    stored = (
        upright.transpose(Image.Transpose(back[orientation])) if orientation in back else upright
    )
    exif = Image.Exif()
    exif[0x0112] = orientation

    pixels = portrait(encoded(stored, format, exif=exif))

    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels.astype(float) - np.asarray(upright)).mean() <= TOLERANCE


def test_side_data_that_cannot_be_read_turns_nothing(portrait: Callable[..., Any]) -> None:
    content = encoded(
        Image.fromarray(chart()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + b"\7" * 9
    )

    assert portrait(content).shape == (48, 64, 3)


# Colours

SPACES = [("adobe", 2.2), ("p3", 2.2), ("srgb", 1.0), ("srgb", 1.8), ("bt2020", 2.4), ("p3", 1.0)]


@pytest.mark.parametrize(("space", "gamma"), SPACES)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_says_what_the_numbers_mean(
    portrait: Callable[..., Any], format: str, space: str, gamma: float
) -> None:
    profile = profiles.rgb_profile(space, gamma)
    options = {"quality": 100} if format in ("JPEG", "AVIF") else {"lossless": True}
    options = options if format in ("JPEG", "AVIF", "WEBP") else {}

    pixels = portrait(encoded(Image.fromarray(chart()), format, icc_profile=profile, **options))

    assert np.abs(pixels - profiles.shown(chart(), space, gamma)).mean() <= TOLERANCE


def test_a_profile_counts_by_what_it_does_and_not_by_its_name(portrait: Callable[..., Any]) -> None:
    named = profiles.rgb_profile("srgb", 1.0, description="sRGB IEC61966-2.1")
    unnamed = profiles.rgb_profile("srgb", 2.2)
    image = Image.fromarray(chart())

    linear = portrait(encoded(image, "PNG", icc_profile=named))
    close = portrait(encoded(image, "PNG", icc_profile=unnamed))

    assert np.abs(linear - profiles.shown(chart(), "srgb", 1.0)).mean() <= TOLERANCE
    assert np.abs(close.astype(float) - chart()).mean() <= TOLERANCE


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_has_profiles_too(portrait: Callable[..., Any], mode: str, gamma: float) -> None:
    grey = chart()[..., 0]
    image = Image.fromarray(grey).convert(mode)

    pixels = portrait(encoded(image, "PNG", icc_profile=profiles.grey_profile(gamma)))

    expected = profiles.encode_srgb((grey / 255) ** gamma)
    assert np.abs(pixels - expected[..., None]).mean() <= TOLERANCE


@pytest.mark.parametrize("colours", [256, 16])
def test_a_palette_has_a_profile_too(portrait: Callable[..., Any], colours: int) -> None:
    image = Image.fromarray(chart()).quantize(colours)
    shown = profiles.shown(np.asarray(image.convert("RGB")), "adobe", 2.2)

    pixels = portrait(encoded(image, "PNG", icc_profile=profiles.rgb_profile("adobe", 2.2)))

    assert np.abs(pixels - shown).mean() <= TOLERANCE


def test_a_profile_for_another_kind_of_picture_says_nothing(portrait: Callable[..., Any]) -> None:
    content = encoded(Image.fromarray(chart()), "PNG", icc_profile=b"no profile at all")

    assert np.array_equal(portrait(content), chart())


def with_chunk(kind: Any, body: Any) -> Any:
    """The chart as a PNG with one more chunk behind its header."""
    content = encoded(Image.fromarray(chart()), "PNG")
    chunk = struct.pack(">I", len(body)) + kind + body
    chunk += struct.pack(">I", zlib.crc32(kind + body))
    return content[:33] + chunk + content[33:]


@pytest.mark.parametrize(
    ("primaries", "transfer", "space", "gamma"),
    [(9, 8, "bt2020", 1.0), (12, 4, "p3", 2.2), (1, 8, "srgb", 1.0), (9, 4, "bt2020", 2.2)],
)
def test_code_points_of_a_png_are_heeded(
    portrait: Callable[..., Any], primaries: int, transfer: int, space: str, gamma: float
) -> None:
    content = with_chunk(b"cICP", bytes([primaries, transfer, 0, 1]))

    assert np.abs(portrait(content) - profiles.shown(chart(), space, gamma)).mean() <= TOLERANCE


@pytest.mark.parametrize("code_points", [(1, 13), (1, 1), (2, 2), (200, 99)])
def test_code_points_that_say_srgb_or_nothing_change_nothing(
    portrait: Callable[..., Any], code_points: tuple[int, int]
) -> None:
    assert np.array_equal(portrait(with_chunk(b"cICP", bytes([*code_points, 0, 1]))), chart())


@pytest.mark.parametrize("transfer", [16, 18])
def test_a_picture_of_high_range_keeps_its_order_of_brightness(
    portrait: Callable[..., Any], transfer: int
) -> None:
    content = with_chunk(b"cICP", bytes([9, transfer, 0, 1]))

    grey = portrait(content).astype(float).mean(axis=-1)

    assert grey.max() - grey.min() > 140
    assert grey[0, 0] < 30 < grey[-1, -1]


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8])
def test_the_gamma_of_a_png_is_heeded(portrait: Callable[..., Any], gamma: float) -> None:
    content = with_chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))

    expected = profiles.encode_srgb((chart() / 255) ** (1 / gamma))
    assert np.abs(portrait(content) - expected).mean() <= TOLERANCE


def test_the_usual_gamma_of_a_png_changes_nothing(portrait: Callable[..., Any]) -> None:
    assert np.array_equal(portrait(with_chunk(b"gAMA", struct.pack(">I", 45455))), chart())


def test_the_code_points_of_an_avif_are_heeded(portrait: Callable[..., Any]) -> None:
    content = encoded(Image.fromarray(chart()), "AVIF", quality=100, subsampling="4:4:4")
    at = content.index(b"colrnclx") + 8
    content = content[:at] + struct.pack(">HH", 9, 8) + content[at + 4 :]

    pixels = portrait(content)

    assert np.abs(pixels - profiles.shown(chart(), "bt2020", 1.0)).mean() <= TOLERANCE


# What lies beside the pixels


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (203, 131)])
def test_a_jpeg_without_its_end_is_whole(
    portrait: Callable[..., Any], size: tuple[int, int], progressive: bool
) -> None:
    image = Image.fromarray(chart(size[1], size[0]))
    content = encoded(image, "JPEG", quality=90, progressive=progressive)
    assert content.endswith(b"\xff\xd9")

    assert np.array_equal(portrait(content[:-2]), portrait(content))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
def test_a_jpeg_of_which_pixels_are_missing_is_refused(
    portrait: Callable[..., Any], share: float
) -> None:
    content = encoded(Image.fromarray(chart(131, 203)), "JPEG", quality=95)

    with pytest.raises(UnsupportedMediaError, match="damaged JPEG"):
        portrait(content[: int(len(content) * share)])


@pytest.mark.parametrize("compressed", [True, False])
def test_the_text_in_a_png_may_be_as_long_as_it_likes(
    portrait: Callable[..., Any], compressed: bool
) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a very long prompt " * 150_000, zip=compressed)
    text.add_itxt("workflow", "{}" * 1_500_000, zip=compressed)

    content = encoded(Image.fromarray(chart()), "PNG", pnginfo=text)

    assert np.array_equal(portrait(content), chart())


def test_a_profile_larger_than_any_is_left_out(portrait: Callable[..., Any]) -> None:
    bomb = b"bomb\0\0" + zlib.compress(bytes(64 * 2**20))

    assert np.array_equal(portrait(with_chunk(b"iCCP", bomb)), chart())


# Limits and words


def test_the_largest_phone_is_below_the_limit() -> None:
    assert Settings().max_image_pixels > 16_320 * 12_240  # 200 megapixels


def test_a_picture_of_a_phone_with_fifty_megapixels_is_read(portrait: Callable[..., Any]) -> None:
    content = encoded(Image.new("RGB", (8160, 6144), (90, 120, 150)), "JPEG", quality=50)

    assert portrait(content).shape == (6144, 8160, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(64), "HEIC"),
        (b"\n<!DOCTYPE html><html><title>Drive</title>", "web page"),
        (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "object store"),
        (b'{"error": "expired"}', "JSON"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        (b"8BPS" + bytes(40), "Photoshop"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\x01\0\x01\0" + bytes(40), "icon"),
        (b"PK\x03\x04" + bytes(40), "ZIP"),
        (b"\0\0\0\x18ftypmp42" + bytes(40), "mp4"),
        (b"ID3\x04" + bytes(40), "mp3"),
        (b"no picture at all", "not an image"),
    ],
)
def test_it_is_told_what_was_sent(portrait: Callable[..., Any], content: bytes, words: str) -> None:
    with pytest.raises(UnsupportedMediaError, match=words) as caught:
        portrait(content)

    assert caught.value.field == "image"


def test_numbers_without_a_meaning_as_colours_are_told(portrait: Callable[..., Any]) -> None:
    content = encoded(
        Image.fromarray(np.linspace(0, 1, 64 * 48, dtype="f4").reshape(48, 64)), "TIFF"
    )

    with pytest.raises(UnsupportedMediaError, match="bits a channel"):
        portrait(content)


def test_the_formats_that_are_promised_are_those_that_are_read() -> None:
    promised = (JobInput.model_fields["image"].description or "").rstrip(".")
    named = promised.removeprefix("The portrait: ").replace(" or ", ", ").split(", ")

    assert [name.upper().replace(" ", "") for name in named] == picture.FORMATS
