"""Several drawn people in one picture: each moves alone, where its box is, and speaks in turn."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.demo import talking
from tests.training.test_world import still
from training import speech, world
from training.groups import Group, conversation, random_group
from training.speech import SpeechCorpus, formant_speech
from worker.shapes import FrameSize

SIZE = FrameSize(256, 384)


def drawn(group: Group, motions: list[world.Motion], size: FrameSize) -> np.ndarray:
    """The frames as (F, H, W, 3) uint8."""
    frames = group.render(motions, size)
    return (frames * 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("size", "people"), [(SIZE, 2), (SIZE, 3), (FrameSize(192, 448), 3), (FrameSize(256, 256), 2)]
)
def test_nobody_hides_the_face_of_another(size: FrameSize, people: int) -> None:
    for seed in range(40):
        boxes = random_group(np.random.default_rng(seed), people, size).boxes(size)
        for x, y, width, height in boxes:
            assert min(x, y) >= 0
            assert x + width <= size.width
            assert y + height <= size.height
        assert all(a[0] + a[2] < b[0] for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("in_panels", [False, True])
def test_the_mouth_of_one_opens_and_no_other(in_panels: bool) -> None:
    seed = next(
        seed
        for seed in itertools.count()
        if random_group(np.random.default_rng(seed), 2, SIZE).in_panels == in_panels
    )
    group = random_group(np.random.default_rng(seed), 2, SIZE)
    opening = np.linspace(0, 1, 4, dtype=np.float32)
    for speaker, other in ((0, 1), (1, 0)):
        motions = [still(4), still(4)]
        motions[speaker] = replace(still(4), opening=opening)
        frames = drawn(group, motions, SIZE)
        dark = talking.mouth_opening(frames, group.faces[speaker])
        assert dark[0] == 0
        assert (np.diff(dark) > 0).all()
        assert talking.mouth_opening(frames, group.faces[other]).max() == 0


def test_panels_have_backgrounds_of_their_own() -> None:
    faces = random_group(np.random.default_rng(0), 2, SIZE).faces
    apart, together = (
        Group(faces, in_panels=in_panels).portrait(SIZE)[:, 0] for in_panels in (True, False)
    )
    edges = [abs(row[:, 192] - row[:, 191]).max() for row in (apart, together)]
    assert edges[0] > 4 * edges[1]


def test_one_alone_is_drawn_as_ever() -> None:
    group = random_group(np.random.default_rng(3), 1, SIZE)
    assert group.faces == (world.random_face(np.random.default_rng(3)),)
    assert (group.portrait(SIZE) == world.portrait(group.faces[0], *SIZE)).all()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpeechCorpus:
    monkeypatch.setattr(speech, "_espeak", lambda rng, split: formant_speech(rng, 32_000))
    monkeypatch.setitem(speech.BANK_SECONDS, "train", 10.0)
    return SpeechCorpus("train", tmp_path)


def test_people_speak_in_turn_or_at_once_and_some_are_silent(corpus: SpeechCorpus) -> None:
    at_once, silent = list[bool](), list[bool]()
    for seed in range(30):
        voices = conversation(np.random.default_rng(seed), corpus, 120, 3)
        assert [len(voice) for voice in voices] == [640 * 120] * 3
        heard = np.stack([abs(voice) > 1e-3 for voice in voices])
        at_once.append(bool((heard.sum(axis=0) > 1).any()))
        silent.extend(not voice.any() for voice in voices)
    assert 0.1 < np.mean(at_once) < 0.8
    assert 0.2 < np.mean(silent) < 0.6
