"""Whether minutes of speech end as they begin: memory, sync and drift of a face that talks.

    python -m benchmarks.long_speech --seconds 60 300
    python -m benchmarks.long_speech --seconds 30 --ways usual still overlap renewed matched

The demo model, one thread, on a picture that is small and yet shows a mouth as large as the model
has learned: the middle of a drawn face. The same half minute of speech is heard again and again, so
that the first and the last half minute differ in nothing but their place. Sync and drift are read
from the mp4, as a client gets it; each video is made in a process of its own.

`--ways` makes each of them in other ways than the worker does: windows that stay where they are
(`still`), that overlap by a quarter (`overlap`), the portrait's latents drawn anew at each step
(`renewed`), the colours of each 129 frames matched to the portrait's (`matched`).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from pydub import AudioSegment

from benchmarks.random_model import report
from tests.demo import talking
from training import world
from worker.generation import sampling
from worker.generation.conditioning import Conditioning
from worker.generation.denoiser import Denoiser, Step
from worker.generation.engine import Engine
from worker.generation.options import DenoiseOptions
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.media import recording
from worker.media.drift import DriftMeter
from worker.media.video import write_video
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ, WINDOW_FRAMES, WINDOW_LATENTS, Box, VideoPlan

Frames = NDArray[np.uint8]

RECORDINGS = Path(__file__).parents[1] / "tests" / "data" / "talking"
FACE = 900  # the seed of one whom the model has not learned
WHOLE = 256  # px of the picture that the model has learned ...
SIDE = 96  # ... and of its part that is shown
CHIN = 0.2  # of the part's height: so far above its middle the mouth is not
STEPS = 4  # with which it speaks as well as with more
PART_SECONDS = 30  # of speech, over and over
OVERLAP = WINDOW_LATENTS // 4
MIB = 2**20


@dataclass(frozen=True)
class Portrait:
    """The part of a drawn face that is shown."""

    face: world.Face
    whole: Frames  # (256, 256, 3)
    top: int
    left: int

    @classmethod
    def draw(cls) -> "Portrait":
        face = world.random_face(np.random.default_rng(FACE))
        whole = (world.portrait(face, WHOLE, WHOLE) * 255).byte().permute(1, 2, 0).numpy()
        mouth = face.centre[1] + face.mouth_place * face.size
        return cls(
            face,
            whole,
            top=int(WHOLE * (0.5 + mouth) - SIDE * (0.5 + CHIN)),
            left=int(WHOLE * (0.5 + face.centre[0]) - SIDE / 2),
        )

    @property
    def image(self) -> Image.Image:
        rows, columns = self._part
        return Image.fromarray(self.whole[rows, columns])

    @property
    def box(self) -> Box:
        """Of the face, as far as it is shown."""
        x, y, width, height = self.face.box(WHOLE, WHOLE)
        left, top = max(x - self.left, 0), max(y - self.top, 0)
        right, bottom = min(x + width - self.left, SIDE), min(y + height - self.top, SIDE)
        return left, top, right - left, bottom - top

    def mouth_opening(self, frame: Frames) -> float:
        """As `talking` measures it."""
        whole = self.whole.copy()
        rows, columns = self._part
        whole[rows, columns] = frame
        return float(talking.mouth_opening(whole[None], self.face)[0])

    @property
    def _part(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + SIDE), slice(self.left, self.left + SIDE)


def renewing(scaling_factor: float) -> type[Denoiser]:
    """A denoiser that draws the portrait's latents anew at each step."""

    class Renewing(Denoiser):
        def step(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
            told = self.conditioning
            generator = torch.Generator().manual_seed(step.index)
            noise = torch.randn(self.reference_latents.shape, generator=generator)
            drawn = (told.reference_mean + told.reference_std * noise) * scaling_factor
            return Denoiser.step(replace(self, reference_latents=drawn), latents, step)

    return Renewing


def overlapping_starts(plan: VideoPlan, step: int) -> list[int]:
    """As `sampling.window_starts`, of more windows."""
    shift = step * plan.shift % WINDOW_LATENTS
    stride = WINDOW_LATENTS - OVERLAP
    return [start - shift for start in range(0, plan.sampled_latents, stride)]


def matched(chunks: Iterator[Frames], portrait: Frames) -> Iterator[Frames]:
    """The frames, the colours of each 129 of them with the portrait's mean and spread."""
    frames = np.concatenate(list(chunks))
    like = portrait.reshape(-1, 3)
    for start in range(0, len(frames), WINDOW_FRAMES):
        part = frames[start : start + WINDOW_FRAMES].astype(np.float32)
        mean, spread = part.mean((0, 1, 2)), part.std((0, 1, 2))
        part = (part - mean) / spread * like.std(0) + like.mean(0)
        yield part.round().clip(0, 255).astype(np.uint8)


WAYS = ("usual", "still", "overlap", "renewed", "matched")


def set_way(engine: Engine, way: str) -> None:
    """Has the pipeline go another way, in this process."""
    if way == "still":
        vars(sampling)["window_starts"] = lambda plan, _: list(
            range(0, plan.sampled_latents, WINDOW_LATENTS)
        )
    if way == "overlap":
        vars(sampling)["window_starts"] = overlapping_starts
    if way == "renewed":
        engine.pipeline.denoiser_class = renewing(engine.pipeline.vae.config.scaling_factor)


def heard(path: Path, seconds: float) -> NDArray[np.float32]:
    """So much of a file's sound (samples,), mono, 16 kHz."""
    with path.open("rb") as file:
        sound = recording.decode(file, 0, seconds)
    return recording.resample(sound.samples.mean(axis=0), sound.rate_hz, SAMPLE_RATE_HZ)


def speech(seconds: float) -> NDArray[np.float32]:
    """The tests' recordings in a row, half a minute of them again and again; 16 kHz."""
    parts = [heard(path, PART_SECONDS) for path in sorted(RECORDINGS.glob("*.ogg"))]
    part = np.resize(np.concatenate(parts), PART_SECONDS * SAMPLE_RATE_HZ)
    return np.resize(part, round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)


def resident_mib() -> float:
    return round(psutil.Process().memory_info().rss / MIB, 1)


def encode(engine: Engine, portrait: Portrait, waveform: NDArray[np.float32]) -> Conditioning:
    return engine.pipeline.encode(
        image=portrait.image,
        voices=[Voice(waveform, portrait.box)],
        prompt="A person speaks.",
        height=SIDE,
        width=SIDE,
    )


def make(engine: Engine, portrait: Portrait, seconds: float, way: str, path: Path) -> None:
    """Writes the video to `path`, and reports what memory it took, and when."""
    set_way(engine, way)
    waveform = speech(seconds)
    started = time.perf_counter()
    conditioning = encode(engine, portrait, waveform)
    by_step: list[float] = []
    latents = engine.pipeline.denoise(
        conditioning,
        DenoiseOptions(num_inference_steps=STEPS),
        generator=torch.Generator().manual_seed(1),
        watch=Watch(on_step=lambda *_: by_step.append(resident_mib())),
    )
    denoised = time.perf_counter()
    by_chunk: list[float] = []

    def frames() -> Iterator[Frames]:
        for chunk in engine.decode_frames(conditioning, latents):
            yield chunk
            by_chunk.append(resident_mib())

    write_video(
        path,
        matched(frames(), np.asarray(portrait.image)) if way == "matched" else frames(),
        fps=25,
        height=SIDE,
        width=SIDE,
        recording=AudioSegment(
            (waveform * 32767).astype("<i2").tobytes(),
            sample_width=2,
            frame_rate=SAMPLE_RATE_HZ,
            channels=1,
        ),
        metadata={},
    )
    tenth = max(len(by_chunk) // 10, 1)
    report(
        seconds=seconds,
        way=way,
        windows=conditioning.plan.num_windows,
        denoise_seconds=round(denoised - started, 1),
        decode_seconds=round(time.perf_counter() - denoised, 1),
        after_step_mib=by_step,
        decode_mib=[max(by_chunk[at : at + tenth]) for at in range(0, len(by_chunk), tenth)],
    )


def measure(portrait: Portrait, path: Path, way: str) -> None:
    """Reports sync, drift and jumps of an mp4."""
    mouth, changes = [], []
    with av.open(str(path)) as file:
        num_frames = file.streams.video[0].frames
        meter = DriftMeter(portrait.image, [portrait.box], num_frames)
        before = None
        for frame in file.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            meter.see(pixels[None])
            mouth.append(portrait.mouth_opening(pixels))
            if before is not None:
                changes.append(float(abs(pixels.astype(np.int16) - before).mean()))
            before = pixels
    level, opening = talking.envelope(heard(path, num_frames / 25 + 1)), np.array(mouth)
    part = min(25 * PART_SECONDS, num_frames)
    parts = {"start": slice(0, part), "end": slice(num_frames - part, num_frames)}
    report(
        way=way,
        frames=num_frames,
        sync={name: vars(talking.sync(opening[of], level[of])) for name, of in parts.items()},
        drift=meter.summary(),
        largest_change=round(max(changes), 2),
        at_seconds=round((1 + int(np.argmax(changes))) / 25, 2),
    )


def main() -> None:
    """Each video in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", nargs="+", type=float, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["usual"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.one:
        for seconds in given.seconds:
            for way in given.ways:
                command = [sys.executable, "-m", "benchmarks.long_speech", "--one"]
                command += ["--seconds", str(seconds), "--ways", way]
                subprocess.run(command, check=True)  # noqa: S603  # ourselves
        return
    torch.set_num_threads(1)
    portrait = Portrait.draw()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "video.mp4"
        engine = Engine.load(Settings(avatar_model="demo"))
        make(engine, portrait, given.seconds[0], given.ways[0], path)
        measure(portrait, path, given.ways[0])


if __name__ == "__main__":
    main()
