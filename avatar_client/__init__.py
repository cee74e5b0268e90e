"""For programs that want videos: an endpoint's jobs, from the request to the file.

    with AvatarEndpoint("ENDPOINT_ID", api_key) as endpoint:
        job = endpoint.submit(Path("portrait.jpg"), Path("speech.wav"), preset="draft")
        with progress_bar() as show:
            job.wait(on_status=show)
        job.download("video.mp4")

`AsyncAvatarEndpoint` has the same methods, awaited. `python -m avatar_client` is the same for a
shell. Needs httpx, pydantic and tqdm; boto3 only for files that go through a bucket.
"""

import hmac

from avatar_client.endpoint import AsyncAvatarEndpoint, AsyncAvatarJob, AvatarEndpoint, AvatarJob
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
    "DownloadError",
    "EndpointError",
    "EndpointUnavailableError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "JobNotFoundError",
    "JobStatus",
    "JobTimedOutError",
    "Progress",
    "RequestRefusedError",
    "WaitTimeoutError",
    "progress_bar",
    "webhook_token_matches",
]


def webhook_token_matches(expected: str, given: str | None) -> bool:
    """Whether a webhook's call brings the token that was put into its URL.

    Takes as long for a wrong token as for the right one. An empty expected token matches nothing.
    """
    return bool(expected) and hmac.compare_digest(expected.encode(), (given or "").encode())
