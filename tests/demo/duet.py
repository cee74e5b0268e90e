"""Dialogues of drawn people, and figures of their mouths and eyes; as a program, a table of them.

    python -m tests.demo.duet out/demo-model --work .cache/training

The table is of a model directory's own frames, before an mp4, so that it needs nothing but what the
training needs. Faces and voices are those that the training leaves out.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.demo import talking
from training import world
from training.groups import Group, random_group
from training.speech import FRAME_SAMPLES, SpeechCorpus, mouth_track
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.voices import Voice
from worker.loading import loader
from worker.shapes import SAMPLE_RATE_HZ, Box, FrameSize

SIZE = FrameSize(256, 384)
PAIR = 902  # seeds of groups whose faces dlib finds; none is in panels
OTHER_PAIRS = (903, 904, 906)  # for the table
TRIO = 905
SECONDS = 5
LONG_SECONDS = 15  # several windows
TURN_SECONDS = 2
CLOSED = 0.5  # of the way from open eyes to closed ones
ALONE_LEVEL = 0.1  # of a voice's loudest: below it the voice is silent


@dataclass(frozen=True)
class Dialogue:
    """Who stands where, and what each of them says; None: nothing."""

    group: Group
    voices: tuple[np.ndarray | None, ...]  # of each face, (samples,) on the video's timeline
    size: FrameSize = SIZE

    @cached_property
    def portrait(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return _pixels(self.group.portrait(self.size))

    @property
    def boxes(self) -> list[Box]:
        """Of the faces, in pixels of the portrait."""
        return self.group.boxes(self.size)

    @property
    def speakers(self) -> list[tuple[np.ndarray, Box]]:
        """Each voice with its face's box."""
        pairs = zip(self.voices, self.boxes, strict=True)
        return [(voice, box) for voice, box in pairs if voice is not None]

    def swapped(self) -> "Dialogue":
        """The same with each voice in the next mouth."""
        return replace(self, voices=(*self.voices[1:], self.voices[0]))

    def part(self, frames: slice) -> "Dialogue":
        """What is said in these frames."""
        samples = slice(frames.start * FRAME_SAMPLES, frames.stop * FRAME_SAMPLES)
        voices = (None if voice is None else voice[samples] for voice in self.voices)
        return replace(self, voices=tuple(voices))


def people(count: int, seed: int) -> Group:
    """So many people of whom dlib finds each face."""
    return random_group(np.random.default_rng(seed), count, SIZE)


def together(*voices: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """All from the start, as long as the longest."""
    return placed([(0, voice) for voice in voices])


def in_turn(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """The second begins when the first ends."""
    return placed([(0, first), (len(first), second)])


def by_turns(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """Each speaks for `TURN_SECONDS` while the other one is silent."""
    turns = np.arange(len(first)) // (TURN_SECONDS * SAMPLE_RATE_HZ) % 2
    return (first * (turns == 0), second * (turns == 1))


def placed(
    voices: Sequence[tuple[int, np.ndarray | None]],
) -> tuple[np.ndarray | None, ...]:
    """Voices that begin at these samples, each as long as the whole; None stays None."""
    length = max(start + len(voice) for start, voice in voices if voice is not None)
    whole: list[np.ndarray | None] = []
    for start, voice in voices:
        if voice is None:
            whole.append(None)
            continue
        line = np.zeros(length, np.float32)
        line[start : start + len(voice)] = voice
        whole.append(line)
    return tuple(whole)


@dataclass(frozen=True)
class Figures:
    """Of one face in a video."""

    own: talking.Sync | None  # with its own voice, while it speaks
    others: float  # the highest correlation with another voice, while that one alone speaks
    opening: float  # of the mouth, at the 95th percentile; dark pixels as a share of its region
    alone_opening: float  # the same while it is silent and another speaks
    likeness: float  # the worst frame's to the portrait, around the face, in dB
    blinks: tuple[int, ...]  # the frames in which the eyes begin to close
    in_pauses: float  # share of the blinks that begin while the mouth is closed


def measure(dialogue: Dialogue, frames: np.ndarray) -> list[Figures]:
    """The figures of each face in the frames (F, H, W, 3) uint8."""
    count = len(frames)
    levels = [
        np.zeros(count) if voice is None else _fitted(talking.envelope(voice), count)
        for voice in dialogue.voices
    ]
    heard = [level > ALONE_LEVEL * max(level.max(), 1e-6) for level in levels]
    same = np.logical_and.reduce(
        [talking.outside(face, *dialogue.size) for face in dialogue.group.faces]
    )
    figures = []
    for index, face in enumerate(dialogue.group.faces):
        mouth = talking.mouth_opening(frames, face)
        others, silent = [], np.zeros(count, bool)
        for other, level in enumerate(levels):
            alone = heard[other] & ~heard[index]
            if other != index and alone.sum() > world.FPS // 2:
                others.append(_correlation(mouth[alone], level[alone]))
                silent |= alone
        starts = blinks(eye_closing(frames, face, dialogue))
        figures.append(
            Figures(
                own=talking.sync(mouth, levels[index]) if heard[index].any() else None,
                others=max(others, default=0.0),
                opening=float(np.percentile(mouth, 95)),
                alone_opening=float(np.percentile(mouth[silent], 95)) if silent.any() else 0.0,
                likeness=_likeness(frames, dialogue.portrait, same & _around(face, dialogue.size)),
                blinks=starts,
                in_pauses=float(np.mean([not heard[index][start] for start in starts]))
                if starts
                else 0.0,
            )
        )
    return figures


def eye_closing(frames: np.ndarray, face: world.Face, dialogue: Dialogue) -> np.ndarray:
    """How far the eyes are closed (F,): 0 as in the portrait, 1 as a blink is drawn."""
    closed = replace(world.REST, eyes=np.zeros(1, np.float32))
    motions = [closed if each == face else world.REST for each in dialogue.group.faces]
    blink = _pixels(dialogue.group.render(motions, dialogue.size)[0])
    change = blink.astype(np.float32) - dialogue.portrait
    where = abs(change).sum(axis=2) > 0
    seen = frames[:, where].astype(np.float32) - dialogue.portrait[where]
    closing: np.ndarray = (seen * change[where]).sum(axis=(1, 2)) / np.square(change[where]).sum()
    return closing


def blinks(closing: np.ndarray) -> tuple[int, ...]:
    """The frames in which eyes begin to be closed."""
    closed = closing > CLOSED
    return tuple((np.flatnonzero(closed[1:] & ~closed[:-1]) + 1).tolist())


def _pixels(picture: torch.Tensor) -> np.ndarray:
    pixels: np.ndarray = (picture * 255).byte().permute(1, 2, 0).numpy()
    return pixels


def _fitted(track: np.ndarray, length: int) -> np.ndarray:
    return np.pad(track[:length], (0, max(length - len(track), 0)))


def _correlation(mouth: np.ndarray, level: np.ndarray) -> float:
    """Pearson's at once; a mouth that does not move follows nothing."""
    if min(mouth.std(), level.std()) < 1e-6:
        return 0.0
    return float(np.corrcoef(mouth, level)[0, 1])


def _around(face: world.Face, size: FrameSize) -> np.ndarray:
    """The pixels of the face's box (H, W)."""
    x, y, width, height = face.box(*size)
    rows, columns = np.arange(size.height)[:, None], np.arange(size.width)[None]
    return (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)


def _likeness(frames: np.ndarray, portrait: np.ndarray, same: np.ndarray) -> float:
    errors = (frames[:, same].astype(np.float32) - portrait[same].astype(np.float32)) / 255
    return float(-10 * np.log10(np.square(errors).mean(axis=(1, 2)).max() + 1e-10))


def load(directory: Path, device: torch.device) -> HunyuanVideoAvatarPipeline:
    """The pipeline on the device, in float32."""
    components, _ = loader.load(directory, device, {"default": torch.float32})
    return HunyuanVideoAvatarPipeline(**components)


def frames_of(
    pipeline: HunyuanVideoAvatarPipeline,
    dialogue: Dialogue,
    steps: int,
    seed: int,
    *,
    still: bool = False,
) -> np.ndarray:
    """The frames (F, H, W, 3) uint8.

    Args:
        still: the faces without a voice are told silence.
    """
    voices = [Voice(waveform, box) for waveform, box in dialogue.speakers]
    if still:
        voices += [_silence(voices, box) for box in _silent_boxes(dialogue)]
    conditioning = pipeline.encode(
        Image.fromarray(dialogue.portrait),
        voices,
        prompt="People speak to the camera.",
        height=dialogue.size.height,
        width=dialogue.size.width,
    )
    latents = pipeline.denoise(
        conditioning,
        DenoiseOptions(num_inference_steps=steps),
        generator=torch.Generator(pipeline.device).manual_seed(seed),
    )
    chunks = [
        (chunk * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for chunk in pipeline.decode_frames(latents, conditioning.num_frames)
    ]
    return np.concatenate(chunks)


def _silence(voices: Sequence[Voice], box: Box) -> Voice:
    return Voice(np.zeros_like(voices[0].waveform), box)


def _silent_boxes(dialogue: Dialogue) -> list[Box]:
    pairs = zip(dialogue.voices, dialogue.boxes, strict=True)
    return [box for voice, box in pairs if voice is None]


def main() -> None:
    """Prints the table for a model directory."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.duet", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="has the speech")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    pipeline = load(arguments.model, torch.device(arguments.device))
    made: dict[str, np.ndarray] = {}
    every: list[Figures] = []
    shown = cases(SpeechCorpus("held_out", arguments.work))
    _say("| case | face | own | lag | others | opening | silent | dB | blinks |")
    _say("|---|---|---|---|---|---|---|---|---|")
    for name, case in shown.items():
        begun = time.monotonic()
        frames = made[name] = frames_of(
            pipeline, case.dialogue, arguments.steps, case.seed, still=case.still
        )
        seconds = time.monotonic() - begun
        for part in case.parts:
            title = name if len(case.parts) == 1 else f"{name}, from frame {part.start}"
            for face, figures in enumerate(measure(case.dialogue.part(part), frames[part])):
                _say(_row(title, face, figures))
                every.append(figures)
        _say(f"| {name}: {len(frames)} frames in {seconds:.1f} s | | | | | | | | |")
    _say("")
    _say_of_all(shown, made, every, arguments.steps)


@dataclass(frozen=True)
class Case:
    """A video of the table."""

    dialogue: Dialogue
    seed: int = 1
    still: bool = False
    parts: tuple[slice, ...] = (slice(0, SECONDS * world.FPS),)  # frames, with figures for each


def cases(corpus: SpeechCorpus) -> dict[str, Case]:
    """The videos of the table, by name."""
    one, two = (_speech(corpus, seed, SECONDS) for seed in (3, 4))
    first, second = (_speech(corpus, seed, LONG_SECONDS) for seed in (5, 6))
    half = SECONDS * SAMPLE_RATE_HZ // 2
    pair, trio = people(2, PAIR), people(3, TRIO)
    at_once = Dialogue(pair, together(one, two))
    alternating = Dialogue(pair, in_turn(one[:half], two[:half]))
    listened_to = Dialogue(trio, together(one, None, two))
    thirds = [slice(start, start + SECONDS * world.FPS) for start in (0, 125, 250)]
    return {
        "together": Case(at_once),
        "swapped": Case(at_once.swapped()),
        **{
            f"together, pair {seed}": Case(Dialogue(people(2, seed), at_once.voices))
            for seed in OTHER_PAIRS
        },
        "overlapping": Case(Dialogue(pair, placed([(0, one), (half, two[:half])]))),
        "in turn": Case(alternating),
        "in turn, another seed": Case(alternating, seed=2),
        "a bystander, free": Case(listened_to),
        "a bystander, still": Case(listened_to, still=True),
        "long": Case(Dialogue(pair, by_turns(first, second)), parts=tuple(thirds)),
        "one alone": Case(Dialogue(people(1, PAIR), (one,))),
        "silence": Case(Dialogue(people(1, PAIR), (np.zeros_like(one),))),
    }


def _row(name: str, face: int, figures: Figures) -> str:
    own = " | "
    if figures.own is not None:
        own = f"{figures.own.correlation:.2f} | {figures.own.lag_seconds:.2f} s"
    blinks = " ".join(map(str, figures.blinks)) or "none"
    return (
        f"| {name} | {face} | {own} | {figures.others:.2f} | {figures.opening:.3f} | "
        f"{figures.alone_opening:.3f} | {figures.likeness:.1f} | "
        f"{blinks}, {figures.in_pauses:.0%} in pauses |"
    )


def _say_of_all(
    shown: dict[str, Case], made: dict[str, np.ndarray], every: Sequence[Figures], num_steps: int
) -> None:
    """What no face of a video says alone."""
    faces = shown["long"].dialogue.group.faces
    same = np.logical_and.reduce([talking.outside(face, *SIZE) for face in faces])
    seam = talking.seam(made["long"][:, same], num_steps)
    _say(f"largest change where windows meet, as a share of that elsewhere: {seam:.2f}")
    dialogue = shown["in turn"].dialogue
    seeds = [made[name] for name in ("in turn", "in turn, another seed")]
    for face in dialogue.group.faces:
        alike = _correlation(*(talking.mouth_opening(frames, face) for frames in seeds))
        _say(f"a mouth by two seeds: correlation {alike:.2f}")
    one, other = ([each.blinks for each in measure(dialogue, frames)] for frames in seeds)
    _say(f"blinks by two seeds: {one} and {other}")
    total = sum(len(figures.blinks) for figures in every)
    in_pauses = sum(len(figures.blinks) * figures.in_pauses for figures in every)
    seconds = SECONDS * len(every)
    _say(f"blinks: {total} in {seconds} s of faces, {in_pauses / max(total, 1):.0%} in pauses")


def _speech(corpus: SpeechCorpus, seed: int, seconds: int) -> np.ndarray:
    """A clip of speech, not of silence."""
    rng = np.random.default_rng(seed)
    while True:
        clip = corpus.clip(rng, seconds * world.FPS)
        if mouth_track(clip).opening.mean() > 0.2:
            return clip


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
