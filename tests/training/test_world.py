"""The drawn world: what is told to move moves, and nothing else does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.demo import talking
from training import world
from training.speech import MouthTrack
from training.world import Face

SIZE = 128


def still(num_frames: int) -> world.Motion:
    """A motion in which nothing moves."""
    return world.Motion(
        *(np.repeat(getattr(world.REST, name), num_frames) for name in vars(world.REST))
    )


def drawn(face: world.Face, motion: world.Motion) -> np.ndarray:
    """The frames as (F, H, W, 3) uint8."""
    frames = world.render(face, motion, SIZE, SIZE)
    return (frames * 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module", params=range(4))
def face(request: pytest.FixtureRequest) -> Face:
    return world.random_face(np.random.default_rng(request.param))


def test_a_person_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (world.random_face(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_portrait_is_the_face_at_rest(face: Face) -> None:
    frames = world.render(face, still(3), SIZE, SIZE)
    assert torch.equal(frames[2], world.portrait(face, SIZE, SIZE))
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_the_mouth_opens_as_far_as_it_is_told_and_nothing_but_it_and_the_jaw_moves(
    face: Face,
) -> None:
    opening = np.linspace(0, 1, 6, dtype=np.float32)
    frames = drawn(face, replace(still(6), opening=opening))
    dark = talking.mouth_opening(frames, face)
    assert dark[0] == 0
    assert (np.diff(dark) > 0).all()
    assert talking.likeness(frames, frames[0], face)[1:].min() > 26
    assert talking.eye_opening(frames, face).min() > 0.99


def test_closed_eyes_are_seen_at_the_eyes_alone(face: Face) -> None:
    frames = drawn(face, replace(still(2), eyes=np.array([1, 0], np.float32)))
    assert talking.eye_opening(frames, face)[1] < 0.9
    assert talking.mouth_opening(frames, face).max() == 0


def test_a_larger_pose_sways_further() -> None:
    face = world.random_face(np.random.default_rng(0))
    silent = MouthTrack(np.zeros(75, np.float32), np.zeros(75, np.float32))
    sways = [
        talking.sway(
            drawn(face, world.speaking_motion(np.random.default_rng(5), silent, pose)), face
        )
        for pose in (0, 25, 60)
    ]
    assert sways[0] < 0.01 < sways[1] < sways[2]


def test_another_chance_moves_the_eyes_and_the_head_but_not_the_mouth() -> None:
    mouth = MouthTrack(*np.random.default_rng(0).random((2, 200), np.float32))
    one, other = (world.speaking_motion(np.random.default_rng(seed), mouth) for seed in (1, 2))
    assert (one.opening == other.opening).all()
    assert (one.eyes != other.eyes).any()
    assert (one.x != other.x).any()
    assert one.eyes.min() == 0


def blinks(eyes: np.ndarray) -> list[int]:
    """The frames in which the eyes begin to close."""
    return [f for f in range(1, len(eyes)) if eyes[f] < 1 and eyes[f - 1] == 1]


def test_the_eyes_blink_every_few_seconds_and_rather_in_pauses() -> None:
    words = np.tile(np.repeat(np.array([1, 0], np.float32), (35, 15)), 20)  # 1.4 s each, 0.6 s rest
    mouth = MouthTrack(words, np.zeros_like(words))
    tracks = [world.speaking_motion(np.random.default_rng(seed), mouth) for seed in range(20)]
    starts = [blinks(track.eyes) for track in tracks]

    assert len({tuple(each) for each in starts}) == len(starts)
    gaps = np.concatenate([np.diff([0, *each]) for each in starts])
    assert gaps.max() <= 5 * world.FPS
    assert np.concatenate([np.diff(each) for each in starts]).min() >= world.REST_FRAMES
    frames = np.concatenate([np.array(each) for each in starts])
    assert (words[frames] == 0).mean() > 0.6  # pauses are three tenths of the time
    silent = MouthTrack(np.zeros_like(words), np.zeros_like(words))
    quiet = blinks(world.speaking_motion(np.random.default_rng(0), silent).eyes)
    assert np.diff([0, *quiet]).max() <= 5 * world.FPS
