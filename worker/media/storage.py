"""Files to objects of an S3-compatible store, and objects to addresses.

The worker's one way to a store. `store_client` makes the calls; `store_proof` finds out before a
job whether they will do.
"""

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import InvalidInputError, StoreRefusedError
from avatar_client.contract.request import OutputOptions
from worker.media import store_client, store_proof
from worker.media.claim import Claim
from worker.media.store_client import (
    NO_PATIENCE,
    STORE_ERRORS,
    Patience,
    StoreClient,
    StoredObject,
)

# Of the operator's bucket: what clients name lies apart from what bears a job's id.
CHOSEN_FOLDER, REQUESTS_FOLDER = "chosen", "requests"
# What stores say that do not know `If-None-Match` on an upload.
UNKNOWN_CONDITION = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """Where the objects of one job lie."""

    video: str
    thumbnail: str
    gif: str
    result: str  # that the control plane did not take
    # of a request with an id of its own:
    claim: str | None = None  # while one of several workers makes it
    remembered: str | None = None  # where its video lies if its id alone says where


class ObjectExistsError(StoreRefusedError):
    """Another object has come to lie under a key that was free."""


class Storage:
    """One bucket that can be reached. Used by one thread at a time.

    Raises:
        InputUrlBlockedError: a client's endpoint that is not https or not public.
        InvalidInputError: a client's bucket whose endpoint or name is no use.
        StorageNotConfiguredError: the same of the operator's bucket.
    """

    def __init__(self, bucket: BucketSettings, *, allow_private: bool = False) -> None:
        self._settings = bucket
        self._client = StoreClient(bucket, allow_private=allow_private)
        self.bucket_name = self._client.bucket_name

    def keys(self, output: OutputOptions, job_id: str, request_id: str | None = None) -> ObjectKeys:
        """Where the objects of a job lie.

        What the worker names, it names by the request's id or else by the job's: nobody else's
        objects are there. In the operator's bucket, what bears a name that clients choose lies in
        folders of its own.

        Raises:
            InvalidInputError: a prefix that leads into such a folder.
        """
        is_shared = not self._settings.from_client
        first = (output.prefix or "").split("/")[0]
        if is_shared and first in (CHOSEN_FOLDER, REQUESTS_FOLDER):
            raise InvalidInputError(
                f"must not begin with {first!r}, where the objects lie that clients have named",
                field="output.prefix",
            )
        chosen, requests = (CHOSEN_FOLDER, REQUESTS_FOLDER) if is_shared else (None, None)
        if request_id is None:
            made = self._settings.key(output.prefix, job_id)
        else:
            made = self._settings.key(requests, output.prefix, request_id)
        video = name = f"{made}{output.video_format.suffix}"
        if output.key:
            video = self._settings.key(chosen, output.prefix, output.key)
        keys = ObjectKeys(
            video=video, thumbnail=f"{made}.jpg", gif=f"{made}.gif", result=f"{name}.json"
        )
        if request_id is None:
            return keys
        # whatever else the request says, these two follow from its id
        remembered = self._settings.key(requests, request_id)
        return replace(keys, claim=f"{remembered}.claim", remembered=f"{remembered}.mp4")

    def claim(self, keys: ObjectKeys, fingerprint: str, patience: Patience) -> Claim | None:
        """What has one worker of all make a request; None where the store cannot say who.

        Raises:
            UploadError: the store refused or did not answer.
        """
        if keys.claim is None or not store_proof.honours_conditions(
            self._client, keys.claim, patience
        ):
            return None
        client = StoreClient(self._settings, allow_private=self._client.allow_private)
        return Claim(client, keys.claim, fingerprint, is_kept=keys.video != keys.remembered)

    def put(
        self,
        path: Path,
        key: str,
        *,
        content_type: str,
        metadata: dict[str, Any] | None = None,
        patience: Patience = NO_PATIENCE,
        only_if_absent: bool = False,
    ) -> None:
        """Uploads a file. `metadata` travels as JSON in one value of the object's own metadata.

        Args:
            only_if_absent: whether an object that is there already stays, where the store knows
                `If-None-Match`. One with the same metadata was written by an earlier try.

        Raises:
            ObjectExistsError: such an object is there.
            UploadError: the store refused or did not answer.
            ValueError: metadata of more than 1,800 bytes.
        """
        options = self._client.upload_options(content_type, metadata)
        try:
            self._upload(path, key, options, patience, only_if_absent=only_if_absent)
        except STORE_ERRORS as error:
            if only_if_absent and store_client.code(error) == "PreconditionFailed":
                stored = self.head(key, patience)
                if stored is not None and stored.metadata == metadata:
                    return
                message = "another object has come to lie under the key"
                raise ObjectExistsError(message, field="output.key") from error
            store_proof.proofs.clear()  # what was proven has changed
            raise self._client.failure(error) from error

    def _upload(
        self,
        path: Path,
        key: str,
        options: dict[str, Any],
        patience: Patience,
        *,
        only_if_absent: bool,
    ) -> None:
        client = self._client
        transfer = TransferConfig(multipart_threshold=stores.MULTIPART_BYTES)

        def upload() -> None:
            client.s3.upload_file(
                str(path), self.bucket_name, key, ExtraArgs=options, Config=transfer
            )

        num_bytes = path.stat().st_size
        client.only_if_absent = only_if_absent
        try:
            client.call(upload, patience, num_bytes)
        except STORE_ERRORS as error:
            if not only_if_absent or store_client.code(error) not in UNKNOWN_CONDITION:
                raise
            client.only_if_absent = False
            client.call(upload, patience, num_bytes)
        finally:
            client.only_if_absent = False

    def delete(self, key: str, patience: Patience = NO_PATIENCE) -> None:
        """Removes an object; there need not be one.

        Raises:
            UploadError: the store refused or did not answer.
        """
        self._client.delete(key, patience=patience)

    def get(self, key: str, max_bytes: int, patience: Patience = NO_PATIENCE) -> bytes | None:
        """The content of an object, or None if there is none.

        Raises:
            UploadError: the store refused or did not answer, or the object is larger.
        """
        client = self._client

        def get() -> bytes:
            answer = client.s3.get_object(Bucket=self.bucket_name, Key=key)
            content: bytes = answer["Body"].read()  # which compares its length
            return content

        try:
            return client.call(get, patience, max_content_bytes=max_bytes)
        except STORE_ERRORS as error:
            if store_client.code(error) in store_client.MISSING:
                return None
            raise client.failure(error) from error

    def ages(self, prefix: str) -> dict[str, float]:
        """Keys below a prefix, at most a thousand, and the seconds since each was written.

        Raises:
            UploadError: the store refused or did not answer.
        """
        client = self._client
        now = datetime.now(UTC)
        try:
            answer = client.call(
                lambda: client.s3.list_objects_v2(Bucket=self.bucket_name, Prefix=prefix),
                NO_PATIENCE,
            )
            return {
                each["Key"]: (now - each["LastModified"]).total_seconds()
                for each in answer.get("Contents", [])
            }
        except STORE_ERRORS as error:
            raise client.failure(error) from error

    def head(self, key: str, patience: Patience = NO_PATIENCE) -> StoredObject | None:
        """The object under the key, or None.

        Raises:
            UploadError: the store refused the credentials or did not answer.
        """
        return self._client.look(key, patience)

    def url(self, key: str, expires_seconds: int) -> str:
        """An address from which anyone can GET the object until it expires.

        Of a public bucket (`public_base_url`): the plain address, which does not expire.
        """
        return self._client.url(key, expires_seconds)

    def expires_at(self, expires_seconds: int) -> datetime | None:
        """When a `url` made now ends; None if it does not."""
        if self._settings.public_base_url:
            return None
        return datetime.now(UTC) + timedelta(seconds=expires_seconds)

    def check(self, patience: Patience = NO_PATIENCE) -> None:
        """Returns if endpoint, region, credentials and rights work together.

        Raises:
            UploadError: they do not.
        """
        key = self._settings.key(f"check-{uuid.uuid4()}")
        self.head(key, patience)
        self.prove(key, patience)

    def prove(self, key: str, patience: Patience = NO_PATIENCE) -> None:
        """Returns if objects can be written beside `key` and read by their addresses.

        Raises:
            UploadError: the store refused or did not answer, or the address cannot be read.
        """
        store_proof.prove(self._client, key, patience)

    def read_back(self, key: str, patience: Patience = NO_PATIENCE) -> None:
        """Returns if the object can be read by its address; asked once a store and process.

        Raises:
            UploadError: it cannot; says why.
        """
        store_proof.read_back(self._client, key, patience)
