"""The studio's jobs on disk: a directory for each, with its inputs, its video and what is known.

    <directory>/<id>/record.json  portrait.*  speech.* or speaker-<n>.*  thumbnail.jpg
                     avatar-<id>.mp4 or .webm

It holds no key and no address of a result, which may carry a signature.
"""

import json
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageOps
from pydantic import Field, TypeAdapter, ValidationError

from studio.fields import video_suffix
from worker.atomic_file import write_text

MAX_JOBS = 24
THUMBNAIL_SIDE = 240  # px
FINAL_STATUSES = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

IMAGE_SUFFIXES = "jpg jpeg png webp gif tif tiff bmp avif jp2 ppm"
SOUND_SUFFIXES = "wav mp3 m4a ogg oga opus flac webm mp4 mov aac amr"
MEDIA_SUFFIXES = frozenset(f".{name}" for name in f"{IMAGE_SUFFIXES} {SOUND_SUFFIXES}".split())

Number = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False, strict=True)]
Whole = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Line = Annotated[str, Field(max_length=1000)]
# Of a result, each as a page can show it; its addresses and the video itself are not stored.
STORED_OUTPUT: Mapping[str, TypeAdapter[Any]] = {
    "duration_seconds": TypeAdapter(Number),
    "num_frames": TypeAdapter(Whole),
    "fps": TypeAdapter(Number),
    "width": TypeAdapter(Whole),
    "height": TypeAdapter(Whole),
    "seed": TypeAdapter(Whole),
    "warnings": TypeAdapter(Annotated[list[Line], Field(max_length=20)]),
    "size_bytes": TypeAdapter(Whole),
    "total_seconds": TypeAdapter(Number),  # of its metrics
    "cost_usd": TypeAdapter(Number),  # likewise
}
Status = Literal[
    "SENDING", "IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"
]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one job."""

    id: str  # the studio's own; the endpoint's is `job_id`
    created_at: str
    endpoint: str
    portrait: Name  # file names in the job's directory
    speech: Name | None  # None: each of the speakers in `fields` has one
    fields: dict[str, Any]  # of `input`, beside the two
    job_id: str | None = None  # None: not sent yet
    status: Status = "SENDING"
    error: dict[str, Any] | None = None  # code, message, field, retryable
    output: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL_STATUSES


_RECORD = TypeAdapter(Record)


class History:
    """The newest jobs under one directory."""

    def __init__(self, directory: Path, *, max_jobs: int = MAX_JOBS) -> None:
        self.directory = directory
        self._max_jobs = max_jobs
        if not directory.exists():
            directory.mkdir(parents=True, mode=0o700)  # portraits and voices of people

    def add(
        self,
        portrait: Path,
        speech: Path | None,
        fields: Mapping[str, Any],
        *,
        endpoint: str,
        busy: Collection[str] = (),
    ) -> Record:
        """A new record with copies of all files; the oldest ones that are not busy make room."""
        now = datetime.now(UTC)
        record = Record(
            id=f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}",  # sorts by time
            created_at=now.isoformat(timespec="seconds"),
            endpoint=endpoint,
            portrait=f"portrait{_suffix(portrait)}",
            speech=None if speech is None else f"speech{_suffix(speech)}",
            fields=dict(fields),
        )
        directory = self.directory / record.id
        directory.mkdir()
        shutil.copyfile(portrait, directory / record.portrait)
        if speech is not None and record.speech is not None:
            shutil.copyfile(speech, directory / record.speech)
        speakers: list[dict[str, Any]] = []
        for number, speaker in enumerate(fields.get("speakers", ()), 1):
            name = f"speaker-{number}{_suffix(speaker['audio'])}"
            shutil.copyfile(speaker["audio"], directory / name)
            speakers.append({**speaker, "audio": name})
        if speakers:
            record.fields["speakers"] = speakers
        _make_thumbnail(portrait, directory / "thumbnail.jpg")
        self.save(record)
        self._remove_oldest({record.id, *busy})
        return record

    def save(self, record: Record) -> None:
        """Replaces what is known of the job, in one step."""
        text = json.dumps({**asdict(record), "output": stored_output(record.output)}, indent=1)
        path = self.directory / record.id / "record.json"
        write_text(path, text, mode=0o600, shared=True)

    def get(self, record_id: str | None) -> Record | None:
        """The record; None if there is none, or a file that is none."""
        if record_id is None or not re.fullmatch(r"[\w-]+", record_id):
            return None
        path = self.directory / record_id / "record.json"
        try:
            record = _RECORD.validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None
        return replace(record, output=stored_output(record.output))

    def all(self) -> list[Record]:
        """Every job, newest first."""
        names = sorted((path.name for path in self.directory.iterdir()), reverse=True)
        return [record for name in names if (record := self.get(name))]

    def remove(self, record: Record) -> None:
        """Forgets the job and its files."""
        shutil.rmtree(self.directory / record.id)

    def portrait(self, record: Record) -> Path:
        """The portrait as it was given."""
        return self.directory / record.id / record.portrait

    def speech(self, record: Record) -> Path | None:
        """The recording as it was given; None: each speaker has one."""
        return None if record.speech is None else self.directory / record.id / record.speech

    def fields(self, record: Record) -> dict[str, Any]:
        """The job's other fields, with the recordings of its speakers as their paths."""
        directory = self.directory / record.id
        fields = dict(record.fields)
        if "speakers" in fields:
            fields["speakers"] = [
                {**speaker, "audio": directory / Path(speaker["audio"]).name}
                for speaker in fields["speakers"]
            ]
        return fields

    def video(self, record: Record) -> Path:
        """Where the video lies once the job is completed."""
        suffix = video_suffix(record.fields)
        return self.directory / record.id / f"avatar-{record.id}{suffix}"

    def thumbnail(self, record: Record) -> Path:
        """A small portrait."""
        return self.directory / record.id / "thumbnail.jpg"

    def _remove_oldest(self, busy: Collection[str]) -> None:
        for record in self.all()[self._max_jobs :]:
            if record.id not in busy:
                self.remove(record)


def stored_output(output: Mapping[str, Any]) -> dict[str, Any]:
    """What of a result can be shown; what is of another kind than a worker's is left out."""
    metrics = output.get("metrics")
    given = {**(metrics if isinstance(metrics, Mapping) else {}), **output}
    stored = {}
    for name, kind in STORED_OUTPUT.items():
        with suppress(ValidationError):
            stored[name] = kind.validate_python(given.get(name))
    return stored


def _suffix(path: Path) -> str:
    """What a browser knows the kind of media by; none for other kinds, as a page."""
    suffix = path.suffix.lower()
    return suffix if suffix in MEDIA_SUFFIXES else ""


def _make_thumbnail(portrait: Path, target: Path) -> None:
    """Writes a small square of the portrait; a grey one if it is no image that can be read.

    Whether the portrait is any good is the worker's to say.
    """
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    thumbnail = Image.new("RGB", side, "gray")
    with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        with Image.open(portrait) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGB")
        thumbnail = ImageOps.fit(upright, side, centering=(0.5, 0.3))  # a face is in the upper half
    thumbnail.save(target, quality=85)
