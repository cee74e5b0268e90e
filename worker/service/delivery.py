"""How a finished video reaches the client: through a bucket or inside the reply.

Decided before anything is generated, so that a job that cannot be handed over costs no GPU time.
A job's object carries the job's fingerprint and the facts of its result: a job that the queue
delivers twice, or whose result was lost on the way, is answered from the bucket.
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
OWN_FACTS = ("fingerprint", "thumbnail")  # stored beside the facts of the reply
NOWHERE = dict.fromkeys(
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
    def choose(cls, request: JobRequest, settings: Settings) -> "Delivery":
        """The delivery that the request asks for and the settings allow.

        Raises:
            StorageNotConfiguredError: a bucket was asked for and none is set up.
            InputUrlBlockedError: the client's bucket lies at an address that must not be contacted.
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
        """The largest video that can be handed over; None: any."""
        return None if self.storage else self.max_inline_characters * 3 // 4

    def require_room(self, duration_seconds: float) -> None:
        """Passes if a video of this length can be handed over.

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

    def recall(self, fingerprint: str) -> dict[str, Any] | None:
        """What the reply of an earlier run of this very job said; None if there was none."""
        stored = self.storage.head(self.key) if self.storage else None
        if stored is None or stored.facts.get("fingerprint") != fingerprint:
            return None
        facts = {name: stored.facts[name] for name in stored.facts if name not in OWN_FACTS}
        return facts | self._addresses(has_thumbnail=stored.facts["thumbnail"])

    def hand_over(
        self,
        video: VideoFile,
        thumbnail_path: Path | None,
        fingerprint: str,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Stores or encodes the video; the part of the reply that says where it is.

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
        own_facts = {"fingerprint": fingerprint, "thumbnail": has_thumbnail}
        self.storage.put(video.path, self.key, content_type="video/mp4", facts=facts | own_facts)
        return self._addresses(has_thumbnail=has_thumbnail)

    def _addresses(self, *, has_thumbnail: bool) -> dict[str, Any]:
        assert self.storage is not None
        expires_at = self.storage.expires_at(self.expires_seconds)
        thumbnail_url = self.storage.url(thumbnail_key(self.key), self.expires_seconds)
        return NOWHERE | {
            "delivery": "s3",
            "video_url": self.storage.url(self.key, self.expires_seconds),
            "thumbnail_url": thumbnail_url if has_thumbnail else None,
            "bucket": self.storage.bucket_name,
            "key": self.key,
            "expires_at": f"{expires_at:%Y-%m-%dT%H:%M:%SZ}" if expires_at else None,
        }

    def _inline(self, video: VideoFile, thumbnail_path: Path | None) -> dict[str, Any]:
        encoded = base64.b64encode(video.path.read_bytes()).decode()
        picture = thumbnail_path and base64.b64encode(thumbnail_path.read_bytes()).decode()
        return NOWHERE | {
            "delivery": "inline",
            "video_base64": encoded,
            "thumbnail_base64": picture,
        }
