"""How a finished video reaches the client: through a bucket or inside the reply.

Decided before anything is generated, so that a job that cannot be delivered costs no GPU time.
A job's object carries the job's fingerprint and the metadata of its video: a job that the queue
hands out twice, or whose result was lost on the way, is answered from the bucket.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar_client.contract.job_errors import ResultTooLargeError, StorageNotConfiguredError
from worker.media.storage import Storage, thumbnail_key
from worker.media.video import VideoFile
from worker.service.job_request import JobRequest
from worker.settings import Settings

MIN_BYTES_PER_SECOND = 60_000  # of video inside a reply; below it a face falls apart
OWN_METADATA = ("fingerprint", "thumbnail")  # stored beside the metadata of the reply
NO_ADDRESS = dict.fromkeys(
    (
        "video_url",
        "video_base64",
        "thumbnail_url",
        "thumbnail_base64",
        "bucket",
        "key",
        "expires_at",
    )
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where the video of one job goes. Without storage it goes into the reply."""

    storage: Storage | None
    key: str
    expires_seconds: int
    max_inline_characters: int

    @classmethod
    def from_request(cls, request: JobRequest, settings: Settings) -> "Delivery":
        """The delivery that the request asks for and the settings allow.

        Raises:
            StorageNotConfiguredError: a bucket was asked for and none is set up.
            InputUrlBlockedError: the client's bucket lies at an address that must not be contacted.
            InputDownloadError, InvalidInputError: as `Storage`.
        """
        options = request.input.output
        bucket = request.bucket or settings.bucket
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
            key=storage.key(options, request.job_id) if storage else "",
            expires_seconds=options.url_expires_seconds or settings.bucket_url_expires_seconds,
            max_inline_characters=request.max_inline_characters,
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
        return {"delivery": "s3", "key": self.key} if self.storage else {"delivery": "inline"}

    def find_existing(self, fingerprint: str) -> dict[str, Any] | None:
        """The video of an earlier run of this very job, as its reply told it; None: there is none.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        stored = self.storage.head(self.key) if self.storage else None
        if stored is None or stored.metadata.get("fingerprint") != fingerprint:
            return None
        metadata = {
            name: value for name, value in stored.metadata.items() if name not in OWN_METADATA
        }
        return metadata | self._addresses(has_thumbnail=stored.metadata["thumbnail"])

    def deliver(
        self,
        video: VideoFile,
        thumbnail_path: Path | None,
        fingerprint: str,
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        """The part of the reply that says where the video is, once it is there.

        Raises:
            UploadError: the store refused it or did not answer.
        """
        if self.storage is None:
            return self._inline(video, thumbnail_path)
        has_thumbnail = thumbnail_path is not None
        if thumbnail_path is not None:
            key = thumbnail_key(self.key)
            self.storage.put(thumbnail_path, key, content_type="image/jpeg")
        # the video last: whoever finds it finds the whole result
        stored = metadata | {"fingerprint": fingerprint, "thumbnail": has_thumbnail}
        self.storage.put(video.path, self.key, content_type="video/mp4", metadata=stored)
        return self._addresses(has_thumbnail=has_thumbnail)

    def _addresses(self, *, has_thumbnail: bool) -> dict[str, Any]:
        assert self.storage is not None
        expires_at = self.storage.expires_at(self.expires_seconds)
        thumbnail_url = self.storage.url(thumbnail_key(self.key), self.expires_seconds)
        return NO_ADDRESS | {
            "delivery": "s3",
            "video_url": self.storage.url(self.key, self.expires_seconds),
            "thumbnail_url": thumbnail_url if has_thumbnail else None,
            "bucket": self.storage.bucket_name,
            "key": self.key,
            "expires_at": f"{expires_at:%Y-%m-%dT%H:%M:%SZ}" if expires_at else None,
        }

    def _inline(self, video: VideoFile, thumbnail_path: Path | None) -> dict[str, Any]:
        return NO_ADDRESS | {
            "delivery": "inline",
            "video_base64": _base64_of(video.path),
            "thumbnail_base64": _base64_of(thumbnail_path) if thumbnail_path else None,
        }


def _base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
