"""The demo model speaks in twos: several people in one picture, each with a recording of its own.

Through the whole worker, figures of the mp4, as in `test_demo_talks.py`; faces and voices are those
that the training left out.
"""

import asyncio
import base64
import io
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from avatar_client import AvatarEndpoint
from demo.__main__ import DUET
from tests.demo import duet, talking
from tests.demo.duet import Dialogue, Figures, in_turn, people, together
from tests.demo.test_demo_talks import FEWEST_STEPS, MOST_LAG, encoded, recording
from training import world
from training.speech import mouth_track
from worker.generation.engine import Engine
from worker.generation.face import detect_by_dlib
from worker.service.worker import Worker
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ

STEPS = 20
MOST_OPEN = 0.06  # of a silent mouth, at the 95th percentile
LARGEST_SEAM = 1.1  # of the change where windows meet, as a share of the largest elsewhere


@pytest.fixture(scope="module")
def perform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., np.ndarray]]:
    """Makes the frames of a dialogue as a client would: `perform(dialogue, **fields)`."""
    worker = Worker(Settings(avatar_model="demo"), Engine.load(Settings(avatar_model="demo")))
    made: dict[str, np.ndarray] = {}

    def make(dialogue: Dialogue, **fields: Any) -> np.ndarray:
        heard = [None if voice is None else hash(voice.tobytes()) for voice in dialogue.voices]
        key = repr((dialogue.group, heard, sorted(fields.items())))
        if key not in made:
            made[key] = _made(worker, dialogue, fields)
        return made[key]

    temporary, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("jobs"))
    yield make
    tempfile.tempdir = temporary


def _made(worker: Worker, dialogue: Dialogue, fields: dict[str, Any]) -> np.ndarray:
    picture = io.BytesIO()
    Image.fromarray(dialogue.portrait).save(picture, "PNG")
    request = {
        "image": encoded(picture.getvalue()),
        "speakers": [
            {"audio": encoded(_wav(voice)), "face_box": list(box)}
            for voice, box in dialogue.speakers
        ],
        "resolution": dialogue.size.height,
        "num_inference_steps": STEPS,
        "seed": 1,
        "output": {"delivery": "inline"},
        **fields,
    }
    output = asyncio.run(worker.handle({"id": "job-1", "input": request}))
    if "error" in output:  # no AssertionError, which a test may expect
        raise RuntimeError(output["error"])
    with av.open(io.BytesIO(base64.b64decode(output["video_base64"])), "r") as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def _wav(waveform: np.ndarray) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes((waveform * 32767).astype("<i2").tobytes())
    return content.getvalue()


def at_once() -> Dialogue:
    """Two people who speak at the same time."""
    voices = together(recording("romanian"), recording("finnish"))
    return Dialogue(people(2, duet.PAIR), voices)


def one_by_one() -> Dialogue:
    """Two people, the second after the first."""
    half = 2 * SAMPLE_RATE_HZ + SAMPLE_RATE_HZ // 2
    voices = in_turn(recording("romanian")[:half], recording("finnish")[:half])
    return Dialogue(people(2, duet.PAIR), voices)


def with_a_listener() -> Dialogue:
    """Three people, the middle one of whom has nothing to say."""
    voices = together(recording("romanian"), None, recording("finnish"))
    return Dialogue(people(3, duet.TRIO), voices)


def fifteen_seconds() -> Dialogue:
    """Two people who speak by turns for longer than a window."""
    romanian, finnish, english = map(recording, ("romanian", "finnish", "english"))
    other = np.concatenate([romanian, finnish, romanian])
    length = min(len(english), len(other))
    return Dialogue(people(2, duet.PAIR), duet.by_turns(english[:length], other[:length]))


def require_speech(figures: Figures) -> None:
    """Passes if the mouth follows its own voice, and no other's while it is silent."""
    assert figures.own is not None
    assert figures.own.correlation >= 0.8
    assert abs(figures.own.lag_seconds) <= MOST_LAG
    assert figures.others <= 0.3
    assert figures.alone_opening <= MOST_OPEN


@pytest.mark.slow
def test_two_people_speak_at_once_each_its_own_recording(perform: Callable[..., Any]) -> None:
    dialogue = at_once()
    for figures in duet.measure(dialogue, perform(dialogue, num_inference_steps=FEWEST_STEPS)):
        require_speech(figures)
        assert figures.likeness >= 24


@pytest.mark.talks
def test_two_people_speak_in_turn_and_are_silent_in_between(perform: Callable[..., Any]) -> None:
    dialogue = one_by_one()
    for figures in duet.measure(dialogue, perform(dialogue)):
        require_speech(figures)
        assert figures.likeness >= 24


@pytest.mark.talks
def test_a_dialogue_of_several_windows_ends_as_it_began_and_has_no_seam(
    perform: Callable[..., Any],
) -> None:
    dialogue = fifteen_seconds()
    frames = perform(dialogue)
    for start in (0, 5, 10):
        part = slice(start * world.FPS, (start + 5) * world.FPS)
        for figures in duet.measure(dialogue.part(part), frames[part]):
            require_speech(figures)
            assert figures.likeness >= 24
    faces = dialogue.group.faces
    same = np.logical_and.reduce([talking.outside(face, *dialogue.size) for face in faces])
    assert talking.seam(frames[:, same], STEPS) <= LARGEST_SEAM


@pytest.mark.talks
def test_other_boxes_are_other_mouths(perform: Callable[..., Any]) -> None:
    dialogue = at_once()
    swapped = dialogue.swapped()
    frames = perform(swapped)
    for figures in duet.measure(swapped, frames):
        require_speech(figures)
    for figures in duet.measure(dialogue, frames):  # against the voice of the other one
        assert figures.own is not None
        assert figures.own.correlation <= 0.3


@pytest.mark.talks
def test_a_third_face_stays_closed(perform: Callable[..., Any]) -> None:
    dialogue = with_a_listener()
    left, listener, right = duet.measure(dialogue, perform(dialogue))
    require_speech(left)
    require_speech(right)
    assert listener.opening <= MOST_OPEN
    assert min(left.likeness, listener.likeness, right.likeness) >= 24


@pytest.mark.talks
def test_silence_around_and_within_speech_leaves_the_mouth_closed_and_the_face_in_place(
    perform: Callable[..., Any],
) -> None:
    speech = recording("romanian")
    pause = np.zeros(SAMPLE_RATE_HZ, np.float32)
    half = SAMPLE_RATE_HZ
    voice = np.concatenate([pause, speech[:half], pause, speech[half : 2 * half], pause])
    dialogue = Dialogue(people(1, duet.PAIR), (voice,))
    frames = perform(dialogue)
    (figures,) = duet.measure(dialogue, frames)
    mouth = talking.mouth_opening(frames, dialogue.group.faces[0])
    silent = np.tile(np.repeat([True, False], world.FPS), 3)[: len(mouth)]
    settled = silent & np.roll(silent, 3) & np.roll(silent, -3)  # lips take a tenth of a second
    assert np.percentile(mouth[settled], 95) <= MOST_OPEN
    assert mouth[~silent].max() > 2 * MOST_OPEN
    assert figures.likeness >= 24


@pytest.mark.talks
def test_people_blink_every_few_seconds_and_rather_in_pauses(perform: Callable[..., Any]) -> None:
    dialogue = one_by_one()
    one, other = (duet.measure(dialogue, perform(dialogue, seed=seed)) for seed in (1, 2))
    for figures in (*one, *other):
        assert len(figures.blinks) >= 1  # in five seconds
    assert [each.blinks for each in one] != [each.blinks for each in other]
    every = [each for each in (*one, *other) for _ in each.blinks]
    assert np.mean([each.in_pauses for each in every]) > 0.5


@pytest.mark.talks
def test_the_seed_changes_what_nobody_says(perform: Callable[..., Any]) -> None:
    dialogue = one_by_one()
    frames = [perform(dialogue, seed=seed) for seed in (1, 2)]
    for face in dialogue.group.faces:
        one, other = (talking.mouth_opening(each, face) for each in frames)
        assert np.corrcoef(one, other)[0, 1] > 0.9


def test_the_figures_tell_a_drawn_dialogue_from_a_wrong_one() -> None:
    """What the training draws passes, and what a wrong mouth, or open eyes, would be fails."""
    dialogue = one_by_one()
    drawn = _drawn(dialogue, blinking=True)
    for figures in duet.measure(dialogue, drawn):
        require_speech(figures)
        assert figures.blinks
        assert figures.likeness >= 24
    for figures in duet.measure(dialogue, _drawn(dialogue.swapped(), blinking=False)):
        with pytest.raises(AssertionError):
            require_speech(figures)
        assert not figures.blinks


def test_the_demos_duet_is_a_valid_request_and_shows_two_faces() -> None:
    with AvatarEndpoint("http://127.0.0.1:1/v2/demo", "key") as endpoint:
        body = endpoint.request(**DUET)
    assert [speaker["face"] for speaker in body["input"]["speakers"]] == ["left", "right"]
    assert len(detect_by_dlib(Image.open(DUET["image"]))) == 2


def _drawn(dialogue: Dialogue, *, blinking: bool) -> np.ndarray:
    """The frames as the drawn world has them."""
    motions = []
    for seed, voice in enumerate(dialogue.voices):
        assert voice is not None
        motion = world.speaking_motion(np.random.default_rng(seed), mouth_track(voice))
        motions.append(motion if blinking else replace(motion, eyes=np.ones_like(motion.eyes)))
    frames = dialogue.group.render(motions, dialogue.size)
    pixels: np.ndarray = (frames * 255).byte().permute(0, 2, 3, 1).numpy()
    return pixels
