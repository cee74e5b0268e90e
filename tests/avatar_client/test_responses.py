"""What an endpoint says about a job, read."""

from typing import Any

import pytest

from avatar_client import JobError, JobStatus
from avatar_client.contract import preview
from tests.avatar_client.answers import DONE, PROGRESS, RUNNING, SECRET_URL
from tests.support.pictures import jpeg

CODES = {"IN_QUEUE": False, "IN_PROGRESS": False} | dict.fromkeys(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"), True
)


def test_a_message_of_a_worker_steers_no_terminal() -> None:
    output = {**PROGRESS, "message": "\x1b[2J\nDenoising"}
    progress = JobStatus.parse({**RUNNING, "output": output}).progress
    assert progress is not None
    assert progress.message == "[2J Denoising"


@pytest.mark.parametrize("output", [None, "text", [], {"percent": 3}, {**PROGRESS, "progress": 42}])
def test_an_odd_progress_is_no_progress(output: Any) -> None:
    assert JobStatus.parse({**RUNNING, "output": output}).progress is None


def test_a_preview_is_read_and_an_odd_one_leaves_the_progress_as_it_is() -> None:
    picture = jpeg()
    for sent, read in ((preview.to_data_url(picture), picture), ("https://example.com/a", None)):
        progress = JobStatus.parse({**RUNNING, "output": {**PROGRESS, "preview": sent}}).progress
        assert progress is not None
        assert (progress.step, progress.preview) == (PROGRESS["step"], read)


@pytest.mark.parametrize("status", list(CODES))
def test_a_job_is_over_when_nothing_changes_any_more(status: str) -> None:
    assert JobStatus.parse({"id": "a", "status": status}).is_over is CODES[status]


@pytest.mark.parametrize(
    ("error", "output", "expected"),
    [
        (
            "INVALID_INPUT: motion.pose: must be at most 100",
            None,
            JobError("INVALID_INPUT", "must be at most 100", "motion.pose"),
        ),
        (
            "GENERATION_FAILED: the GPU said: no",
            None,
            JobError("GENERATION_FAILED", "the GPU said: no", retryable=True),
        ),
        (
            "text",
            {
                "error_info": {
                    "code": "ENCODE_FAILED",
                    "message": "no room",
                    "field": None,
                    "retryable": True,
                }
            },
            JobError("ENCODE_FAILED", "no room", retryable=True),
        ),
        (
            '{"error_type": "<class \'KeyError\'>", "error_message": "no such key",'
            ' "error_traceback": "File /app/handler.py", "hostname": "h"}',
            None,
            JobError("UNKNOWN", "no such key"),
        ),
        (
            "job timed out after 1 retries",
            None,
            JobError("UNKNOWN", "job timed out after 1 retries"),
        ),
        (None, None, JobError("UNKNOWN", "the endpoint gives no reason")),
        (
            f"failed at\n{SECRET_URL}",
            None,
            JobError("UNKNOWN", "failed at https://store.example.com/a.mp4?..."),
        ),
    ],
)
def test_the_reason_of_a_failure_is_read_from_each_of_its_forms(
    error: Any, output: Any, expected: JobError
) -> None:
    assert JobError.parse(error, output) == expected


def test_a_status_shows_no_signed_address() -> None:
    status = JobStatus.parse({**DONE, "output": {"video_url": SECRET_URL}})
    assert "0123secret" not in repr(status)
