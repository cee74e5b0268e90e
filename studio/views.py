"""What the page says about a job: HTML and sentences, without the page itself."""

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from avatar_client.contract.job_errors import WorkerError
from avatar_client.contract.speakers import MAX_SPEAKERS
from studio.faces import Box, Faces
from studio.fields import controls
from studio.history import Record
from studio.tracker import JobState

EMPTY = (
    '<div class="card empty"><p>Your video appears here.</p>'
    "<p>Add a portrait and a recording, then make the video.</p></div>"
)
LABELS = {
    "image": "The portrait",
    "audio": "The speech",
    "speakers": "The speakers",
    "endpoint": "The endpoint",
    "key": "The API key",
}
SPEAKER_PARTS = {"audio": "recording", "face_box": "box", "start_seconds": "start"}
STATUS_LABELS = {
    "SENDING": "Sending the inputs",
    "IN_QUEUE": "Waiting for a worker",
    "IN_PROGRESS": "Starting",
}
FINAL_LABELS = {
    "FAILED": "The video could not be made.",
    "CANCELLED": "Cancelled.",
    "TIMED_OUT": "The endpoint ended the job at its time limit.",
}


def status(state: JobState | None) -> str:
    """The card above the video: how far the job is, or how it ended; empty once it is done."""
    if state is None:
        return EMPTY
    record = state.record
    if record.status == "COMPLETED":
        return ""
    if record.is_over:
        return failure(FINAL_LABELS[record.status], _reason(record))
    if not state.is_tracked:
        return failure("Nobody follows this job now.", "Connect to its endpoint to go on.")
    return _progress(state)


def note(text: str) -> str:
    """A line that a person should read first."""
    return f'<p class="note">{escape(text)}</p>'


def failure(title: str, reason: str = "") -> str:
    """A card that says what went wrong."""
    reason = f"<p>{escape(reason)}</p>" if reason else ""
    return f'<div class="card failed" role="alert"><strong>{escape(title)}</strong>{reason}</div>'


def headline(state: JobState | None) -> str:
    """The job's stage in a few words, for a reader that speaks; changes with the stage alone."""
    if state is None:
        return ""
    record = state.record
    if record.status == "COMPLETED":
        return "The video is ready."
    return escape(FINAL_LABELS[record.status] if record.is_over else _stage(state))


def video(path: Path) -> str:
    """The player: the browser's own, which gradio's is not as good as for a keyboard."""
    address = f"gradio_api/file={quote(str(path))}"
    return f'<video class="result" controls playsinline src="{address}" aria-label="Video"></video>'


def caption(record: Record) -> str:
    """The finished video's facts in one line, and what the worker warns of."""
    if record.status != "COMPLETED":
        return ""
    output = record.output
    total_seconds = output.get("total_seconds")
    made_in = None if total_seconds is None else duration(total_seconds)
    known: list[tuple[str, tuple[Any, ...]]] = [
        ("{:.1f} s", (output.get("duration_seconds"),)),
        ("{} × {}", (output.get("width"), output.get("height"))),  # noqa: RUF001
        ("{:g} frames a second", (output.get("fps"),)),
        ("seed {}", (output.get("seed"),)),
        ("made in {}", (made_in,)),
        ("${:.3f}", (output.get("cost_usd"),)),
    ]
    facts = [form.format(*values) for form, values in known if None not in values]
    warnings = "".join(f"<p>{escape(text)}</p>" for text in output.get("warnings", []))
    return f'<div class="caption"><p>{escape(" · ".join(facts))}</p>{warnings}</div>'


def faces(found: Faces, speaking: Sequence[Box]) -> str:
    """The portrait with a button on each face, which says who speaks with it."""
    buttons = []
    for number, box in enumerate(found.boxes, 1):
        x, y, width, height = box
        place = (
            f"left: {100 * x / found.width:.2f}%; top: {100 * y / found.height:.2f}%; "
            f"width: {100 * width / found.width:.2f}%; height: {100 * height / found.height:.2f}%"
        )
        speaker = speaking.index(box) + 1 if box in speaking else None
        label = f"Face {number}" + (f", speaker {speaker}" if speaker else "")
        buttons.append(
            f'<button type="button" data-face="{number - 1}" style="{place}" '
            f'aria-label="{label}" aria-pressed="{str(speaker is not None).lower()}">'
            f"<span>{number}</span></button>"
        )
    words = "Click on a face to give it a recording." if buttons else "No face was found."
    if len(speaking) == MAX_SPEAKERS:
        words = f"At most {MAX_SPEAKERS} people speak."
    return (
        f'<div class="faces"><img src="{escape(found.picture)}" alt="The portrait">'
        f'{"".join(buttons)}</div><p role="status">{words}</p>'
    )


def connected(words: str) -> str:
    """What the endpoint says about itself."""
    return f'<p role="status">{escape(words)}</p>'


def title(state: JobState) -> str:
    """The job in the history: when, and what became of it if it has brought no video."""
    record = state.record
    when = datetime.fromisoformat(record.created_at).astimezone()
    is_today = when.date() == datetime.now(when.tzinfo).date()
    words = {
        "COMPLETED": "",
        "FAILED": "failed",
        "CANCELLED": "cancelled",
        "TIMED_OUT": "timed out",
    }
    ending = words.get(record.status, "running" if state.is_tracked else "left")
    return f"{when:{'%H:%M' if is_today else '%d %b'}}" + (f", {ending}" if ending else "")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def field_error(field: str, message: str) -> str:
    """The sentence at a field."""
    return f'<p class="field-error" role="alert">{escape(_label(field))} {escape(message)}.</p>'


def sentence(error: WorkerError) -> str:
    """An error that belongs to no field of the page."""
    subject = f"{error.field}: " if error.field else ""
    return f"{subject}{error.message}."


def _label(field: str) -> str:
    known = controls()
    if match := re.fullmatch(r"speakers\.(\d)\.(\w+)", field):
        part = SPEAKER_PARTS.get(match[2], match[2])
        return f"The {part} of speaker {int(match[1]) + 1}"
    return LABELS.get(field) or (known[field].label if field in known else field)


def _reason(record: Record) -> str:
    error = record.error
    if error is None:
        return ""
    text = f"{error['message'][:1].upper()}{error['message'][1:]}".rstrip(".") + "."
    if error["field"]:
        text = f"{_label(error['field'])} {error['message']}."
    return f"{text} Trying again may help." if error["retryable"] else text


def _stage(state: JobState) -> str:
    if state.note:
        return state.note
    progress = state.progress
    if progress is None:
        return STATUS_LABELS.get(state.record.status, state.record.status)
    return progress.message.removesuffix(f" {progress.step}/{progress.total_steps}")


def _progress(state: JobState) -> str:
    progress = state.progress
    details, percent = [], None
    if progress is not None:
        percent = round(100 * progress.progress)
        if progress.step is not None:
            details.append(f"Step {progress.step} of {progress.total_steps}")
        if progress.stage_index is not None:
            details.append(f"stage {progress.stage_index} of {progress.stage_count}")
        if state.left_seconds is not None:
            left = duration(state.left_seconds)
            details.append(f"about {left} left" if state.left_seconds >= 1 else "almost done")
    else:
        details.append(duration(state.elapsed_seconds))
    value = "" if percent is None else f' aria-valuenow="{percent}"'
    width = "" if percent is None else f' style="width: {percent}%"'
    return (
        '<div class="card"><div class="line">'
        f"<strong>{escape(_stage(state))}</strong>"
        f"<span>{'' if percent is None else f'{percent} %'}</span></div>"
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" '
        f'aria-valuemax="100"{value}><div{width}></div></div>'
        f"<p>{escape(', '.join(details))}</p>{_preview(state)}</div>"
    )


def _preview(state: JobState) -> str:
    if state.preview is None:
        return ""
    return (
        f'<img class="preview" src="{escape(state.preview)}" decoding="sync" '
        'alt="How a moment in the middle will roughly look">'
    )
