import io
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from avatar_client.contract.job_errors import EncodeError, ResultTooLargeError
from avatar_client.contract.media_source import MediaSource
from worker.media.encoding import Encoding, check_encoders
from worker.media.inputs import AudioSegment, load_speech
from worker.media.video import VideoFile, write_thumbnail, write_video
from worker.settings import Settings


def recording(
    seconds: float = 1.0,
    rate_hz: int = 48_000,
    channels: int = 1,
    hz: float = 440.0,
    click_at: Any = None,
) -> Any:
    """A tone at half of full scale; with `click_at`, silence but for 20 ms from there on."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    samples = 0.5 * np.sin(2 * np.pi * hz * time)
    if click_at is not None:
        samples *= (time >= click_at) & (time < click_at + 0.02)
    data = np.repeat((samples * 32767).astype(np.int16), channels).tobytes()
    return AudioSegment(data, sample_width=2, frame_rate=rate_hz, channels=channels)


def still(
    num_frames: int, value: int = 128, height: int = 64, width: int = 96, chunk: int = 7
) -> Iterator[np.ndarray]:
    """Grey frames, in chunks as the decoder of latents gives them."""
    for start in range(0, num_frames, chunk):
        length = min(chunk, num_frames - start)
        yield np.full((length, height, width, 3), value, np.uint8)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    """`write(frames, ...)` writes `tmp_path/video.mp4` with a second of sound."""

    def write(
        frames: Any,
        *,
        fps: float = 25.0,
        height: int = 64,
        width: int = 96,
        sound: Any = None,
        metadata: Any = None,
        **options: Any,
    ) -> VideoFile:
        return write_video(
            tmp_path / "video.mp4",
            frames,
            fps=fps,
            height=height,
            width=width,
            recording=sound or recording(),
            metadata=metadata or {"seed": "7"},
            **options,
        )

    return write


def pictures(path: Path, **options: Any) -> Iterator[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.time, frame.to_ndarray(format="rgb24", **options)


def sound(path: Path) -> tuple[np.ndarray, float]:
    """(channels, N) and when the first sample is heard."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    starts_at = frames[0].time
    assert starts_at is not None
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), starts_at


def test_the_file_is_what_browsers_play(write: Callable[..., Any]) -> None:
    video = write(still(25), sound=recording(channels=2))

    with av.open(str(video.path)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        picture, voice = container.streams.video[0], container.streams.audio[0]
        assert picture.codec_context.name == "h264"
        assert picture.codec_context.profile == "High"
        assert picture.codec_context.pix_fmt == "yuv420p"
        assert (picture.height, picture.width) == (64, 96)
        assert picture.average_rate == picture.frames == 25
        context = picture.codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
        assert voice.codec_context.name == "aac"
        assert (voice.rate, voice.channels) == (48_000, 2)


def test_the_facts_are_those_of_the_file(write: Callable[..., Any]) -> None:
    video = write(still(25))

    content = video.path.read_bytes()
    assert video.num_frames == sum(1 for _ in pictures(video.path)) == 25
    assert video.duration_seconds == 1.0
    assert video.size_bytes == len(content)
    assert len(video.sha256) == 64
    assert write(still(25)).sha256 == video.sha256  # equal frames, equal file
    assert write(still(25, value=129)).sha256 != video.sha256


def boxes(content: bytes) -> Iterator[Any]:
    position = 0
    while position < len(content):
        size, name = struct.unpack(">I4s", content[position : position + 8])
        yield name.decode()
        position += size


def test_the_index_stands_before_the_media(write: Callable[..., Any]) -> None:
    names = list(boxes(write(still(25)).path.read_bytes()))

    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


def test_picture_and_sound_lie_side_by_side(write: Callable[..., Any]) -> None:
    """A player that has half of the file can play half of the video."""
    noise = np.random.default_rng(0).integers(0, 256, (75, 64, 96, 3), dtype=np.uint8)

    video = write([noise], sound=recording(seconds=3.0))

    with av.open(str(video.path)) as container:
        times = {0: 0.0, 1: 0.0}
        packets = sorted(
            (p for p in container.demux() if p.size), key=lambda packet: packet.pos or 0
        )
        for packet in packets:
            assert packet.dts is not None
            assert packet.time_base is not None
            times[packet.stream_index] = float(packet.dts * packet.time_base)
            assert abs(times[0] - times[1]) < 1.1  # ffmpeg writes about a second of each in turn


def test_the_comment_says_that_it_is_generated_and_how(write: Callable[..., Any]) -> None:
    video = write(still(5), metadata={"seed": "123", "worker": "0.1.0"})

    with av.open(str(video.path)) as container:
        assert container.metadata["comment"] == "AI-generated; seed: 123; worker: 0.1.0"


@pytest.mark.parametrize("seconds", [0.08, 0.5, 1.0, 2.017, 5.16])
@pytest.mark.parametrize("fps", [25.0, 12.5])
def test_the_video_lasts_as_long_as_the_speech(
    write: Callable[..., Any], seconds: float, fps: float
) -> None:
    num_frames = int(seconds * fps)

    video = write(still(num_frames), fps=fps, sound=recording(seconds=seconds))

    with av.open(str(video.path)) as container:
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(seconds, abs=0.001)
        picture = container.streams.video[0]
        assert picture.duration is not None
        assert picture.time_base is not None
        assert float(picture.duration * picture.time_base) == num_frames / fps
    assert video.duration_seconds == num_frames / fps


@pytest.mark.parametrize("fps", [25.0, 12.5])
@pytest.mark.parametrize(
    ("rate_hz", "channels"), [(48_000, 2), (44_100, 1), (37_800, 1), (16_000, 1), (8000, 1)]
)
def test_a_clap_is_seen_when_it_is_heard(
    write: Callable[..., Any], rate_hz: int, channels: int, fps: float
) -> None:
    frames = np.zeros((round(3 * fps), 64, 96, 3), np.uint8)
    frames[round(2 * fps)] = 255
    clap = recording(seconds=3.0, rate_hz=rate_hz, channels=channels, hz=1000, click_at=2.0)

    video = write([frames], fps=fps, sound=clap)

    flashes = [time for time, picture in pictures(video.path) if picture.mean() > 128]
    samples, starts_at = sound(video.path)
    with av.open(str(video.path)) as container:
        decoded_hz = container.streams.audio[0].codec_context.sample_rate
    clicks_at = starts_at + np.argmax(np.abs(samples[0]) > 0.2) / decoded_hz
    assert flashes == [2.0]
    assert clicks_at == pytest.approx(2.0, abs=0.003)


def test_the_sound_is_the_recording_and_not_the_copy_for_the_model(
    write: Callable[..., Any],
) -> None:
    original = recording(seconds=2.0, rate_hz=44_100, channels=2, hz=12_000)  # beyond 16 kHz's 8

    samples, _ = sound(write(still(50), sound=original).path)

    expected = np.frombuffer(original.raw_data, np.int16).reshape(-1, 2).T / 32768
    error = samples[:, 4410:79_380] - expected[:, 4410:79_380]
    assert 10 * np.log10(np.mean(expected**2) / np.mean(error**2)) > 25  # dB


def test_speech_of_every_source_rate_can_be_written(
    write: Callable[..., Any], make_speech: Callable[..., bytes], tmp_path: Path
) -> None:
    for rate_hz in (4000, 11_025, 37_800, 96_000):
        source = MediaSource(content=make_speech(0.5, rate_hz))
        speech = load_speech(source, tmp_path, Settings())

        video = write(still(12), sound=speech.recording)

        assert sound(video.path)[0].shape[0] == 1


@pytest.mark.parametrize("height", [256, 704])  # players guess BT.601 for the small one
def test_colours_come_back(write: Callable[..., Any], height: int) -> None:
    choice = np.random.default_rng(0)
    patches = choice.integers(0, 256, (height // 16, height // 16, 3), dtype=np.uint8)
    frame = np.kron(patches, np.ones((16, 16, 1), np.uint8))  # a chart of flat patches

    video = write([frame[None].repeat(3, axis=0)], height=height, width=height)

    exactly = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    _, decoded = next(pictures(video.path, interpolation=exactly))
    inner = decoded.reshape(height // 16, 16, height // 16, 16, 3)[:, 6:10, :, 6:10]
    error = inner.astype(float) - patches[:, None, :, None]
    assert np.abs(error.mean(axis=(0, 1, 2, 3))) == pytest.approx([0, 0, 0], abs=0.2)  # no cast
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 47  # dB


def test_frames_are_encoded_as_they_come(write: Callable[..., Any]) -> None:
    """A video of 300 frames never lies in memory: 530 MB here."""

    def frames() -> Iterator[np.ndarray]:
        for _ in range(60):
            yield np.full((5, 768, 768, 3), 90, np.uint8)

    tracemalloc.start()
    write(frames(), height=768, width=768, sound=recording(seconds=12.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 40_000_000


def test_frames_may_be_views_of_other_arrays(write: Callable[..., Any]) -> None:
    channels_first = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 96), dtype=np.uint8)
    channels_last = channels_first.transpose(0, 2, 3, 1)  # (F, H, W, 3)

    assert write([channels_last]).sha256 == write([channels_last.copy()]).sha256


HEVC, VP9 = Encoding.of("mp4", "hevc", None), Encoding.of("webm", None, None)


def test_no_encoding_that_is_named_is_the_defaults_own() -> None:
    assert Encoding.of("mp4", None, None) == Encoding.of("mp4", "h264", 17) == Encoding()
    assert (HEVC.quality, VP9.codec, VP9.quality) == (19, "vp9", 24)


@pytest.mark.parametrize(
    ("encoding", "names"), [(HEVC, ("hevc", "aac")), (VP9, ("vp9", "opus"))], ids=["hevc", "vp9"]
)
def test_the_other_codecs_keep_what_h264_keeps(
    write: Callable[..., Any], encoding: Encoding, names: tuple[str, str]
) -> None:
    """Colours, time, sound, the comment, and the same bytes for the same frames."""
    frames = np.full((75, 64, 96, 3), (200, 60, 30), np.uint8)
    frames[50] = 255
    clap = recording(seconds=3.0, rate_hz=44_100, channels=2, hz=1000, click_at=2.0)

    video = write([frames], sound=clap, encoding=encoding)

    with av.open(str(video.path)) as container:
        picture, voice = container.streams.video[0], container.streams.audio[0]
        assert (picture.codec_context.name, voice.codec_context.name) == names
        context = picture.codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)
        if encoding is HEVC:
            assert context.codec_tag == "hvc1"  # the only one that Apple plays
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(3.0, abs=0.03)
        [comment] = [text for key, text in container.metadata.items() if key.lower() == "comment"]
        assert comment.startswith("AI-generated; seed: 7")
    shown = list(pictures(video.path))
    assert len(shown) == 75
    assert [time for time, picture in shown if picture.min() > 200] == [2.0]
    assert np.abs(shown[0][1].mean((0, 1)) - (200, 60, 30)).max() < 3
    samples, starts_at = sound(video.path)
    rate_hz = 48_000 if encoding is VP9 else 44_100
    assert starts_at + np.argmax(np.abs(samples[0]) > 0.2) / rate_hz == pytest.approx(2, abs=0.003)
    assert write([frames], sound=clap, encoding=encoding).sha256 == video.sha256


@pytest.mark.parametrize("encoding", [Encoding(), HEVC, VP9], ids=["h264", "hevc", "vp9"])
def test_a_video_of_any_codec_fits_its_limit_and_heeds_its_quality(
    write: Callable[..., Any], encoding: Encoding
) -> None:
    def noise() -> Iterator[np.ndarray]:
        choice = np.random.default_rng(0)
        yield choice.integers(0, 256, (100, 80, 80, 3), dtype=np.uint8)

    def size(quality: int, **options: Any) -> int:
        shape = {"height": 80, "width": 80, "sound": recording(4.0)}
        changed = replace(encoding, quality=quality)
        return int(write(noise(), encoding=changed, **shape, **options).size_bytes)

    free, low = size(encoding.quality), size(40)
    assert low < 0.7 * free
    assert size(encoding.quality, max_bytes=free // 2) <= free // 2
    finest = replace(encoding, quality=1)
    assert finest.rate > 30
    assert size(1) < finest.rate * free


class CancelledError(BaseException):
    """Like a job's end, which no `except Exception` sees."""


@pytest.mark.parametrize("failure", [CancelledError, RuntimeError, OSError])
@pytest.mark.parametrize("after", [0, 1, 60])  # the encoder holds some frames back
def test_what_the_frames_raise_comes_out_and_no_file_stays(
    write: Callable[..., Any], tmp_path: Path, failure: type[Any], after: int
) -> None:
    cause = failure("stop")

    def frames() -> Iterator[np.ndarray]:
        yield from still(after)
        raise cause

    with pytest.raises(failure) as caught:
        write(frames())

    assert caught.value is cause
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_an_encode_error(tmp_path: Path) -> None:
    with pytest.raises(EncodeError) as caught:
        write_video(
            tmp_path / "no such directory" / "video.mp4",
            still(3),
            fps=25.0,
            height=64,
            width=96,
            recording=recording(),
            metadata={},
        )
    assert "no such directory" not in str(caught.value)


def test_a_video_with_a_size_limit_is_encoded_to_fit(write: Callable[..., Any]) -> None:
    def noise() -> Iterator[np.ndarray]:
        choice = np.random.default_rng(0)
        for _ in range(150):
            yield choice.integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)

    free = write(noise(), height=128, width=128, sound=recording(6.0))
    limited = write(noise(), height=128, width=128, sound=recording(6.0), max_bytes=1_000_000)

    assert free.size_bytes > 1_500_000
    assert 500_000 < limited.size_bytes <= 1_000_000


def test_a_video_that_cannot_be_handed_over_ends_early(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    passed = []

    def noise() -> Iterator[np.ndarray]:
        choice = np.random.default_rng(0)
        for index in range(500):
            passed.append(index)
            yield choice.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)

    with pytest.raises(ResultTooLargeError) as caught:
        write(noise(), max_bytes=100_000)

    assert caught.value.field == "output.delivery"
    assert len(passed) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95)])
def test_odd_sizes_are_refused(write: Callable[..., Any], height: int, width: int) -> None:
    with pytest.raises(ValueError, match="odd"):
        write(still(3, height=height, width=width), height=height, width=width)


def test_frames_of_another_size_are_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        write(still(3, height=96, width=64))
    with pytest.raises(ValueError, match="no frames"):
        write([])
    assert list(tmp_path.iterdir()) == []


def test_the_thumbnail_is_the_frame(tmp_path: Path, make_portrait: Callable[..., bytes]) -> None:
    frame = np.asarray(Image.open(io.BytesIO(make_portrait())).convert("RGB"))

    write_thumbnail(frame, tmp_path / "thumbnail.jpg")

    with Image.open(tmp_path / "thumbnail.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (320, 320))
        assert np.abs(np.asarray(image).astype(int) - frame).mean() < 4


def test_the_encoders_are_part_of_the_installation() -> None:
    check_encoders()
