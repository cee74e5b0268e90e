"""Which denoising steps need the whole model: fixed lists beside rules that decide while it runs.

    python -m benchmarks.step_skipping [--clips 3] [--videos]

The demo model denoises the same noise again and again, with the same share of its steps computed
by different rules. Printed for each: how many steps it computed; how far its latents are (relative
norm) from those of all steps and from those of the reference's list; with `--videos` also how the
mouth follows the recording and how near each frame is to the portrait.

The rules that decide while it runs:
    change: EasyCache (arXiv 2507.02860). The model's output is taken to change with its input at
        the rate of the last two computed steps; a step is computed once the changes since then,
        relative to the output, add to a threshold.
    spectrum: SeaCache (arXiv 2602.18993). The latents are filtered as a clean signal would stand
        out at this noise level; a step is computed once their relative changes add to a threshold.
    probe: the last block says for each step how far its velocity is from the last computed one's;
        a step is computed once that is beyond a threshold.

What stands in for a step that is left out: `tokens` puts the tokens of the last computed one
through the last block, as the reference does; `residual` adds what that step's velocity differed
from its input by, as EasyCache does.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from avatar_client.contract.presets import PRESETS, LogSNRSchedule, ShareSchedule
from avatar_client.contract.request import GenerationParams
from benchmarks.random_model import relative_difference, report
from tests.demo import talking
from training import world
from worker.generation import cfg, sampling
from worker.generation.conditioning import Conditioning
from worker.generation.denoiser import Denoiser, Step
from worker.generation.engine import Engine
from worker.generation.options import DenoiseOptions
from worker.generation.voices import Voice
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ, WINDOW_LATENTS, ComputedSteps

FACES = (900, 916, 918)  # of nobody that the demo model has learned
SIZE: Final = 256  # px
RECORDINGS = Path(__file__).parents[1] / "tests" / "data" / "talking"
MOST_SECONDS = 5.0  # one window

Decide = Callable[["Trajectory", Tensor, Step], bool]  # whether the step is computed


@dataclass
class Trajectory:
    """What the computed steps of one video left behind for those that are left out."""

    window: Tensor | None = None  # (1, C, 33, h, w), the input of the last computed step
    velocities: list[Tensor] = field(default_factory=list)  # what it gave, one a CFG branch
    rate: float = 0.0  # of the output's change with the input's, over the last two computed steps
    before: Tensor | None = None  # the input of the step before, computed or not
    spectrum: Tensor | None = None  # of that input
    changed: float = 0.0  # since the last computed step, in the rule's own measure
    probed: list[Tensor] = field(default_factory=list)  # this step's velocities by the last block
    computed: list[int] = field(default_factory=list)


def by_list(indices: Sequence[int]) -> Decide:
    """The steps of a list."""
    chosen = frozenset(indices)
    return lambda _, __, step: step.index in chosen


def by_change(threshold: float, head: int, last: int) -> Decide:
    """EasyCache: the first steps and the last one, and those before the change is too large."""

    def decide(seen: Trajectory, window: Tensor, step: Step) -> bool:
        if step.index < head or step.index >= last or seen.before is None:
            return True
        moved = (window - seen.before).abs().mean().item()
        seen.changed += seen.rate * moved / seen.velocities[-1].abs().mean().item()
        return seen.changed >= threshold

    return decide


def by_spectrum(threshold: float, head: int, last: int, sigmas: Sequence[float]) -> Decide:
    """SeaCache: the same by what of the latents is signal."""

    def decide(seen: Trajectory, window: Tensor, step: Step) -> bool:
        now = signal_in(window, sigmas[step.index])
        before, seen.spectrum = seen.spectrum, now
        if step.index < head or step.index >= last or before is None:
            return True
        seen.changed += ((now - before).abs().mean() / before.abs().mean()).item()
        return seen.changed >= threshold

    return decide


def by_probe(threshold: float, head: int, last: int) -> Decide:
    """What the last block alone says of the step."""

    def decide(seen: Trajectory, _: Tensor, step: Step) -> bool:
        if step.index < head or step.index >= last:
            return True
        off = [
            ((now - then).norm() / then.norm()).item()
            for now, then in zip(seen.probed, seen.velocities, strict=True)
        ]
        return max(off) >= threshold

    return decide


def signal_in(window: Tensor, sigma: float, power: float = 3.0) -> Tensor:
    """The latents by an optimal filter for a clean signal whose power falls with the frequency."""
    dimensions = (2, 3, 4)
    gain = torch.ones((), device=window.device)
    for dimension in dimensions:
        frequencies = torch.fft.fftfreq(window.shape[dimension], device=window.device).abs()
        clean = 1 / (frequencies**power + 1e-16)
        along = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2)
        shape = [-1 if each == dimension else 1 for each in range(window.ndim)]
        gain = gain * along.reshape(shape)
    spectrum = torch.fft.fftn(window, dim=dimensions)
    return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=dimensions).real


def skipping(decide: Decide, stand_in: str, seen: Trajectory) -> type[Denoiser]:
    """A denoiser of one window that computes the steps that a rule chooses."""

    @dataclass(frozen=True, kw_only=True)
    class Skipping(Denoiser):
        def step(self, latents: Tensor, step: Step) -> Tensor:
            window = sampling.gather_circular(latents, 2, 0, WINDOW_LATENTS)
            if seen.velocities and step.index != cfg.PROMPT_GUIDED_STEPS:
                cached = replace(step, reads_cache=True, writes_cache=False)
                seen.probed = self.velocities(window, 0, cached)
                computes = decide(seen, window, step)
            else:  # the first, and the first with another prompt
                decide(seen, window, step)
                computes = True
            if computes:
                velocities = self._compute(window, step)
            elif stand_in == "tokens":
                velocities = seen.probed
            else:
                assert seen.window is not None
                velocities = [each + (window - seen.window) for each in seen.velocities]
            seen.before = window
            velocity = cfg.apply_cfg(velocities, step.guidance_weight)
            return (window + velocity * step.sigma_change).bfloat16().float()

        def _compute(self, window: Tensor, step: Step) -> list[Tensor]:
            for branch in self.branches:
                branch.step_cache.clear()
            whole = replace(step, reads_cache=False, writes_cache=True)
            velocities = self.velocities(window, 0, whole)
            if seen.window is not None:
                moved = (window - seen.window).abs().mean()
                seen.rate = ((velocities[-1] - seen.velocities[-1]).abs().mean() / moved).item()
            seen.window, seen.velocities, seen.changed = window, velocities, 0.0
            seen.computed.append(step.index)
            return velocities

    return Skipping


def schedules(num_steps: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Fixed lists: the presets', and others of as many steps."""
    for name, preset in PRESETS.items():
        yield name, preset.step_cache_schedule.computed_steps(num_steps)
    for shares in ((20, 7, 2), (14, 5, 8), (10, 7, 2), (10, 4, 2), (6, 9, 2), (6, 7, 4), (6, 4, 2)):
        yield "{}-{}-{}".format(*shares), ShareSchedule(*shares).computed_steps(num_steps)
    for percent in (12, 14, 16, 18, 20, 24, 28, 30, 34, 38, 42, 48, 60):
        yield f"log SNR {percent}", LogSNRSchedule(percent).computed_steps(num_steps)
    for count in (8, 10, 12, 16, 19, 24):  # even in the steps
        even = np.unique(np.round(np.linspace(0, num_steps - 1, count)).astype(int))
        yield f"even {count}", tuple(int(each) for each in even)


def rules(num_steps: int, sigmas: Sequence[float]) -> Iterator[tuple[str, Decide, str]]:
    """Every rule, with what stands in for the steps that it leaves out."""
    for name, indices in schedules(num_steps):
        yield f"list {name}", by_list(indices), "tokens"
        if name in PRESETS:
            yield f"list {name}", by_list(indices), "residual"
    head, last = 2, num_steps - 1
    for threshold in (0.015, 0.02, 0.03, 0.04, 0.06, 0.1):
        yield f"change {threshold}", by_change(threshold, head, last), "tokens"
        yield f"change {threshold}", by_change(threshold, head, last), "residual"
    for threshold in (0.15, 0.2, 0.25, 0.4, 0.6):
        yield f"spectrum {threshold}", by_spectrum(threshold, head, last, sigmas), "tokens"
        yield f"spectrum {threshold}", by_spectrum(threshold, head, last, sigmas), "residual"
    for threshold in (0.005, 0.01, 0.015, 0.02, 0.04):
        yield f"probe {threshold}", by_probe(threshold, head, last), "tokens"


@dataclass(frozen=True)
class Clip:
    """A portrait that speaks, ready to be denoised."""

    name: str
    face: world.Face
    portrait: np.ndarray  # (H, W, 3) uint8
    waveform: np.ndarray  # (samples,)
    conditioning: Conditioning


def clips(engine: Engine, waveforms: Sequence[tuple[str, np.ndarray]], count: int) -> list[Clip]:
    """So many, with other faces and recordings in turn."""
    made = []
    for index in range(count):
        face = world.random_face(np.random.default_rng(FACES[index % len(FACES)]))
        name, waveform = waveforms[index % len(waveforms)]
        portrait = (world.portrait(face, SIZE, SIZE) * 255).byte().permute(1, 2, 0).numpy()
        params = GenerationParams(resolution=SIZE)
        voices = [Voice(waveform, None)]
        conditioning = engine.encode(Image.fromarray(portrait), voices, params)
        if conditioning.plan.num_windows != 1:
            raise SystemExit(f"{name} is longer than one window")
        made.append(Clip(f"{index} {name}", face, portrait, waveform, conditioning))
    return made


def waveform_of(path: Path) -> np.ndarray:
    """The (samples,) at 16 kHz, at most one window of them; `.npy` needs no decoder."""
    if path.suffix == ".npy":
        waveform = np.load(path)
    else:
        from worker.media import recording  # its decoder is not on every machine with a GPU

        with path.open("rb") as file:
            sound = recording.decode(file, 0, MOST_SECONDS)
        waveform = recording.resample(sound.samples.mean(axis=0), sound.rate_hz, SAMPLE_RATE_HZ)
    return waveform[: int(MOST_SECONDS * SAMPLE_RATE_HZ)].astype(np.float32)


def denoise(
    engine: Engine, clip: Clip, denoiser: type[Denoiser] = Denoiser, computed: ComputedSteps = None
) -> Tensor:
    """The clip's latents, always from the same noise."""
    engine.pipeline.denoiser_class = denoiser
    options = DenoiseOptions(computed_steps=computed)
    generator = torch.Generator(engine.device).manual_seed(1)
    return engine.pipeline.denoise(clip.conditioning, options, generator=generator)


def video_figures(engine: Engine, clip: Clip, latents: Tensor) -> dict[str, float]:
    """How the mouth follows the recording, and how near the frames are to the portrait, in dB."""
    frames = np.concatenate(list(engine.decode_frames(clip.conditioning, latents)))
    mouth = talking.mouth_opening(frames, clip.face)
    sync = talking.sync(mouth, talking.envelope(clip.waveform))
    likeness = talking.likeness(frames, clip.portrait, clip.face)
    return {"sync": sync.correlation, "identity": float(likeness.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--recordings", type=Path, nargs="+", default=sorted(RECORDINGS.glob("*")))
    parser.add_argument("--only", default="", help="rules whose name begins with this")
    parser.add_argument("--videos", action="store_true", help="decode them, and look at the mouth")
    given = parser.parse_args()

    engine = Engine.load(Settings(avatar_model="demo"))
    waveforms = [(path.stem, waveform_of(path)) for path in given.recordings]
    made = clips(engine, waveforms, given.clips)
    count = DenoiseOptions().num_inference_steps
    sigmas, _ = sampling.noise_levels(engine.pipeline.scheduler, count, DenoiseOptions().flow_shift)
    whole = [denoise(engine, clip, computed=range(count)) for clip in made]
    published = [denoise(engine, clip) for clip in made]
    for name, decide, stand_in in rules(count, sigmas.tolist()):
        if not name.startswith(given.only):
            continue
        figures = []
        for clip, all_steps, reference in zip(made, whole, published, strict=True):
            seen = Trajectory()
            latents = denoise(engine, clip, skipping(decide, stand_in, seen))
            of_clip: dict[str, float] = {
                "computed": len(seen.computed),
                "off_all": relative_difference(latents, all_steps),
                "off_quality": relative_difference(latents, reference),
            }
            if given.videos:
                of_clip |= video_figures(engine, clip, latents)
            figures.append(of_clip)
        means = {key: float(np.mean([each[key] for each in figures])) for key in figures[0]}
        report(
            rule=name,
            stand_in=stand_in,
            most_off=round(max(each["off_all"] for each in figures), 4),
            steps=seen.computed,
            **{key: round(value, 4) for key, value in means.items()},
        )


if __name__ == "__main__":
    main()
