"""A request's recordings, each at its place in the video, and what is refused before it is made."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar_client.contract.job_errors import WorkerError
from avatar_client.contract.request import JobInput
from tests.support.recordings import voice, write
from worker.media.timeline import Soundtrack
from worker.service import soundtrack
from worker.settings import Settings

SETTINGS = Settings(max_audio_seconds=5.0)


def recording(seconds: float, rate_hz: int = 16_000, channels: int = 1, **options: Any) -> str:
    return base64.b64encode(write(voice(seconds, rate_hz, channels), rate_hz, **options)).decode()


def silent_around(seconds: float) -> str:
    """Speech with a second of silence before it and after it."""
    samples = np.pad(voice(seconds, 16_000), ((0, 0), (16_000, 16_000)))
    return base64.b64encode(write(samples, 16_000)).decode()


def load(tmp_path: Path, speakers: list[Any], **fields: Any) -> Soundtrack:
    params = JobInput.model_validate({"image": "AA==", "speakers": speakers, **fields})
    return soundtrack.load(params, tmp_path, SETTINGS, lambda: None)


def times(track: Soundtrack) -> list[tuple[float, float]]:
    return [(round(v.start_seconds, 3), round(v.end_seconds, 3)) for v in track.voices]


def test_together_each_begins_at_its_own_time_whatever_its_file_is(tmp_path: Path) -> None:
    speakers = [
        {"audio": recording(0.5, 44_100, 2, container="flac", codec="flac"), "start_seconds": 0.4},
        {"audio": recording(0.7, 8_000)},
    ]
    track = load(tmp_path, speakers)
    assert times(track) == [(0.4, 0.9), (0.0, 0.7)]
    assert (track.recording.frame_rate, track.recording.channels) == (44_100, 2)
    assert {len(waveform) for waveform in track.waveforms} == {14_400}
    assert {path.name for path in tmp_path.iterdir()} == {"speakers.0.audio", "speakers.1.audio"}


def test_in_turn_each_begins_when_the_one_before_has_ended(tmp_path: Path) -> None:
    speakers = [
        {"audio": recording(0.5)},
        {"audio": recording(0.3), "start_seconds": 0.1},
    ] * 2
    track = load(tmp_path, speakers, order="in_turn", pause_seconds=0.2)
    assert times(track) == [(0.0, 0.5), (0.8, 1.1), (1.3, 1.8), (2.1, 2.4)]


@pytest.mark.parametrize("order", ["together", "in_turn"])
def test_the_longest_that_the_speech_may_be_is_that_of_all_together(
    tmp_path: Path, order: str
) -> None:
    start = {"together": 0.4, "in_turn": 0.0}[order]
    speakers = [
        {"audio": recording(0.4)},
        {"audio": recording(1.0), "start_seconds": start},
    ]
    track = load(tmp_path, speakers, order=order, max_seconds=0.6)
    assert times(track) == [(0.0, 0.4), (0.4, 0.6)]


def test_silence_around_a_recording_is_cut_if_asked(tmp_path: Path) -> None:
    speakers = [{"audio": silent_around(1.0)}, {"audio": silent_around(1.0)}]
    kept = load(tmp_path, [speakers[0], {**speakers[1], "start_seconds": 1.5}])
    assert times(kept) == [(0.0, 3.0), (1.5, 4.5)]
    (first, first_end), (second, second_end) = times(
        load(tmp_path, speakers, order="in_turn", trim_silence=True)
    )
    assert first == 0.0
    assert second == first_end < 2.0
    assert second_end < 4.0
    cut = load(tmp_path, speakers, order="in_turn", trim_silence=True, max_seconds=2.0)
    assert cut.duration_seconds == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("speakers", "fields", "code", "field", "said"),
    [
        ([{}, {"start_seconds": 9}], {}, "INVALID_INPUT", "speakers.1.start_seconds", "9.00 s"),
        ([{"start_seconds": 6}], {}, "INVALID_INPUT", "speakers.0.start_seconds", "at most 5 s"),
        (
            [{}, {"start_seconds": 5}],
            {"order": "in_turn", "pause_seconds": 1},
            "INVALID_INPUT",
            "speakers.1.start_seconds",
            "all before have ended at 0.50 s",
        ),
        (
            [{}, {}],
            {"order": "in_turn", "max_seconds": 0.5},
            "INVALID_INPUT",
            "speakers.1.start_seconds",
            "max_seconds ends the speech at 0.5 s",
        ),
        (
            [{"start_seconds": 4.8}, {}],
            {},
            "INPUT_TOO_LARGE",
            "speakers",
            "end after 5.30 s, over the limit of 5 s",
        ),
        ([{}, {"audio": recording(5.5)}], {}, "INPUT_TOO_LARGE", "speakers.1.audio", "max_seconds"),
        (
            [{}, {"audio": "https://127.0.0.1/a.wav"}],
            {},
            "INPUT_URL_BLOCKED",
            "speakers.1.audio",
            "",
        ),
        ([{}, {"audio": "AAAA"}], {}, "UNSUPPORTED_MEDIA", "speakers.1.audio", ""),
        ([{}, {"audio": recording(0.01)}], {}, "INVALID_INPUT", "speakers.1.audio", "too short"),
    ],
)
def test_a_speaker_whom_nobody_could_hear_is_refused_by_field(
    tmp_path: Path,
    speakers: list[dict[str, Any]],
    fields: dict[str, Any],
    code: str,
    field: str,
    said: str,
) -> None:
    given = [{"audio": recording(0.5), **speaker} for speaker in speakers]
    with pytest.raises(WorkerError) as caught:
        load(tmp_path, given, **fields)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert said in caught.value.message
