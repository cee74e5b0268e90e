"""Whole jobs, one preset after the other and the published way: portrait and speech in, mp4 out.

    python -m benchmarks.whole_job --directory /tmp/model [--size 384x384]
    python -m benchmarks.whole_job --directory /tmp/model --in-a-row 10 [--size ...] [--other ...]
    python -m benchmarks.whole_job --directory /tmp/model --speakers 3 [--size ...] [--steps 5]

Takes the model directory that `python -m benchmarks.loading` writes. The same noise for all: each
preset's latents are compared with those of `quality`. The published way encodes and decodes as
`benchmarks/reference.py`, and writes the file when it has all frames.

In a row: jobs of two sizes by turns, and the peak memory of each; the first of either size shows
what a new size costs.

Speakers: the seconds of denoising with so many of them beside those with one, by turns. The first
steps are computed in full in each preset, so that a few of them show what voices cost.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatar_client.contract.presets import PRESETS
from avatar_client.contract.request import GenerationParams
from benchmarks import reference
from benchmarks.random_model import relative_difference, report
from worker.generation import face
from worker.generation.cfg import EARLY_FACE_MASK_SCALE
from worker.generation.conditioning import POSITIVE
from worker.generation.denoiser import Denoiser, Step
from worker.generation.engine import Engine, to_uint8
from worker.generation.image import to_pixels
from worker.generation.voices import Voice
from worker.media.inputs import AudioSegment
from worker.media.video import write_video
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ, FrameSize

FRAMES = 129
SEED = 7
STEPS = 50
PORTRAIT = Path(__file__).parents[1] / "tests" / "data" / "astronaut.jpg"


@dataclass(frozen=True, kw_only=True)
class PublishedDenoiser(Denoiser):
    """Steps by the published arithmetic."""

    cached_tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def velocities(self, window: Tensor, start: int, step: Step) -> list[Tensor]:
        told, early = self.conditioning, step.is_prompt_guided
        prompts = [branch.early_prompt if early else POSITIVE for branch in self.branches]
        mask = told.prompt_mask[prompts]
        mask[:] = mask[mask.sum(dim=1).argmax()]  # equally long, as with pads
        motion = window.new_ones(2, 4)
        gate = told.face_mask * (EARLY_FACE_MASK_SCALE if early else 1.0)
        audio = torch.cat([branch.audio_embeds[:, :FRAMES] for branch in self.branches])
        inputs = {
            "hidden_states": window.expand(2, -1, -1, -1, -1),
            "timestep": step.timestep.expand(2),
            "encoder_hidden_states": told.prompt_embeds[prompts],
            "encoder_attention_mask": mask,
            "pooled_projections": told.pooled_prompt_embeds[prompts],
            "reference_latents": self.reference_latents.expand(2, -1, -1, -1, -1),
            "audio_embeds": audio,
            "face_mask": gate.expand(2, -1, -1, -1, -1),
            "motion_expression": motion * told.motion_expression,
            "motion_pose": motion * told.motion_pose,
            "fps": motion[:, 0] * told.fps,
        }
        cached_tokens = self.cached_tokens[0] if step.reads_cache else None
        velocity, cached_tokens = reference.forward(self.transformer, inputs, cached_tokens)
        self.cached_tokens[:] = [cached_tokens]
        return list(velocity.float().split(1))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(
    engine: Engine, size: FrameSize, preset: str, *, published: bool = False
) -> tuple[dict[str, float], Tensor]:
    """Seconds of each stage, and the latents."""
    portrait = portrait_of(size)
    samples = tone()
    speech = AudioSegment(
        (samples * 2**15).astype(np.int16).tobytes(),
        sample_width=2,
        frame_rate=SAMPLE_RATE_HZ,
        channels=1,
    )
    box = (size.width / 4, size.height / 4, size.width / 2, size.height / 2)
    voices = [Voice(samples, box)]
    fields = {"resolution": min(size), "preset": preset}
    params = GenerationParams.model_validate(fields)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        _synchronize()
        started = time.perf_counter()
        result = call()
        _synchronize()
        seconds[name] = round(time.perf_counter() - started, 3)
        return result

    def decoded() -> Iterator[np.ndarray]:
        vae = engine.pipeline.vae
        frames = reference.decode(vae, latents.to(vae.dtype) / vae.config.scaling_factor)
        yield to_uint8((frames[0].transpose(0, 1).float() / 2 + 0.5).clamp(0, 1))

    engine.pipeline.prompt_cache.clear()
    conditioning = timed("encode", lambda: engine.encode(portrait, voices, params))
    if published:
        pixels = to_pixels(portrait).to("cuda", engine.pipeline.vae.dtype)
        timed("encode twice more", lambda: reference.encode(engine.pipeline.vae, pixels))
    latents = timed("denoise", lambda: engine.denoise(conditioning, params, SEED))
    with tempfile.TemporaryDirectory() as directory:
        chunks = decoded() if published else engine.decode_frames(conditioning, latents)
        timed(
            "decode and write",
            lambda: write_video(
                Path(directory) / "video.mp4",
                chunks,
                fps=25,
                height=size.height,
                width=size.width,
                recording=speech,
                metadata={},
            ),
        )
    seconds["whole"] = round(sum(seconds.values()), 3)
    return seconds, latents


def portrait_of(size: FrameSize) -> Image.Image:
    """Somebody, squeezed to that size."""
    return Image.open(PORTRAIT).convert("RGB").resize((size.width, size.height))


def tone(step: float = 0.05) -> NDArray[np.float32]:
    """A window of sound, which goes on by so many radians a sample."""
    samples = np.sin(np.arange(FRAMES * SAMPLE_RATE_HZ // 25) * step) / 2
    return samples.astype(np.float32)


def compare_speakers(
    engine: Engine, size: FrameSize, count: int, presets: Sequence[str], steps: int
) -> None:
    """Denoising for so many speakers side by side and for one of them, by these presets."""
    across = size.width / (2 * count)  # a face and as much beside it
    voices = [
        Voice(
            tone(0.05 * (1 + index)),
            ((2 * index + 0.5) * across, size.height / 3, across, size.height / 3),
        )
        for index in range(count)
    ]
    for preset in presets:
        fields = {"preset": preset, "num_inference_steps": steps}
        params = GenerationParams.model_validate(fields)
        seconds: dict[int, list[float]] = {1: [], count: []}
        for number in (1, count, 1, count, 1, count):
            told = engine.encode(portrait_of(size), voices[:number], params, size)
            _synchronize()
            started = time.perf_counter()
            engine.denoise(told, params, SEED)
            _synchronize()
            seconds[number].append(time.perf_counter() - started)
        least = {number: min(times) for number, times in seconds.items()}
        report(
            preset=preset,
            size=f"{size.height}x{size.width}",
            steps=steps,
            **{f"denoise_of_{number}": round(each, 3) for number, each in least.items()},
            ratio=round(least[count] / least[1], 4),
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--size", type=_size, default="384x384")
    parser.add_argument("--other", type=_size, default="256x256", help="of every second in a row")
    parser.add_argument("--speakers", type=_several, help="instead, so many beside one")
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="with --speakers"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="with --speakers")
    parser.add_argument("--in-a-row", type=int, metavar="JOBS", help="instead, so many jobs")
    arguments = parser.parse_args()
    face.detect_by_dlib = lambda image: []  # finding a face is not what is measured here
    engine = Engine.load(Settings(model_dir=str(arguments.directory)))
    if arguments.in_a_row:
        run_in_a_row(engine, (arguments.size, arguments.other), arguments.in_a_row)
    elif arguments.speakers:
        compare_speakers(
            engine, arguments.size, arguments.speakers, arguments.presets, arguments.steps
        )
    else:
        compare(engine, arguments.size)


def _size(text: str) -> FrameSize:
    return FrameSize(*map(int, text.split("x")))


def _several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError("must be 2 or more")
    return int(text)


def run_in_a_row(engine: Engine, sizes: Sequence[FrameSize], jobs: int) -> None:
    """Jobs of these sizes by turns."""
    for job in range(jobs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        size = sizes[job % len(sizes)]
        seconds, _ = run(engine, size, "quality")
        report(
            job=job + 1,
            size=f"{size.height}x{size.width}",
            **seconds,
            peak_gib=engine.peak_memory_gib,
        )


def compare(engine: Engine, size: FrameSize) -> None:
    """Each preset, and the published way."""
    exact, jobs = None, {}
    for preset in PRESETS:
        torch.cuda.reset_peak_memory_stats()
        jobs[preset], latents = run(engine, size, preset)
        exact = latents if exact is None else exact
        difference = relative_difference(latents, exact)
        report(
            preset=preset, **jobs[preset], difference=difference, peak_gib=engine.peak_memory_gib
        )
    engine.pipeline.transformer.set_attention_backend(reference.FLASH_ATTENTION)
    engine.pipeline.denoiser_class = PublishedDenoiser
    job, _ = run(engine, size, "quality", published=True)
    report(preset="published", **job)
    for preset, own in jobs.items():
        report(preset=preset, times_published=round(job["whole"] / own["whole"], 2))


if __name__ == "__main__":
    main()
