import io
import math
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputTooLargeError,
    InputUrlBlockedError,
    InvalidInputError,
    UnsupportedMediaError,
    WorkerError,
)
from avatar_client.contract.media_source import MediaSource
from tests.conftest import MediaServer
from worker.media.inputs import Speech, load_portrait, load_speech
from worker.settings import Settings

SETTINGS = Settings(max_audio_seconds=5.0, max_image_pixels=1_000_000, max_input_bytes=2**21)


@pytest.fixture
def portrait(tmp_path: Path) -> Callable[..., Any]:
    """`portrait(content)` loads an image from its bytes, or from a URL."""

    def load(content: Any, settings: Any = SETTINGS) -> Image.Image:
        is_url = isinstance(content, str)
        source = MediaSource(url=content) if is_url else MediaSource(content=content)
        return load_portrait(source, tmp_path, settings)

    return load


@pytest.fixture
def speech(tmp_path: Path) -> Callable[..., Any]:
    """`speech(content, ...)` loads a recording from its bytes, or from a URL."""

    def load(content: Any, settings: Any = SETTINGS, **options: Any) -> Speech:
        is_url = isinstance(content, str)
        source = MediaSource(url=content) if is_url else MediaSource(content=content)
        return load_speech(source, tmp_path, settings, **options)

    return load


# Images


def encoded(image: Any, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def two_halves(
    mode: str = "RGB",
    top: tuple[int, int, int] = (200, 60, 40),
    bottom: tuple[int, int, int] = (30, 90, 180),
    size: tuple[int, int] = (64, 48),
) -> Image.Image:
    image = Image.new(mode, size, top)
    image.paste(bottom, (0, size[1] // 2, size[0], size[1]))
    return image


def colour(image: Any, *at: Any) -> Any:
    return np.asarray(image)[at[1], at[0]].tolist()


@pytest.mark.parametrize(
    "format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "AVIF", "JPEG2000"]
)
def test_any_raster_format_becomes_rgb(portrait: Callable[..., Any], format: str) -> None:
    image = portrait(encoded(two_halves(), format))

    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert colour(image, 32, 8) == pytest.approx([200, 60, 40], abs=6)
    assert colour(image, 32, 40) == pytest.approx([30, 90, 180], abs=6)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(portrait: Callable[..., Any], format: str) -> None:
    frames = [Image.new("RGB", (40, 40), value) for value in ("white", "black", "black")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])

    assert colour(portrait(content), 20, 20) == [255, 255, 255]


def test_a_jpeg_of_two_pictures_as_cameras_make_it_gives_its_first(
    portrait: Callable[..., Any],
) -> None:
    second = Image.new("RGB", (64, 48))

    content = encoded(two_halves(), "MPO", save_all=True, append_images=[second])

    assert colour(portrait(content), 32, 8) == pytest.approx([200, 60, 40], abs=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_a_turned_camera_stands_upright(
    portrait: Callable[..., Any], orientation: int
) -> None:
    upright = two_halves(size=(64, 48))
    turns = {  # what the camera stored, for each value of the tag
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation

    image = portrait(encoded(stored, "PNG", exif=exif))

    assert image.size == (64, 48)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_transparent_pixels_turn_white_and_not_into_hidden_colours(
    portrait: Callable[..., Any],
) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 20, 40))
    image.paste((0, 0, 0, 128), (0, 0, 5, 40))

    result = portrait(encoded(image, "PNG"))

    assert colour(result, 30, 20) == [255, 255, 255]
    assert colour(result, 10, 20) == [0, 0, 255]
    assert colour(result, 2, 20) == pytest.approx([127] * 3, abs=1)


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_keeps_its_brightness(portrait: Callable[..., Any], mode: str) -> None:
    values = np.zeros((40, 40), np.uint8)
    values[:, 20:] = 255
    grey = Image.fromarray(values)
    if mode == "I;16":
        source = Image.fromarray(values.astype(np.uint16) * 128)  # half of full brightness
    elif mode == "YCbCr":
        source = grey.convert("RGB").convert(mode)
    else:
        source = grey.convert("RGB" if mode == "CMYK" else "L").convert(mode)

    result = portrait(encoded(source, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))

    assert colour(result, 5, 5) == pytest.approx([0] * 3, abs=1)
    expected = 127 if mode == "I;16" else 255
    assert colour(result, 35, 5) == pytest.approx([expected] * 3, abs=1)


def test_a_palette_with_a_transparent_entry_is_flattened(portrait: Callable[..., Any]) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])

    assert colour(portrait(encoded(image, "PNG", transparency=1)), 5, 5) == [255, 255, 255]


def swapped_primaries() -> bytes:
    """A profile in which red is blue: what it says must change the colours."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(profile.replace(b"sRGB", b"odd!").replace(b"s\0R\0G\0B", b"o\0d\0d\0!"))
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * profile[131], 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


def test_an_embedded_colour_profile_is_honoured(portrait: Callable[..., Any]) -> None:
    image = Image.new("RGB", (40, 40), (255, 0, 0))

    assert colour(portrait(encoded(image, "PNG", icc_profile=swapped_primaries())), 5, 5) == (
        pytest.approx([0, 0, 255], abs=3)
    )


def test_an_srgb_profile_changes_nothing_and_a_broken_one_neither(
    portrait: Callable[..., Any],
) -> None:
    image = two_halves()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    for profile in (srgb, b"no profile"):
        result = portrait(encoded(image, "PNG", icc_profile=profile))
        assert np.array_equal(np.asarray(result), np.asarray(image))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and breaks off at its pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + bytes(9),
    ):
        check = zlib.crc32(chunk)
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", check)
    return content


@pytest.mark.parametrize("side", [1001, 10_000, 20_000, 2**31 - 1])
def test_a_size_over_the_limit_is_refused_from_the_header(
    portrait: Callable[..., Any], side: int
) -> None:
    with pytest.raises(InputTooLargeError, match="1000000 pixels"):
        portrait(png_header(side, side))


def test_a_decompression_bomb_costs_no_memory(portrait: Callable[..., Any]) -> None:
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")  # 81 million pixels in 10 kB
    assert len(bomb) < 20_000
    tracemalloc.start()

    with pytest.raises(InputTooLargeError):
        portrait(bomb)

    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (31, 64), (64, 31), (33, 300), (900, 40)])
def test_a_picture_that_can_hold_no_face_is_refused_with_its_size(
    portrait: Callable[..., Any], width: int, height: int
) -> None:
    with pytest.raises(InvalidInputError, match=f"{width} x {height}") as caught:
        portrait(encoded(Image.new("RGB", (width, height)), "PNG"))
    assert caught.value.field == "image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_a_cut_image_is_refused(portrait: Callable[..., Any], format: str) -> None:
    content = encoded(Image.effect_noise((200, 200), 60).convert("RGB"), format)

    for share in (0.02, 0.5, 0.9):
        with pytest.raises(UnsupportedMediaError):
            portrait(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"just text",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        b"%PDF-1.7\n",
        b"\x89PNG\r\n\x1a\n",
        png_header(0, 0),
        b"GIF89a",
    ],
)
def test_what_is_no_raster_image_is_refused(portrait: Callable[..., Any], content: bytes) -> None:
    with pytest.raises(UnsupportedMediaError) as caught:
        portrait(content)
    assert caught.value.field == "image"


def test_sound_is_no_image_and_an_image_no_sound(
    portrait: Callable[..., Any],
    speech: Callable[..., Any],
    make_speech: Callable[..., bytes],
    make_portrait: Callable[..., bytes],
) -> None:
    with pytest.raises(UnsupportedMediaError):
        portrait(make_speech())
    with pytest.raises(UnsupportedMediaError):
        speech(make_portrait())


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage and reads on
@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP"]
)
def test_damaged_bytes_end_in_an_image_or_in_a_refusal(
    portrait: Callable[..., Any], format: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(two_halves(), format, **({"exif": exif} if format in ("PNG", "JPEG") else {}))
    choice = random.Random(format)

    for _ in range(150):
        content = bytearray(whole)
        for _ in range(choice.randint(1, 8)):
            content[choice.randrange(min(len(content), 400))] = choice.randrange(256)
        try:
            image = portrait(bytes(content))
        except WorkerError:
            continue
        assert image.mode == "RGB"


# Recordings


def tone(seconds: float, rate_hz: int, channels: int = 1, hz: float = 440.0) -> np.ndarray:
    """A sine of int16 at half of full scale, (channels, N); the second channel an octave up."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    octaves = 2.0 ** np.arange(channels)[:, None]
    return (16384 * np.sin(2 * np.pi * hz * octaves * time)).astype(np.int16)


def media(
    samples: Any,
    rate_hz: int,
    container: str = "wav",
    codec: str = "pcm_s16le",
    layout: Any = None,
    picture: bool = False,
) -> bytes:
    """The samples as a file."""
    layout = layout or {1: "mono", 2: "stereo"}[len(samples)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound = output.add_stream(codec, rate=rate_hz, options={"strict": "experimental"})
        assert isinstance(sound, av.AudioStream)
        sound.layout = layout
        if picture:
            video = output.add_stream("libx264", rate=25)
            video.width = video.height = 64
            output.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
            output.mux(video.encode(None))
        kind = {np.int16: "s16", np.float32: "flt", np.uint8: "u8"}[samples.dtype.type]
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format=kind, layout=layout)
        frame.sample_rate, frame.pts = rate_hz, 0
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    return buffer.getvalue()


def recorded(loaded: Any) -> np.ndarray:
    """The samples of the recording as int16, (channels, N)."""
    samples = np.frombuffer(loaded.recording.raw_data, np.int16)
    return samples.reshape(-1, loaded.recording.channels).T


def test_16_khz_mono_is_what_the_file_says_to_the_last_bit(speech: Callable[..., Any]) -> None:
    samples = np.arange(-32768, 32768, dtype=np.int16)[None]

    loaded = speech(media(samples, 16_000))

    assert loaded.waveform.dtype == np.float32
    assert np.array_equal(loaded.waveform, samples[0] / np.float32(32768))
    assert np.array_equal(recorded(loaded), samples)
    assert loaded.duration_seconds == 4.096


def test_the_recording_keeps_rate_and_channels_and_the_model_hears_their_mean(
    speech: Callable[..., Any],
) -> None:
    samples = tone(1.0, 44_100, channels=2)

    loaded = speech(media(samples, 44_100))

    assert (loaded.recording.frame_rate, loaded.recording.channels) == (44_100, 2)
    assert np.array_equal(recorded(loaded), samples)
    time = np.arange(16_000) / 16_000
    mean = 0.25 * (np.sin(2 * np.pi * 440 * time) + np.sin(2 * np.pi * 880 * time))
    assert loaded.waveform.shape == (16_000,)
    assert np.abs(loaded.waveform - mean)[200:-200].max() < 1e-3


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_the_waveform_is_as_long_as_the_recording(speech: Callable[..., Any], rate_hz: int) -> None:
    num_samples = rate_hz + 7

    loaded = speech(media(tone(num_samples / rate_hz, rate_hz), rate_hz))

    assert len(loaded.waveform) == math.ceil(num_samples * 16_000 / rate_hz)
    assert loaded.recording.frame_rate == min(rate_hz, 48_000)
    assert loaded.duration_seconds == pytest.approx(num_samples / rate_hz, abs=1e-4)
    assert np.sqrt(np.mean(loaded.waveform**2)) == pytest.approx(0.3535, abs=0.003)


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [
        ("wav", "pcm_s24le", 48_000),
        ("wav", "pcm_u8", 16_000),
        ("wav", "pcm_f32le", 16_000),
        ("wav", "pcm_mulaw", 8000),
        ("aiff", "pcm_s16be", 44_100),
        ("au", "pcm_s16be", 44_100),
        ("mp3", "mp3", 44_100),
        ("ipod", "aac", 44_100),
        ("adts", "aac", 48_000),
        ("ogg", "vorbis", 44_100),
        ("ogg", "libopus", 48_000),
        ("webm", "libopus", 48_000),
        ("matroska", "flac", 48_000),
        ("flac", "flac", 44_100),
        ("mp4", "aac", 44_100),
        ("mpegts", "aac", 48_000),
        ("wv", "wavpack", 44_100),
        ("amr", "libopencore_amrnb", 8000),
    ],
)
def test_any_format_is_heard(
    speech: Callable[..., Any], container: str, codec: str, rate_hz: int
) -> None:
    samples = np.repeat(tone(1.5, rate_hz), 2 if codec == "vorbis" else 1, axis=0)

    loaded = speech(media(samples, rate_hz, container, codec))

    assert loaded.duration_seconds == pytest.approx(1.5, abs=0.08)  # coders pad to whole blocks
    middle = loaded.waveform[8000:16_000] * np.hanning(8000)
    assert np.argmax(np.abs(np.fft.rfft(middle))) * 2 == pytest.approx(440, abs=4)
    assert np.sqrt(np.mean(loaded.waveform[8000:16_000] ** 2)) == pytest.approx(0.35, abs=0.06)


def test_the_sound_of_a_video_is_taken(speech: Callable[..., Any]) -> None:
    content = media(tone(1.0, 44_100, 2), 44_100, "mp4", "aac", picture=True)

    loaded = speech(content)

    assert (loaded.recording.frame_rate, loaded.recording.channels) == (44_100, 2)
    assert loaded.duration_seconds == pytest.approx(1.0, abs=0.03)


def test_surround_sound_becomes_stereo(speech: Callable[..., Any]) -> None:
    samples = np.repeat(tone(0.5, 48_000), 6, axis=0)

    loaded = speech(media(samples, 48_000, layout="5.1"))

    assert loaded.recording.channels == 2
    assert np.abs(loaded.waveform).max() > 0.3


def test_a_part_is_cut_to_the_sample(speech: Callable[..., Any]) -> None:
    samples = tone(4.0, 44_100, 2)

    loaded = speech(media(samples, 44_100), start_seconds=1.25, max_seconds=1.5)

    assert np.array_equal(recorded(loaded), samples[:, 55_125 : 55_125 + 66_150])
    assert loaded.duration_seconds == 1.5
    assert len(loaded.waveform) == 24_000


def test_max_seconds_beyond_the_end_takes_what_there_is(speech: Callable[..., Any]) -> None:
    loaded = speech(media(tone(1.0, 16_000), 16_000), start_seconds=0.25, max_seconds=100.0)

    assert loaded.duration_seconds == 0.75


def test_a_recording_over_the_limit_is_refused_unless_a_part_is_asked_for(
    speech: Callable[..., Any],
) -> None:
    content = media(tone(6.0, 16_000), 16_000)

    with pytest.raises(InputTooLargeError, match="limit of 5 s") as caught:
        speech(content)
    assert caught.value.field == "audio"
    with pytest.raises(InputTooLargeError):
        speech(content, max_seconds=5.5)
    assert speech(content, max_seconds=5.0).duration_seconds == 5.0
    assert speech(content, start_seconds=1.5).duration_seconds == 4.5


@pytest.fixture(scope="session")
def hour_long() -> bytes:
    """An hour of silence, and a tone in its last second, in 200 kB."""
    samples = np.zeros((1, 3600 * 8000), np.int16)
    samples[:, -8000:] = tone(1.0, 8000)
    return media(samples, 8000, "flac", "flac")


def test_an_hour_costs_neither_memory_nor_time_when_a_part_is_taken(
    speech: Callable[..., Any], hour_long: bytes
) -> None:
    tracemalloc.start()
    with pytest.raises(InputTooLargeError):
        speech(hour_long)
    assert speech(hour_long, max_seconds=2.0).duration_seconds == 2.0
    late = speech(hour_long, start_seconds=3599.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert late.duration_seconds == 1.0
    assert np.abs(late.waveform).max() > 0.45
    assert peak < 10_000_000  # the hour as float32: 115 MB


@pytest.mark.parametrize("start_seconds", [1.0, 1.5, 7200.0, 1e300])
def test_a_start_beyond_the_end_names_its_field(
    speech: Callable[..., Any], start_seconds: float
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        speech(media(tone(1.0, 16_000), 16_000), start_seconds=start_seconds)
    assert caught.value.field == "audio_start_seconds"


@pytest.mark.parametrize(
    ("seconds", "options", "field"),
    [
        (0.079, {}, "audio"),
        (1.0, {"start_seconds": 0.95}, "audio_start_seconds"),
        (1.0, {"max_seconds": 0.05}, "max_seconds"),
    ],
)
def test_less_than_a_frame_of_speech_is_refused(
    speech: Callable[..., Any], seconds: float, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        speech(media(tone(seconds, 16_000), 16_000), **options)
    assert caught.value.field == field


def wav_header(
    rate_hz: int = 16_000, channels: int = 1, bits: int = 16, format: int = 1, length: int = 0
) -> bytes:
    body = struct.pack(
        "<HHIIHH",
        format,
        channels,
        rate_hz,
        rate_hz * channels * bits // 8 % 2**32,
        channels * bits // 8,
        bits,
    )
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + body + b"data" + struct.pack("<I", length)
    return b"RIFF" + struct.pack("<I", 36 + length) + chunks


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"just text",
        b"RIFF",
        wav_header(),  # no sound
        wav_header(length=32_000),  # and here it says there is
        wav_header(rate_hz=0, length=3200) + bytes(3200),
        wav_header(rate_hz=1, length=3200) + bytes(3200),
        wav_header(rate_hz=2**31, length=3200) + bytes(3200),
        wav_header(channels=0, length=3200) + bytes(3200),
        wav_header(channels=300, length=60_000) + bytes(60_000),
        wav_header(bits=0, length=3200) + bytes(3200),
    ],
)
def test_what_holds_no_sound_is_refused(speech: Callable[..., Any], content: bytes) -> None:
    with pytest.raises(UnsupportedMediaError) as caught:
        speech(content)
    assert caught.value.field == "audio"


def test_a_video_without_sound_is_refused(speech: Callable[..., Any]) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=25)
        video.width = video.height = 64
        for _ in range(5):
            output.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        output.mux(video.encode(None))

    with pytest.raises(UnsupportedMediaError):
        speech(buffer.getvalue())


def test_silence_is_speech_that_says_nothing(speech: Callable[..., Any]) -> None:
    assert not speech(media(np.zeros((1, 16_000), np.int16), 16_000)).waveform.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_no_numbers_are_refused(speech: Callable[..., Any], value: float) -> None:
    samples = np.zeros((1, 16_000), np.float32)
    samples[0, 800] = value

    with pytest.raises(UnsupportedMediaError, match="numbers"):
        speech(media(samples, 16_000, codec="pcm_f32le"))


def test_overdriven_samples_are_clipped(speech: Callable[..., Any]) -> None:
    samples = np.full((1, 16_000), 7.5, np.float32)

    loaded = speech(media(samples, 16_000, codec="pcm_f32le"))

    assert loaded.waveform.max() == 1.0
    assert recorded(loaded).max() == 32767


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "ffconcat version 1.0\nfile {url}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period>"
        "<AdaptationSet mimeType='audio/mp4'><Representation id='1' bandwidth='1'><BaseURL>{url}"
        "</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "[Reference]\nRef1={url}\n",
        "<asx version='3.0'><entry><ref href='{url}'/></entry></asx>",
        "{path}",
        "{url}",
    ],
)
def test_a_playlist_opens_no_file_and_no_address(
    speech: Callable[..., Any], tmp_path: Path, media_server: MediaServer, playlist: str
) -> None:
    secret = media(tone(1.0, 16_000), 16_000)
    (tmp_path / "secret.wav").write_bytes(secret)
    url = media_server.add("/secret.wav", secret)
    text = playlist.format(path=f"file://{tmp_path}/secret.wav", url=url, port=url.split(":")[2])

    with pytest.raises(UnsupportedMediaError):
        speech(text.encode())
    assert media_server.requests == []


def test_a_cut_recording_gives_what_is_left_or_is_refused(speech: Callable[..., Any]) -> None:
    for container, codec in [("ipod", "aac"), ("mp3", "mp3"), ("ogg", "libopus"), ("wav", None)]:
        content = media(tone(2.0, 48_000), 48_000, container, codec or "pcm_s16le")
        for share in (0.001, 0.2, 0.6):
            try:
                loaded = speech(content[: int(len(content) * share)])
            except (UnsupportedMediaError, InvalidInputError):
                continue
            assert loaded.duration_seconds < 1.4


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("wav", "pcm_s16le"),
        ("mp3", "mp3"),
        ("ipod", "aac"),
        ("ogg", "libopus"),
        ("webm", "libopus"),
        ("flac", "flac"),
        ("mpegts", "aac"),
    ],
)
def test_damaged_bytes_end_in_speech_or_in_a_refusal(
    speech: Callable[..., Any], container: str, codec: str
) -> None:
    whole = media(tone(0.5, 48_000), 48_000, container, codec)
    choice = random.Random(container)

    for _ in range(60):
        content = bytearray(whole)
        for _ in range(choice.randint(1, 10)):
            content[choice.randrange(len(content))] = choice.randrange(256)
        try:
            loaded = speech(bytes(content))
        except WorkerError:
            continue
        assert np.isfinite(loaded.waveform).all()


# Both


def test_base64_content_is_held_to_the_same_limit_of_bytes(
    portrait: Callable[..., Any], speech: Callable[..., Any]
) -> None:
    content = bytes(2**21 + 1)

    for load in (portrait, speech):
        with pytest.raises(InputTooLargeError, match="2097152 bytes"):
            load(content)


def test_an_address_is_downloaded_and_decoded(
    portrait: Callable[..., Any],
    speech: Callable[..., Any],
    media_server: MediaServer,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    settings = SETTINGS.model_copy(update={"runpod_allow_private_download_urls": True})
    face = media_server.add("/face.mp3", make_portrait(), content_type="audio/mpeg")
    voice = media_server.add("/voice.jpg", make_speech(1.5), content_type="image/jpeg")

    assert portrait(face, settings).size == (320, 320)
    assert speech(voice, settings).duration_seconds == 1.5
    with pytest.raises(InputDownloadError) as caught:
        speech(media_server.url + "/nothing", settings)
    assert caught.value.field == "audio"
    with pytest.raises(InputUrlBlockedError) as blocked:
        portrait(face)
    assert blocked.value.field == "image"
