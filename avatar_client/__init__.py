"""For programs that want videos: an endpoint's jobs, from the request to the file.

    with AvatarEndpoint("ENDPOINT_ID", api_key) as endpoint:
        job = endpoint.submit(Path("portrait.jpg"), Path("speech.wav"), preset="draft")
        with progress_bar() as show:
            job.wait(on_status=show)
        job.download("video.mp4")

`AsyncAvatarEndpoint` has the same methods, awaited. The command `avatar` is the same for a shell.
What a request and a result are is said in `avatar_client.contract`.

Needs httpx, pydantic and tqdm; boto3 only for files that go through a bucket. A name below is
imported when it is first used, so that whoever imports the contract does not wait for the client.
"""

import hmac
from importlib import import_module
from typing import TYPE_CHECKING

from avatar_client.version import __version__

if TYPE_CHECKING:
    from avatar_client.contract.bucket import BucketSettings
    from avatar_client.contract.job_errors import (
        InputUrlBlockedError,
        InvalidInputError,
        UploadError,
        WorkerError,
    )
    from avatar_client.endpoint import (
        AsyncAvatarEndpoint,
        AsyncAvatarJob,
        AvatarEndpoint,
        AvatarJob,
    )
    from avatar_client.endpoint_errors import (
        AuthenticationError,
        DownloadError,
        EndpointError,
        EndpointUnavailableError,
        JobCancelledError,
        JobFailedError,
        JobNotFoundError,
        JobTimedOutError,
        RequestRefusedError,
        SignatureError,
        WaitTimeoutError,
    )
    from avatar_client.responses import JobError, JobStatus, Progress
    from avatar_client.terminal import progress_bar

__all__ = [
    "AsyncAvatarEndpoint",
    "AsyncAvatarJob",
    "AuthenticationError",
    "AvatarEndpoint",
    "AvatarJob",
    "BucketSettings",
    "DownloadError",
    "EndpointError",
    "EndpointUnavailableError",
    "InputUrlBlockedError",
    "InvalidInputError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "JobNotFoundError",
    "JobStatus",
    "JobTimedOutError",
    "Progress",
    "RequestRefusedError",
    "SignatureError",
    "UploadError",
    "WaitTimeoutError",
    "WorkerError",
    "__version__",
    "progress_bar",
    "webhook_token_matches",
]

if not TYPE_CHECKING:  # or any name would do for a type checker

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name in __all__:
            for home in ("contract", "endpoint_errors", "responses", "terminal", "endpoint"):
                module = import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def webhook_token_matches(expected: str, given: str | None) -> bool:
    """Whether a webhook's call brings the token that was put into its URL.

    Takes as long for a wrong token as for the right one. An empty expected token matches nothing.
    """
    return bool(expected) and hmac.compare_digest(expected.encode(), (given or "").encode())
