"""The recordings of a request, fetched, decoded and each put at its place in the video."""

from collections.abc import Callable
from pathlib import Path

from avatar_client.contract.job_errors import InputTooLargeError, InvalidInputError
from avatar_client.contract.request import JobInput
from avatar_client.contract.speakers import MAX_PAUSE_SECONDS, never_heard
from worker.media.decoders import MIN_SPEECH_SECONDS
from worker.media.inputs import load_speech
from worker.media.timeline import PlacedSpeech, Soundtrack
from worker.settings import Settings

ROUNDING_SECONDS = 0.001


def load(
    params: JobInput, directory: Path, settings: Settings, check: Callable[[], None]
) -> Soundtrack:
    """What is heard in the video.

    Raises:
        WorkerError: a recording is not what it should be, or begins when nobody hears it; by field.
    """
    placed: list[PlacedSpeech] = []
    for index, speaker in enumerate(params.voices):
        start_seconds = speaker.start_seconds
        if params.order == "in_turn" and placed:
            start_seconds += placed[-1].end_seconds + params.pause_seconds
        left_seconds = params.max_seconds
        if left_seconds is not None and start_seconds > 0:
            left_seconds -= start_seconds
            if left_seconds < MIN_SPEECH_SECONDS:
                raise never_heard(start_seconds, left_seconds + start_seconds, index)
        speech = load_speech(
            speaker.audio,
            directory,
            settings,
            start_seconds=params.audio_start_seconds,
            max_seconds=left_seconds,
            trim_silence=params.trim_silence,
            field=params.field_of(index, "audio"),
            check=check,
        )
        placed.append(PlacedSpeech(speech, start_seconds))
        check()
    _require_no_long_pause(placed)
    _require_short_enough(placed, settings.max_audio_seconds)
    return Soundtrack.of(placed)


def _require_no_long_pause(placed: list[PlacedSpeech]) -> None:
    """Returns if nobody begins long after all others have ended.

    Raises:
        InvalidInputError: someone does, by the field that says when.
    """
    ended_seconds = 0.0
    for index, each in sorted(enumerate(placed), key=lambda item: item[1].start_seconds):
        if each.start_seconds - ended_seconds > MAX_PAUSE_SECONDS:
            raise InvalidInputError(
                f"begins at {each.start_seconds:.2f} s, and all before have ended at "
                f"{ended_seconds:.2f} s: begin at most {MAX_PAUSE_SECONDS:g} s after that, or put "
                "the silence into a recording",
                field=f"speakers.{index}.start_seconds",
            )
        ended_seconds = max(ended_seconds, each.end_seconds)


def _require_short_enough(placed: list[PlacedSpeech], limit_seconds: float) -> None:
    """Returns if all of them together are not too long; each alone has been looked at.

    Raises:
        InputTooLargeError: they are.
    """
    ended_seconds = max(each.end_seconds for each in placed)
    if ended_seconds > limit_seconds + ROUNDING_SECONDS:
        raise InputTooLargeError(
            f"end after {ended_seconds:.2f} s, over the limit of {limit_seconds:g} s; max_seconds "
            "takes a part of it",
            field="speakers",
        )
