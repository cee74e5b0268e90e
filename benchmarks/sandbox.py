"""What the sandbox adds to decoding: the same files by the same functions, in it and without it.

    python -m benchmarks.sandbox [--runs 30]

Least and median times; the two take turns.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from avatar_client.contract.media_source import MediaSource
from tests.support.pictures import chart, encoded
from tests.support.recordings import voice, write
from worker.media import decoders, inputs
from worker.media.sandbox_process import Answer, Budget
from worker.settings import Settings

PICTURES = {"512 x 512": (512, 512), "1080 x 1350": (1080, 1350), "4000 x 3000": (4000, 3000)}
RECORDINGS = {"5 s": 5.0, "59 s": 59.0}


class Unlimited(Budget):
    """For the run without the sandbox."""

    def __init__(self) -> None:
        """Sets nothing."""

    def add(self, seconds: float, num_bytes: int) -> None:
        """Sets nothing."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs: int = parser.parse_args().runs
    settings = Settings()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def compare(what: str, inside: Callable[[], object], outside: Callable[[], object]) -> None:
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * runs + 2):
                begun = time.perf_counter()
                (inside if number % 2 else outside)()
                if number > 1:
                    seconds[bool(number % 2)].append(time.perf_counter() - begun)
            least = [1000 * min(seconds[key]) for key in (False, True)]
            median = [1000 * statistics.median(seconds[key]) for key in (False, True)]
            sys.stdout.write(f"{what:22}")
            sys.stdout.write("".join(f"{a:9.1f}{b:9.1f}{b - a:+8.1f}" for a, b in (least, median)))
            sys.stdout.write("\n")

        sys.stdout.write(f"{'ms':22}" + f"{'without':>9}{'in it':>9}{'more':>8}" * 2 + "\n")
        for label, (width, height) in PICTURES.items():
            noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
            pixels = np.clip(chart(height, width) + noise, 0, 255).astype(np.uint8)
            content = encoded(Image.fromarray(pixels), "JPEG", quality=92)

            def picture_without(content: bytes = content) -> Image.Image:
                answer = decoders.read_portrait(
                    io.BytesIO(content), Unlimited(), max_pixels=settings.max_image_pixels
                )
                return Image.fromarray(answer.arrays[0])

            def picture(content: bytes = content) -> Image.Image:
                source = MediaSource(content=content)
                return inputs.load_portrait(source, directory, settings)

            compare(f"JPEG of {label}", picture, picture_without)
        for label, length in RECORDINGS.items():
            content = write(voice(length, 48_000, 2), 48_000, "ipod", "aac")

            def sound_without(content: bytes = content) -> Answer:
                return decoders.read_speech(
                    io.BytesIO(content),
                    Unlimited(),
                    start_seconds=0.0,
                    max_seconds=None,
                    limit_seconds=settings.max_audio_seconds,
                )

            def sound(content: bytes = content) -> inputs.Speech:
                return inputs.load_speech(MediaSource(content=content), directory, settings)

            compare(f"AAC of {label}, stereo", sound, sound_without)


if __name__ == "__main__":
    main()
