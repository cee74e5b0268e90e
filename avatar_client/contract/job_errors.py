"""Every way in which a job can fail: one tree, each class with its code.

A library's exception becomes one of these at the call that raises it. The message is written for
the client: it names the field and the limit, and never a path, a host, a credential or a query.

    WorkerError
    |- InvalidInputError          INVALID_INPUT           the request itself is wrong
    |- InputUrlBlockedError       INPUT_URL_BLOCKED       an address that must not be fetched
    |- InputDownloadError         INPUT_DOWNLOAD_FAILED   DNS, HTTP status, timeout
    |- InputTooLargeError         INPUT_TOO_LARGE         bytes, pixels, seconds
    |- UnsupportedMediaError      UNSUPPORTED_MEDIA       not an image, no sound in it
    |- OutOfMemoryError           OUT_OF_MEMORY           the GPU is too small for the request
    |- GenerationError            GENERATION_FAILED       the model failed
    |- EncodeError                ENCODE_FAILED           the mp4 could not be written
    |- UploadError                UPLOAD_FAILED           the object store refused or did not answer
    |- StorageNotConfiguredError  STORAGE_NOT_CONFIGURED  delivery "s3" without a bucket
    |- ResultTooLargeError        RESULT_TOO_LARGE        inline delivery over the platform's limit
    |- WorkerFailedError          WORKER_FAILED           the worker's own disk or memory
    |- DeadlineExceededError      DEADLINE_EXCEEDED       the operator's own time limit
    `- InternalError              INTERNAL                anything unforeseen
"""

from typing import Any, ClassVar


class WorkerError(Exception):
    """A failure with a stable code, told to the client.

    Args:
        message: one sentence for the client.
        field: the request field it concerns, dotted ("output.key"), if there is one.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False
    refresh_worker: ClassVar[bool] = False  # True: the process may be damaged, ask for a fresh one

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{self.code}: {where}{self.message}"

    def to_output(self, *, stage: str | None = None) -> dict[str, Any]:
        """What the handler returns: a string `error` (a dict there is lost) and the same as data.

        `stage` is the stage of the job that failed.
        """
        output: dict[str, Any] = {
            "error": str(self),
            "error_info": {
                "code": self.code,
                "message": self.message,
                "field": self.field,
                "retryable": self.retryable,
                "stage": stage,
            },
        }
        if self.refresh_worker:
            output["refresh_worker"] = True  # the SDK takes it out and recycles the worker
        return output


class InvalidInputError(WorkerError):
    """The request itself is wrong."""

    code = "INVALID_INPUT"


class InputUrlBlockedError(WorkerError):
    """An address that the worker must not contact."""

    code = "INPUT_URL_BLOCKED"


class InputDownloadError(WorkerError):
    """An input could not be fetched."""

    code = "INPUT_DOWNLOAD_FAILED"
    retryable = True


class InputTooLargeError(WorkerError):
    """An input is over a limit of bytes, pixels or seconds."""

    code = "INPUT_TOO_LARGE"


class UnsupportedMediaError(WorkerError):
    """An input that is no image, or holds no sound."""

    code = "UNSUPPORTED_MEDIA"


class OutOfMemoryError(WorkerError):
    """The GPU is too small for the request."""

    code = "OUT_OF_MEMORY"
    refresh_worker = True


class GenerationError(WorkerError):
    """The model failed."""

    code = "GENERATION_FAILED"
    retryable = True


class GpuFaultError(GenerationError):
    """The CUDA context is broken: no later job can run in this process."""

    refresh_worker = True


class EncodeError(WorkerError):
    """The mp4 could not be written."""

    code = "ENCODE_FAILED"
    retryable = True


class UploadError(WorkerError):
    """The object store refused the file or did not answer."""

    code = "UPLOAD_FAILED"
    retryable = True


class StoreRefusedError(UploadError):
    """The object store refused, and would again."""

    retryable = False


class StorageNotConfiguredError(WorkerError):
    """Delivery to a bucket was asked for and none is set up."""

    code = "STORAGE_NOT_CONFIGURED"


class ResultTooLargeError(WorkerError):
    """The video does not fit into the platform's reply."""

    code = "RESULT_TOO_LARGE"


class WorkerFailedError(WorkerError):
    """The worker's own disk or memory is the cause: another worker serves the same job."""

    code = "WORKER_FAILED"
    retryable = True
    refresh_worker = True


class DeadlineExceededError(WorkerError):
    """The operator's own time limit passed."""

    code = "DEADLINE_EXCEEDED"


class InternalError(WorkerError):
    """Anything unforeseen; the reference finds the traceback in the worker's log."""

    code = "INTERNAL"
    retryable = True
