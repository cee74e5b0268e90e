"""What client and worker agree on: a request, a result, how a job fails, and where objects lie.

The worker, the local endpoint and the studio import it from here. It needs pydantic alone.
"""

from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import (
    DeadlineExceededError,
    EncodeError,
    GenerationError,
    InputDownloadError,
    InputTooLargeError,
    InputUrlBlockedError,
    InternalError,
    InvalidInputError,
    OutOfMemoryError,
    ResultTooLargeError,
    StorageNotConfiguredError,
    UnsupportedMediaError,
    UploadError,
    WorkerError,
    WorkerFailedError,
)
from avatar_client.contract.presets import PRESETS, Preset
from avatar_client.contract.redaction import redact
from avatar_client.contract.request import GenerationParams, JobInput, Motion, OutputOptions
from avatar_client.contract.result import DryRunResult, JobResult

__all__ = [
    "PRESETS",
    "BucketSettings",
    "DeadlineExceededError",
    "DryRunResult",
    "EncodeError",
    "GenerationError",
    "GenerationParams",
    "InputDownloadError",
    "InputTooLargeError",
    "InputUrlBlockedError",
    "InternalError",
    "InvalidInputError",
    "JobInput",
    "JobResult",
    "Motion",
    "OutOfMemoryError",
    "OutputOptions",
    "Preset",
    "ResultTooLargeError",
    "StorageNotConfiguredError",
    "UnsupportedMediaError",
    "UploadError",
    "WorkerError",
    "WorkerFailedError",
    "redact",
]
