"""Both readers on mutated real files: an answer or a refusal, in bounded time and memory.

All runs try the same files first; `FUZZ_SECONDS=600 pytest tests/media/test_fuzz.py` goes on for so
long. SEEDS keeps those that found something.
"""

import contextlib
import itertools
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract.job_errors import WorkerError
from avatar_client.contract.media_source import MediaSource
from tests.support.pictures import chart, encoded
from tests.support.recordings import voice, write
from tests.support.waiting import AT_ONCE_SECONDS
from worker.media import inputs
from worker.media.inputs import Speech, load_portrait, load_speech
from worker.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn of some damage and read on

NUM_FILES = 150  # for each reader, at least
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # for each reader, at least
SEEDS = [1, 2, 3]
LONGEST_SECONDS = AT_ONCE_SECONDS
MAX_GROWTH_BYTES = 2**30
SETTINGS = Settings(max_audio_seconds=5.0, max_image_pixels=1_000_000)


def pictures() -> Iterator[bytes]:
    image = Image.fromarray(chart())
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM"):
        yield encoded(image, format)
    yield encoded(image, "JPEG", progressive=True)
    yield encoded(image, "TIFF", compression="tiff_lzw")
    yield encoded(image.convert("P"), "PNG")


def recordings() -> Iterator[bytes]:
    sound = voice(0.6, 48_000)
    kinds = [("wav", "pcm_s16le"), ("mp3", "mp3"), ("ipod", "aac"), ("ogg", "libopus")]
    kinds += [("webm", "libopus"), ("flac", "flac"), ("matroska", "aac"), ("mpegts", "aac")]
    kinds += [("adts", "aac"), ("aiff", "pcm_s16be"), ("flv", "mp3"), ("mov", "pcm_s16le")]
    kinds += [("avi", "mp3"), ("wv", "wavpack"), ("ac3", "ac3"), ("caf", "alac")]
    for container, codec in kinds:
        rate_hz = 44_100 if container == "flv" else 48_000
        yield write(voice(0.6, rate_hz) if rate_hz != 48_000 else sound, rate_hz, container, codec)


def mutated(whole: Any, choice: Any) -> bytes:
    """A file with some of its bytes changed, cut out, doubled or replaced by telling ones."""
    content = bytearray(whole)
    for _ in range(choice.randint(1, 6)):
        reach = choice.choice((64, 512, len(content)))
        at = choice.randrange(min(reach, len(content)))
        match choice.randrange(6):
            case 0:
                content[at] ^= 1 << choice.randrange(8)
            case 1:
                content[at : at + 4] = choice.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            case 2:
                content[at : at + choice.randint(1, 64)] = b""
            case 3:
                content[at:at] = content[at : at + choice.randint(1, 400)]
            case 4:
                content[at:at] = choice.randbytes(choice.randint(1, 32))
            case 5:
                del content[max(at, 16) :]
        if not content:
            content = bytearray(b"\0")
    return bytes(content)


def check(content: bytes, read: Any, tmp_path: Path) -> None:
    begun = time.monotonic()
    with contextlib.suppress(WorkerError):
        read(MediaSource(content=content), tmp_path, SETTINGS)
    assert time.monotonic() - begun < LONGEST_SECONDS
    assert inputs.sandbox.peak_bytes < MAX_GROWTH_BYTES


@pytest.mark.parametrize(
    ("read", "files"),
    [(load_portrait, pictures), (load_speech, recordings)],
    ids=["image", "audio"],
)
def test_a_mutated_file_ends_in_an_answer_or_a_refusal(
    tmp_path: Path,
    read: Callable[..., Image.Image] | Callable[..., Speech],
    files: Callable[..., Any],
) -> None:
    wholes = list(files())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + SECONDS
    for seed in itertools.count():
        choice = random.Random(f"{SEEDS[seed % len(SEEDS)]} {seed}")
        whole = choice.choice(wholes)
        check(mutated(whole, choice), read, tmp_path)
        if seed + 1 >= NUM_FILES and time.monotonic() > end:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < MAX_GROWTH_BYTES


def test_the_whole_files_are_read(tmp_path: Path) -> None:
    for content in pictures():
        assert load_portrait(MediaSource(content=content), tmp_path, SETTINGS).size == (64, 48)
    for content in recordings():
        loaded = load_speech(MediaSource(content=content), tmp_path, SETTINGS)
        assert np.abs(loaded.waveform).max() > 0.1
