"""Every failure that a caller of an endpoint can meet, beside those of the request itself.

What is wrong with a request is said by `InvalidInputError` and its siblings in
`avatar_client.contract.job_errors`, before anything is sent. No message holds a key, a query of a
URL, or a traceback.

    EndpointError
    |- AuthenticationError       the endpoint does not take the API key
    |- JobNotFoundError          no such job, or no longer
    |- RequestRefusedError       the endpoint does not take the request
    |- EndpointUnavailableError  no answer, or none that can be read
    |- JobFailedError            the worker said why
    |- JobCancelledError
    |- JobTimedOutError          over its execution timeout
    |- SignatureError            a result that the worker has not signed
    |- WaitTimeoutError          over the caller's own limit; the job goes on
    `- DownloadError             no video, or not the one that the worker made
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which raises one of these
    from avatar_client.responses import JobError


class EndpointError(Exception):
    """A failure on the way to a video."""


class AuthenticationError(EndpointError):
    """The endpoint does not take the API key."""


class JobNotFoundError(EndpointError):
    """No such job, or no longer: the platform keeps a result for 30 minutes."""


class RequestRefusedError(EndpointError):
    """The endpoint does not take the request: too large, malformed, too many of them."""


class EndpointUnavailableError(EndpointError):
    """No answer, or none that can be read."""


class JobFailedError(EndpointError):
    """The job failed; `code`, `message`, `field` and `retryable` are the worker's."""

    def __init__(self, job_id: str, error: "JobError") -> None:
        super().__init__(f"job {job_id} failed: {error}")
        self.job_id = job_id
        self.code = error.code
        self.message = error.message
        self.field = error.field
        self.retryable = error.retryable


class JobCancelledError(EndpointError):
    """Somebody cancelled the job."""


class JobTimedOutError(EndpointError):
    """The platform ended the job."""


class SignatureError(EndpointError, ValueError):
    """A result that is not what the worker has signed for this job, or no longer counts."""


class WaitTimeoutError(EndpointError, TimeoutError):
    """The job goes on, but the caller does not wait any longer."""


class DownloadError(EndpointError):
    """No video, or not the one that the worker made."""
