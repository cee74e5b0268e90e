"""Whether a bucket takes objects and gives them out, found out before anything is made.

Rights, policies, encryption and Object Lock can be asked for in no other way that all stores know
than by an upload.
"""

import logging
import re
import time
import uuid
from contextlib import suppress
from typing import Any

from avatar_client.contract.job_errors import InputDownloadError, StoreRefusedError, UploadError
from worker.media import download
from worker.media.store_client import (
    NO_PATIENCE,
    RETRYABLE_CODES,
    RETRYABLE_STATUSES,
    STORE_ERRORS,
    Patience,
    StoreClient,
    is_retryable,
)

logger = logging.getLogger(__name__)

PROOF_SECONDS = 600.0  # for how long it is believed that a store takes objects
MAX_PROOFS = 1000
READ_BACK_SECONDS = 30.0
REMOVAL = Patience(20.0)  # a stop does not end it: what hangs is left behind with its thread
CONTENT_TYPE = "application/octet-stream"

proofs: dict[str, float] = {}  # of what was proven, until when
read_stores: set[str] = set()  # stores whose addresses have been read in this process's life
conditional_stores: dict[str, bool] = {}  # whether they honour conditions, likewise


def prove(client: StoreClient, key: str, patience: Patience) -> None:
    """Returns if objects can be written beside `key` and read by their addresses.

    Writes a tiny object, reads a byte of it as a client would, and removes it. In a bucket that
    keeps whatever is written (Object Lock), an upload in parts is begun and given up instead: that
    needs the same rights and leaves nothing. What was proven is believed for some minutes; for this
    process's life, if what was written may not be removed.

    Raises:
        UploadError: the store refused or did not answer, or the address cannot be read.
    """
    folder = key.rpartition("/")[0]
    proof = client.identity(folder)
    if proofs.get(proof, 0.0) > time.monotonic():
        return
    name = f".write-test-{uuid.uuid4().hex}"
    probe = f"{folder}/{name}" if folder else name
    try:
        if _keeps_objects(client, patience):
            _begin_and_give_up(client, probe, patience)
            is_removed = True
        else:
            is_removed = _write_and_remove(client, probe, patience)
    except STORE_ERRORS as error:
        raise client.failure(error) from error
    if len(proofs) >= MAX_PROOFS:
        proofs.clear()
    proofs[proof] = time.monotonic() + PROOF_SECONDS if is_removed else float("inf")


def read_back(client: StoreClient, key: str, patience: Patience) -> None:
    """Returns if the object can be read by its address; asked once a store and process.

    Raises:
        UploadError: it cannot; says why.
    """
    store = client.identity("")
    if store not in read_stores:
        _read_a_byte(client, key, patience)
        read_stores.add(store)


def honours_conditions(client: StoreClient, key: str, patience: Patience) -> bool:
    """Whether the store writes only where nothing is, and only over what it was told; asked once.

    Some stores refuse such a write and others do it whatever is there. A bucket that keeps whatever
    is written is not asked.

    Raises:
        UploadError: the store did not answer.
    """
    store = client.identity("")
    if store not in conditional_stores:
        is_honoured = not _keeps_objects(client, patience) and _meets_conditions(
            client, f"{key}.write-test-{uuid.uuid4().hex}", patience
        )
        if not is_honoured:
            logger.warning(
                "the object store knows no conditional writes: a request that two workers get at "
                "the same time is made by both"
            )
        if len(conditional_stores) >= MAX_PROOFS:
            conditional_stores.clear()
        conditional_stores[store] = is_honoured
    return conditional_stores[store]


def _meets_conditions(client: StoreClient, key: str, patience: Patience) -> bool:
    def is_written(number: int, if_match: str | None = None) -> bool:
        if client.write_note(key, {"write": number}, patience, if_match=if_match) is not None:
            return True
        found = client.look(key, patience)  # by a try whose answer was lost
        return found is not None and found.metadata == {"write": number}

    try:
        is_honoured = (
            is_written(1)
            and not is_written(2)
            and not is_written(3, if_match=f'"{"0" * 32}"')
            and (found := client.look(key, patience)) is not None
            and is_written(4, if_match=found.etag)
        )
    except StoreRefusedError:  # it has taken an object before: so it is the condition
        is_honoured = False
    except BaseException:
        _remove(client, key, None, NO_PATIENCE)
        raise
    _remove(client, key, None, REMOVAL)
    return is_honoured


def _keeps_objects(client: StoreClient, patience: Patience) -> bool:
    """Whether the bucket locks what is written into it, as far as its store says so."""
    try:
        answer = client.call(
            lambda: client.s3.get_object_lock_configuration(Bucket=client.bucket_name),
            Patience(check=patience.check),
        )
    except STORE_ERRORS:
        return False
    return "Rule" in answer.get("ObjectLockConfiguration", {})


def _begin_and_give_up(client: StoreClient, key: str, patience: Patience) -> None:
    options = client.upload_options(CONTENT_TYPE, None)
    place: dict[str, Any] = {"Bucket": client.bucket_name, "Key": key}
    begun = client.call(lambda: client.s3.create_multipart_upload(**place, **options), patience)
    with suppress(*STORE_ERRORS):
        client.call(
            lambda: client.s3.abort_multipart_upload(**place, UploadId=begun["UploadId"]), REMOVAL
        )


def _write_and_remove(client: StoreClient, key: str, patience: Patience) -> bool:
    """Whether the store lets the object be removed again."""
    options = client.upload_options(CONTENT_TYPE, None)
    place: dict[str, Any] = {"Bucket": client.bucket_name, "Key": key}
    try:
        answer = client.call(
            lambda: client.s3.put_object(**place, Body=b"avatar", **options), patience
        )
    except BaseException as error:  # it may have been written all the same, but where it is refused
        if not isinstance(error, STORE_ERRORS) or is_retryable(error):
            _remove(client, key, None, NO_PATIENCE)
        raise
    version_id = answer.get("VersionId")
    try:
        _read_a_byte(client, key, patience)
    except StoreRefusedError:
        _remove(client, key, version_id, REMOVAL)
        raise
    except UploadError as error:  # which says nothing against the bucket
        logger.warning("it is not known whether addresses can be read: %s", error)
    except BaseException:
        _remove(client, key, version_id, NO_PATIENCE)
        raise
    return _remove(client, key, version_id, REMOVAL)


def _remove(client: StoreClient, key: str, version_id: str | None, patience: Patience) -> bool:
    """Whether the store lets the object be removed; one that does not answer might."""
    try:
        client.delete(key, version_id, patience)
    except UploadError as error:
        logger.warning("a write test was not removed: %s", error)
        return not isinstance(error, StoreRefusedError)
    return True


def _read_a_byte(client: StoreClient, key: str, patience: Patience) -> None:
    def read() -> None:
        download.require_readable(
            client.url(key, 300),
            timeout_seconds=READ_BACK_SECONDS,
            field=client.field,
            allow_private=client.allow_private,
            check=patience.check,
        )

    try:
        patience.of(read, (InputDownloadError,), lambda error: not _is_final(error))
    except InputDownloadError as error:
        kind = StoreRefusedError if _is_final(error) else UploadError
        reason = error.message if _is_final(error) or not client.field else "no answer"
        message = f"what was stored cannot be read by its address: {reason}"
        raise kind(message, field=client.field) from error


def _is_final(error: Exception) -> bool:
    if not isinstance(error, download.RefusedError) or error.status in RETRYABLE_STATUSES:
        return False
    code = re.search(rb"<Code>(\w+)</Code>", error.reason)
    return code is None or code[1].decode() not in RETRYABLE_CODES
