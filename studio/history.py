"""The studio's jobs on disk: a directory for each, with its inputs, its video and what is known.

    <directory>/<id>/record.json  portrait.*  speech.*  thumbnail.jpg  avatar-<id>.mp4

It holds no key and no address of a result, which may carry a signature.
"""

import json
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from worker.atomic_file import write_text

MAX_JOBS = 24
THUMBNAIL_SIDE = 240  # px
FINAL_STATUSES = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

# Of a result; its addresses and the video itself are not stored.
STORED_OUTPUT_FIELDS = (
    "duration_seconds",
    "num_frames",
    "fps",
    "width",
    "height",
    "seed",
    "warnings",
    "parameters",
    "size_bytes",
    "metrics",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one job."""

    id: str  # the studio's own; the endpoint's is `job_id`
    created_at: str
    endpoint: str
    portrait: str  # file names in the job's directory
    speech: str
    fields: dict[str, Any]  # of `input`, without the media
    job_id: str | None = None  # None: not sent yet
    status: str = "SENDING"
    error: dict[str, Any] | None = None  # code, message, field, retryable
    output: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL_STATUSES


class History:
    """The newest jobs under one directory."""

    def __init__(self, directory: Path, *, max_jobs: int = MAX_JOBS) -> None:
        self.directory = directory
        self._max_jobs = max_jobs
        directory.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        portrait: Path,
        speech: Path,
        fields: Mapping[str, Any],
        *,
        endpoint: str,
        busy: Collection[str] = (),
    ) -> Record:
        """A new record with copies of both inputs; the oldest ones that are not busy make room."""
        now = datetime.now(UTC)
        record = Record(
            id=f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}",  # sorts by time
            created_at=now.isoformat(timespec="seconds"),
            endpoint=endpoint,
            portrait=f"portrait{_suffix(portrait)}",
            speech=f"speech{_suffix(speech)}",
            fields=dict(fields),
        )
        directory = self.directory / record.id
        directory.mkdir()
        shutil.copyfile(portrait, directory / record.portrait)
        shutil.copyfile(speech, directory / record.speech)
        _make_thumbnail(portrait, directory / "thumbnail.jpg")
        self.save(record)
        self._remove_oldest({record.id, *busy})
        return record

    def save(self, record: Record) -> None:
        """Replaces what is known of the job, in one step."""
        stored = {key: record.output[key] for key in STORED_OUTPUT_FIELDS if key in record.output}
        text = json.dumps({**asdict(record), "output": stored}, indent=1)
        path = self.directory / record.id / "record.json"
        write_text(path, text, mode=0o600, shared=True)

    def get(self, record_id: str | None) -> Record | None:
        """The record; None if there is none, or a file that is none."""
        if record_id is None or not re.fullmatch(r"[\w-]+", record_id):
            return None
        path = self.directory / record_id / "record.json"
        try:
            content = json.loads(path.read_text())
            return Record(**{each.name: content[each.name] for each in fields(Record)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

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

    def speech(self, record: Record) -> Path:
        """The recording as it was given."""
        return self.directory / record.id / record.speech

    def video(self, record: Record) -> Path:
        """Where the video lies once the job is completed."""
        return self.directory / record.id / f"avatar-{record.id}.mp4"

    def thumbnail(self, record: Record) -> Path:
        """A small portrait."""
        return self.directory / record.id / "thumbnail.jpg"

    def _remove_oldest(self, busy: Collection[str]) -> None:
        for record in self.all()[self._max_jobs :]:
            if record.id not in busy:
                self.remove(record)


def _suffix(path: Path) -> str:
    return path.suffix.lower() if re.fullmatch(r"\.\w{1,8}", path.suffix) else ""


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
