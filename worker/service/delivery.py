"""How a finished video reaches the client: through a bucket or inside the reply.

Decided before anything is generated, so that a job that cannot be delivered costs no GPU time.
A job's object carries the job's fingerprint and the metadata of its video: a job that the queue
hands out twice, or whose result was lost on the way, is answered from the bucket.
"""

import base64
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avatar_client.contract.formats import FORMATS
from avatar_client.contract.job_errors import (
    InvalidInputError,
    ResultTooLargeError,
    StorageNotConfiguredError,
    UploadError,
)
from avatar_client.contract.request import MAX_SEED
from avatar_client.contract.speakers import MAX_SPEAKERS
from worker.media.claim import ANOTHER_REQUEST, Claim
from worker.media.gif import MAX_GIF_BYTES
from worker.media.provenance import Provenance
from worker.media.storage import ObjectExistsError, ObjectKeys, Storage
from worker.media.store_client import NO_PATIENCE, Patience, StoredObject
from worker.media.video import VideoFile
from worker.own_directory import own_directory
from worker.service.job_request import Fingerprint, JobRequest
from worker.settings import Settings

logger = logging.getLogger(__name__)

KEPT_RESULT_RETRY_SECONDS = 20.0  # for a store that stumbles as the platform does
MIN_BYTES_PER_SECOND = 60_000  # of video inside a reply; below it a face falls apart
# What may come with a video, and lies beside it.
PICTURES = {"thumbnail": "image/jpeg", "gif": "image/gif"}
NO_ADDRESS = dict.fromkeys(
    (
        "video_url",
        "video_base64",
        "thumbnail_url",
        "thumbnail_base64",
        "gif_url",
        "gif_base64",
        "bucket",
        "key",
        "expires_at",
    )
)


NOT_OF_THE_REPLY = {"fingerprint", "content_fingerprint", *PICTURES}


class _StoredSpeaker(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    face_box: Annotated[list[float], Field(min_length=4, max_length=4)] | None
    start_seconds: Annotated[float, Field(ge=0)]
    duration_seconds: Annotated[float, Field(gt=0)]


class _StoredRecord(BaseModel):
    """What a video's object says of it: the metadata of its reply, and whose it is.

    Whoever can write to the bucket can write one, so nothing else of an object enters a reply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    fingerprint: str
    content_fingerprint: str = ""
    thumbnail: bool
    gif: bool = False
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=1)]
    duration_seconds: Annotated[float, Field(gt=0)]
    num_frames: Annotated[int, Field(ge=1)]
    fps: Annotated[float, Field(gt=0)]
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    provenance: Provenance = "metadata"
    speakers: Annotated[list[_StoredSpeaker], Field(min_length=1, max_length=MAX_SPEAKERS)]
    warnings: list[str]

    @property
    def pictures(self) -> list[str]:
        """Those of `PICTURES` that lie beside the video."""
        return [name for name in PICTURES if getattr(self, name)]

    def is_of(self, fingerprint: Fingerprint) -> bool:
        """Whether the video was made for this request."""
        return self.fingerprint == fingerprint.sent or (
            fingerprint.content is not None and self.content_fingerprint == fingerprint.content
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where the video of one job goes. Without storage it goes into the reply."""

    storage: Storage | None
    keys: ObjectKeys
    expires_seconds: int
    max_inline_characters: int
    content_type: str = FORMATS["mp4"].content_type  # of the video
    is_key_chosen: bool = False  # by the client; else it follows from the request's or job's id
    may_overwrite: bool = False  # another job's object under the key
    may_fall_back: bool = False  # to the reply, if the store stays away
    patience: Patience = NO_PATIENCE

    @classmethod
    def from_request(
        cls, request: JobRequest, settings: Settings, patience: Patience = NO_PATIENCE
    ) -> "Delivery":
        """The delivery that the request asks for and the settings allow.

        `patience` is what the store is given in all later calls.

        Raises:
            StorageNotConfiguredError: a bucket was asked for and none is set up.
            InputUrlBlockedError: the client's bucket lies at an address that must not be contacted.
            InvalidInputError: as `Storage` and its `keys`; a request with an id that keeps nothing.
        """
        options = request.input.output
        bucket = request.bucket or settings.bucket
        request_id = request.input.request_id
        if request_id is not None and bucket is None:
            raise StorageNotConfiguredError(
                "needs a bucket, which remembers the request: set BUCKET_* on the endpoint, send "
                "s3Config, or leave it out",
                field="request_id",
            )
        if request_id is not None and options.delivery == "inline":
            raise InvalidInputError(
                "needs the video in the bucket, which remembers the request: let output.delivery "
                "be 's3' or 'auto', or leave it out",
                field="request_id",
            )
        if options.delivery == "s3" and bucket is None:
            raise StorageNotConfiguredError(
                "no bucket is set up: set BUCKET_* on the endpoint or send s3Config",
                field="output.delivery",
            )
        storage = None
        if bucket is not None and options.delivery != "inline":
            allow_private = settings.runpod_allow_private_download_urls
            storage = Storage(bucket, allow_private=allow_private)
        return cls(
            storage=storage,
            keys=(
                storage.keys(options, request.job_id, request_id)
                if storage
                else ObjectKeys("", "", "", "")
            ),
            expires_seconds=options.url_expires_seconds or settings.bucket_url_expires_seconds,
            max_inline_characters=request.max_inline_characters
            - (4 * MAX_GIF_BYTES // 3 if options.gif else 0),
            content_type=options.video_format.content_type,
            is_key_chosen=options.key is not None,
            may_overwrite=options.overwrite and settings.allow_overwrite,
            may_fall_back=options.delivery == "auto",
            patience=patience,
        )

    @property
    def max_bytes(self) -> int | None:
        """The largest video that can be delivered; None: any."""
        return None if self.storage else self.max_inline_characters * 3 // 4

    def require_fits_reply(self, duration_seconds: float) -> None:
        """Returns if a video of this length can be delivered; through a bucket any can.

        Raises:
            ResultTooLargeError: it does not fit into the reply.
        """
        if self.max_bytes is not None and self.max_bytes < MIN_BYTES_PER_SECOND * duration_seconds:
            raise ResultTooLargeError(
                f"{duration_seconds:.1f} s of video do not fit into the reply; set up a bucket",
                field="output.delivery",
            )

    def describe(self) -> dict[str, Any]:
        """For a dry run."""
        return (
            {"delivery": "s3", "key": self.keys.video} if self.storage else {"delivery": "inline"}
        )

    def prove(self) -> None:
        """Returns if the bucket takes objects and gives them out again.

        Raises:
            UploadError: it does not, or did not answer.
        """
        if self.storage is not None:
            self.storage.prove(self.keys.video, self.patience)

    def find_existing(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """The video of an earlier run of this very request, as its reply told it; None: none yet.

        Raises:
            InvalidInputError: under the key that the client chose lies what this job may not
                replace, or another request has the same id.
            UploadError: the store refused the credentials or did not answer.
        """
        if self.storage is None:
            return None
        for key in dict.fromkeys((self.keys.video, self.keys.remembered or self.keys.video)):
            stored = self.storage.head(key, self.patience)
            if stored is None:
                continue
            record = _record(stored)
            if key == self.keys.video and record is not None and record.is_of(fingerprint):
                metadata = record.model_dump(exclude=NOT_OF_THE_REPLY)
                return metadata | self._addresses(record.pictures)
            self._require_own(key, fingerprint)
        return None

    def _require_own(self, key: str, fingerprint: Fingerprint) -> None:
        """Returns if what lies there, and is another's, says nothing against this job.

        Raises:
            InvalidInputError: it does.
        """
        if self.keys.remembered is not None and fingerprint.content is None:
            return  # it may prove to be the same request once its inputs are here
        if key == self.keys.remembered:
            raise InvalidInputError(ANOTHER_REQUEST, field="request_id")
        if self.is_key_chosen and not self.may_overwrite:
            raise InvalidInputError(
                "another object lies there already; choose another key, or let "
                "output.overwrite be true where the endpoint allows it",
                field="output.key",
            )

    def claim(self, fingerprint: Fingerprint) -> Claim | None:
        """What has one worker of all make this request; None: nobody else can have it.

        Raises:
            UploadError: the store refused or did not answer.
        """
        if self.storage is None or self.keys.claim is None:
            return None
        assert fingerprint.content is not None
        return self.storage.claim(self.keys, fingerprint.content, self.patience)

    def drop_claim(self) -> None:
        """Removes a claim that is of no use any more, because the video is there.

        Where the claim is what remembers the request, it stays.
        """
        if self.storage is None or self.keys.claim is None:
            return
        if self.keys.video == self.keys.remembered:
            with suppress(UploadError):  # without the right to, it stays and does no harm
                if self.storage.head(self.keys.claim, self.patience) is not None:
                    self.storage.delete(self.keys.claim, self.patience)

    def deliver(
        self,
        video: VideoFile,
        pictures: Mapping[str, Path],  # those of `PICTURES` that were asked for
        fingerprint: Fingerprint,
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        """The part of the reply that says where the video is, once it is there.

        A store that stays away is waited for; then a video that fits goes into the reply. Where
        another worker has put the video of the same request there meanwhile, it is that one.

        Raises:
            UploadError: the store refused it or did not answer, and it does not fit.
        """
        if self.storage is None:
            return self._inline(video, pictures)
        try:
            return self._found_meanwhile(fingerprint) or self._upload(
                self.storage, video, pictures, fingerprint, metadata
            )
        except (UploadError, InvalidInputError) as error:
            if isinstance(error, ObjectExistsError) and (
                existing := self._found_meanwhile(fingerprint)
            ):
                return existing
            fits = 4 * -(-video.size_bytes // 3) <= self.max_inline_characters
            if not self.may_fall_back or not fits:
                raise
            logger.warning("delivered inside the reply: %s", error)
            warning = f"the bucket did not take the video, so it is in the reply: {error.message}"
            warnings = [*metadata["warnings"], warning]
            return self._inline(video, pictures) | {"warnings": warnings}

    def _found_meanwhile(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """The video of this very request if another worker has put it there; else None."""
        existing = self.find_existing(fingerprint) if self.keys.claim is not None else None
        return existing and existing | {"reused": True}

    def _upload(
        self,
        storage: Storage,
        video: VideoFile,
        pictures: Mapping[str, Path],
        fingerprint: Fingerprint,
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        for name, path in pictures.items():
            storage.put(path, self._key(name), content_type=PICTURES[name], patience=self.patience)
        # the video last: whoever finds it finds the whole result
        stored = metadata | {
            "fingerprint": fingerprint.sent,
            "content_fingerprint": fingerprint.content or "",
            **{name: name in pictures for name in PICTURES},
        }
        storage.put(
            video.path,
            self.keys.video,
            content_type=self.content_type,
            metadata=stored,
            patience=self.patience,
            only_if_absent=(
                not self.may_overwrite if self.is_key_chosen else self.keys.claim is not None
            ),
        )
        storage.read_back(self.keys.video, self.patience)
        return self._addresses(pictures)

    def keep_result(self, payload: dict[str, Any]) -> str | None:
        """Where the result lies in the bucket from now on; None: it could not be put there."""
        if self.storage is None:
            return None
        with own_directory("job") as directory:
            path = directory / "result.json"
            path.write_text(json.dumps(payload))
            try:
                self.storage.put(
                    path,
                    self.keys.result,
                    content_type="application/json",
                    patience=Patience(KEPT_RESULT_RETRY_SECONDS),
                )
            except UploadError as error:
                logger.warning("the result was not kept either: %s", error)
                return None
        return f"in the bucket {self.storage.bucket_name} under {self.keys.result}"

    def drop_kept_result(self) -> None:
        """Removes what `keep_result` has put there; what cannot be removed stays."""
        if self.storage is not None:
            with suppress(UploadError):
                self.storage.delete(self.keys.result, Patience(KEPT_RESULT_RETRY_SECONDS))

    def _key(self, picture: str) -> str:
        key: str = getattr(self.keys, picture)
        return key

    def _addresses(self, pictures: Iterable[str]) -> dict[str, Any]:
        assert self.storage is not None
        expires_at = self.storage.expires_at(self.expires_seconds)
        urls = {
            f"{name}_url": self.storage.url(self._key(name), self.expires_seconds)
            for name in pictures
        }
        return NO_ADDRESS | {
            "delivery": "s3",
            "video_url": self.storage.url(self.keys.video, self.expires_seconds),
            **urls,
            "bucket": self.storage.bucket_name,
            "key": self.keys.video,
            "expires_at": f"{expires_at:%Y-%m-%dT%H:%M:%SZ}" if expires_at else None,
        }

    def _inline(self, video: VideoFile, pictures: Mapping[str, Path]) -> dict[str, Any]:
        return NO_ADDRESS | {
            "delivery": "inline",
            "video_base64": _base64_of(video.path),
            **{f"{name}_base64": _base64_of(path) for name, path in pictures.items()},
        }


def _record(stored: StoredObject) -> _StoredRecord | None:
    """What the object says of itself; None if it is none of ours, or another size."""
    try:
        record = _StoredRecord.model_validate(stored.metadata)
    except ValidationError:
        return None
    return record if record.size_bytes == stored.size_bytes else None


def _base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
