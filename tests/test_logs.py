import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from avatar_client.contract.bucket import BucketSettings
from tests.conftest import BucketServer
from worker import logs
from worker.media.storage import Storage

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture
def configured() -> Iterator[Callable[..., Any]]:
    """`configured(level)` sets the log up; afterwards everything is as it was."""
    names = [None, *logs.CHATTY]
    before = [
        (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in names
    ]
    yield logs.configure
    for name, (level, handlers) in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers


def test_an_event_is_one_line_with_the_jobs_id(
    configured: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    configured("INFO")
    logs.job_id.set("job-7")

    logging.getLogger("worker.service.worker").info("first\nsecond %s", "https://h/p?q=tok")

    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(" INFO job job-7: first\\nsecond https://h/p?...\n")
    assert line[:20].endswith("Z")


def test_each_job_has_its_own_id(
    configured: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    configured("INFO")
    logs.job_id.set(None)
    logging.getLogger("x").warning("outside")

    async def job(name: str) -> None:
        logs.job_id.set(name)
        await asyncio.sleep(0.01)
        context = contextvars.copy_context()
        await asyncio.get_running_loop().run_in_executor(
            None, context.run, logging.getLogger("x").warning, "in a thread"
        )

    async def both() -> None:
        await asyncio.gather(job("a"), job("b"))

    asyncio.run(both())

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("WARNING outside")
    assert sorted(line.split("WARNING ")[1] for line in lines[1:]) == [
        "job a: in a thread",
        "job b: in a thread",
    ]


def test_a_traceback_is_on_the_same_line_and_redacted(
    configured: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    configured("INFO")

    try:
        raise ValueError(f"refused: https://h/p?X-Amz-Signature=tok secret={SECRET}")
    except ValueError:
        logging.getLogger("x").exception("failed")

    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "Traceback" in text
    assert "test_logs.py" in text
    assert "tok" not in text
    assert SECRET not in text


def test_the_level_is_kept_and_the_sdks_handlers_are_replaced(
    configured: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().addHandler(logging.NullHandler())

    configured("WARN")

    assert len(logging.getLogger().handlers) == 1
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert "quiet" not in (text := capsys.readouterr().err)
    assert "loud" in text


@pytest.mark.parametrize("level", ["NOTSET", "TRACE", "DEBUG"])
def test_no_level_shows_what_the_store_is_sent(
    configured: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    object_store: BucketServer,
    level: str,
) -> None:
    configured(level)
    store = Storage(
        BucketSettings(
            endpoint_url=object_store.endpoint_url,
            access_key_id="AKIAIOSFODNN7EXAMPLE",
            secret_access_key=SECRET,
            name=object_store.bucket,
        )
    )

    store.head("nothing.mp4")
    boto3.client("s3", region_name="us-east-1")
    logging.getLogger("x").debug("shown")

    text = capsys.readouterr().err
    assert "shown" in text
    for secret in ("AKIA", SECRET, "AWS4-HMAC", "Signature", "Credential"):
        assert secret not in text
