"""Several voices in one video: who hears what, and what several of them are equal to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.golden_transformer import relative_difference
from worker.generation import pipeline as pipeline_module
from worker.generation.conditioning import Conditioning
from worker.generation.image import face_mask, face_masks
from worker.generation.options import DenoiseOptions
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.generation.voices import Voice, require_voices
from worker.shapes import Box, FrameSize

ROUNDING = 1e-6  # of float32, through all steps
SIZE = FrameSize(height=32, width=64)
LEFT, RIGHT = (4.0, 8.0, 14.0, 16.0), (38.0, 6.0, 16.0, 18.0)  # whose masks overlap
# The last two are guided by the audio alone; steps 3 and 11 read the cache.
OPTIONS = DenoiseOptions(
    num_inference_steps=13,
    computed_steps=[0, 1, 2, 4, 10, 12],
    latents_dtype=torch.float32,
)
SHORT, LONG = 0.2, 6.0  # s: of one window, and of several that move


def tone(hz: float, seconds: float = SHORT) -> np.ndarray:
    samples = np.arange(round(seconds * 16_000))
    return (np.sin(2 * np.pi * hz * samples / 16_000) / 2).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline(toy_model: Path) -> HunyuanVideoAvatarPipeline:
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(toy_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(
    pipeline: HunyuanVideoAvatarPipeline, *voices: Voice, still: bool = False
) -> Conditioning:
    return pipeline.encode(
        Image.new("RGB", (SIZE.width, SIZE.height), (200, 120, 90)),
        voices,
        prompt="They speak.",
        height=SIZE.height,
        width=SIZE.width,
        bystanders="still" if still else "free",
    )


def denoised(pipeline: HunyuanVideoAvatarPipeline, conditioning: Conditioning) -> Tensor:
    return pipeline.denoise(conditioning, OPTIONS, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(SHORT, id="one window"),
        pytest.param(LONG, id="several windows", marks=pytest.mark.slow),
    ],
)
def test_voices_of_one_recording_are_one_voice_in_all_their_places(
    seconds: float, pipeline: HunyuanVideoAvatarPipeline
) -> None:
    same = tone(220, seconds)
    both = encoded(pipeline, Voice(same, LEFT), Voice(same, RIGHT))
    union = both.face_mask.sum(dim=1, keepdim=True)
    assert torch.equal(union, both.face_mask.amax(dim=1, keepdim=True))  # they do not overlap
    one = replace(both, audio_embeds=both.audio_embeds[:1], face_mask=union)

    expected = denoised(pipeline, one)

    assert relative_difference(denoised(pipeline, both), expected) < ROUNDING
    alone = encoded(pipeline, Voice(same, LEFT))
    assert relative_difference(denoised(pipeline, alone), expected) > 1e3 * ROUNDING


@pytest.mark.slow
def test_the_order_of_the_voices_does_not_matter(pipeline: HunyuanVideoAvatarPipeline) -> None:
    voices = [Voice(tone(220), LEFT), Voice(tone(700), RIGHT)]
    latents = denoised(pipeline, encoded(pipeline, *voices))
    assert relative_difference(denoised(pipeline, encoded(pipeline, *voices[::-1])), latents) < (
        ROUNDING
    )
    swapped = [replace(voices[0], face_box=RIGHT), replace(voices[1], face_box=LEFT)]
    other = denoised(pipeline, encoded(pipeline, *swapped))
    assert relative_difference(other, latents) > 1e3 * ROUNDING


def test_a_voice_without_a_place_is_not_heard(pipeline: HunyuanVideoAvatarPipeline) -> None:
    one = encoded(pipeline, Voice(tone(220), LEFT))
    two = replace(
        one,
        audio_embeds=torch.cat([one.audio_embeds, torch.randn_like(one.audio_embeds)]),
        face_mask=torch.cat([one.face_mask, torch.zeros_like(one.face_mask)], dim=1),
    )
    assert relative_difference(denoised(pipeline, two), denoised(pipeline, one)) < ROUNDING


def test_a_bystander_who_is_still_hears_what_a_silent_voice_does(
    pipeline: HunyuanVideoAvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is something to hear: who is told it is not as one who hears nothing."""
    monkeypatch.setattr(pipeline_module, "find_faces", lambda image, detector: [LEFT, RIGHT])
    speaker = Voice(tone(220), (LEFT[0] + 1, *LEFT[1:]))  # a box by hand is never the detector's
    silent = Voice(np.zeros_like(speaker.waveform), RIGHT)

    still = encoded(pipeline, speaker, still=True)
    told = encoded(pipeline, speaker, silent)

    assert torch.equal(still.face_mask, told.face_mask)
    assert torch.equal(still.audio_embeds, told.audio_embeds)
    assert still.face_boxes == (speaker.face_box,)
    free = encoded(pipeline, speaker)
    assert free.face_mask.shape[1] == 1
    difference = relative_difference(denoised(pipeline, free), denoised(pipeline, still))
    assert difference > 1e3 * ROUNDING


def test_several_bystanders_share_one_silence(
    pipeline: HunyuanVideoAvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = (24.0, 8.0, 8.0, 10.0)
    monkeypatch.setattr(pipeline_module, "find_faces", lambda *_: [LEFT, middle, RIGHT])
    still = encoded(pipeline, Voice(tone(220), None), still=True)  # the largest speaks: the right
    assert still.face_boxes == (RIGHT,)
    expected = face_masks([RIGHT, LEFT, middle], SIZE)
    assert torch.equal(still.face_mask[:, :1], expected[:, :1])
    assert torch.equal(still.face_mask[:, 1:], expected[:, 1:].sum(dim=1, keepdim=True))
    assert len(still.audio_embeds) == 2


# Masks


@pytest.mark.parametrize(
    "boxes",
    [
        [(60.0, 100.0, 60.0, 80.0), (150.0, 90.0, 70.0, 90.0)],  # side by side
        [(60.0, 100.0, 120.0, 140.0), (184.0, 160.0, 24.0, 24.0)],  # a small one beside a large one
        [(0.0, 0.0, 64.0, 64.0), (64.0, 0.0, 64.0, 64.0), (128.0, 0.0, 64.0, 64.0)],  # in a row
        [(96.0, 0.0, 64.0, 80.0), (96.0, 176.0, 64.0, 80.0)],  # far from each other
    ],
)
def test_each_face_has_its_own_mask_and_no_place_has_two(boxes: list[Box]) -> None:
    size = FrameSize(height=256, width=256)
    masks = face_masks(boxes, size)
    alone = torch.cat([face_mask(box, size) for box in boxes], dim=1)
    assert torch.equal(masks.sum(dim=1), alone.amax(dim=1))  # nothing is lost, nothing twice
    assert torch.equal(masks.amax(dim=1), alone.amax(dim=1))
    for index, (x, y, width, height) in enumerate(boxes):
        rows = slice(-(-int(y) // 8), int(y + height) // 8)
        columns = slice(-(-int(x) // 8), int(x + width) // 8)
        assert (masks[0, index, 0, rows, columns] == 1).all()  # its own box is its own
    assert torch.equal(face_masks(boxes[::-1], size), masks.flip(1))


def test_the_mask_of_one_face_is_the_reference_s() -> None:
    assert torch.equal(face_masks([LEFT], SIZE), face_mask(LEFT, SIZE))


# Refusals


@pytest.mark.parametrize(
    ("voices", "problem"),
    [
        ([], "voices"),
        ([Voice(tone(220), LEFT), Voice(tone(220, 0.3), RIGHT)], "equally long"),
        ([Voice(tone(220), LEFT), Voice(tone(220), None)], "face_box"),
        ([Voice(tone(220), LEFT), Voice(tone(220), (64.0, 0.0, 8.0, 8.0))], "face_box"),
    ],
)
def test_voices_that_are_no_video_are_refused(voices: Sequence[Voice], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        require_voices(voices, SIZE, 25)
