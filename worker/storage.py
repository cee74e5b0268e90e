"""Files to objects of an S3-compatible store, and objects to addresses."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from worker.schema import OutputOptions
from worker.settings import BucketSettings


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there already."""

    size_bytes: int
    facts: dict[str, Any]  # what `put` was given; empty for an object of other origin


class Storage:
    """One bucket.

    Raises:
        InputUrlBlockedError: a client's endpoint that is not https or not public.
        InvalidInputError: a client's bucket without a name.
        StorageNotConfiguredError: the operator's bucket without a name.
    """

    def __init__(self, bucket: BucketSettings, *, allow_private: bool = False) -> None:
        self.bucket_name = ""
        raise NotImplementedError

    def key(self, output: OutputOptions, job_id: str) -> str:
        """Where the video of a job lies: prefixes, then the key asked for or `<job id>.mp4`."""
        raise NotImplementedError

    def put(
        self, path: Path, key: str, *, content_type: str, facts: dict[str, Any] | None = None
    ) -> None:
        """Uploads a file. `facts` travels as JSON in the object's metadata, 1,800 bytes at most.

        Raises:
            UploadError: the store refused or did not answer.
            ValueError: facts too long.
        """
        raise NotImplementedError

    def head(self, key: str) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        raise NotImplementedError

    def url(self, key: str, expires_seconds: int) -> str:
        """An address from which anyone can GET the object until it expires.

        Of a public bucket (`public_base_url`): the plain address, which does not expire.
        """
        raise NotImplementedError

    def expires_at(self, expires_seconds: int) -> datetime | None:
        """When a `url` made now ends; None if it does not."""
        raise NotImplementedError

    def check(self) -> None:
        """Returns if endpoint, bucket and credentials work together; writes nothing.

        Raises:
            UploadError: they do not.
        """
        raise NotImplementedError


def thumbnail_key(key: str) -> str:
    """Where the thumbnail of the video under `key` lies."""
    return key.removesuffix(".mp4") + ".jpg"
