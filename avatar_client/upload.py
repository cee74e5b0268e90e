"""Inputs that are too large for a request, on their way through a bucket of the caller's own.

Needs boto3, which most callers do without: `pip install 'avatar-client[uploads]'`.
"""

import io
import secrets
from pathlib import Path

from avatar_client.contract import bucket as stores
from avatar_client.contract.bucket import BucketSettings
from avatar_client.endpoint_errors import EndpointError

EXPIRES_SECONDS = 86_400  # how long a job may wait in the queue


def upload(content: Path | bytes, bucket: BucketSettings) -> str:
    """The address from which the worker can fetch the content.

    Raises:
        EndpointError: boto3 is not installed.
        OSError: the file cannot be read.
        StorageNotConfiguredError: the bucket's endpoint or name is no use.
        UploadError: the bucket refused the content or did not answer.
    """
    try:
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        from avatar_client.contract.bucket_session import session
    except ModuleNotFoundError:
        raise EndpointError("an upload needs boto3: pip install 'avatar-client[uploads]'") from None
    store = session().client(
        "s3", config=Config(**stores.client_config(bucket)), **stores.client_arguments(bucket)
    )
    name = stores.locate(bucket).name
    key = bucket.key("inputs", secrets.token_hex(16))
    options = stores.upload_options(bucket, "application/octet-stream")
    transfer = TransferConfig(multipart_threshold=stores.MULTIPART_BYTES)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        try:
            store.upload_fileobj(file, name, key, ExtraArgs=options, Config=transfer)
        except ClientError as error:
            raise stores.upload_error(error, str(error.response["Error"]["Code"])) from error
        except BotoCoreError as error:
            raise stores.upload_error(error) from error
    return bucket.public_url(key) or store.generate_presigned_url(
        "get_object", Params={"Bucket": name, "Key": key}, ExpiresIn=EXPIRES_SECONDS
    )
