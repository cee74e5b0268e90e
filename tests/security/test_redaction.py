"""A secret in any of the forms in which one reaches a log: redacted, whoever writes the line."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from avatar_client.contract.redaction import redact
from worker import logs

ROOT = Path(__file__).parents[2]
MARK = "m4rkedS3cretValue0987"
NAMES = [
    *("accessSecret", "secretAccessKey", "secret_access_key", "access_key_id", "accessKeyId"),
    *("AWS_SECRET_ACCESS_KEY", "BUCKET_SECRET_ACCESS_KEY", "api_key", "apiKey", "x-api-key"),
    *("X-Api-Key", "password", "passwd", "token", "sessionToken", "hf_token", "authorization"),
    *("private_key", "credentials", "client-secret", "x-amz-security-token"),
]
FORMS: list[Callable[[str, str], str]] = [
    lambda name, value: f"{name}={value}",
    lambda name, value: f"{name}: {value}\r\nHost: example.com",
    lambda name, value: json.dumps({name: value, "other": 1}),
    lambda name, value: json.dumps({"body": json.dumps({name: value, "other": 1})}),
    lambda name, value: json.dumps(json.dumps(json.dumps([{name: value}]))),
    lambda name, value: repr({name: value, "other": 1}),
    lambda name, value: f"{name} = '{value}', input_type=str",
    lambda name, value: json.dumps({name: f"{value} with a blank, and a comma"}),
]
SHAPES = [
    "hf_" + "aB3dE5gH" * 4,
    "rpa_" + "A1B2C3D4E5F6" * 3,
    "ghp_" + "a1B2c3D4" * 4,
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtYXJrIn0.c2lnbmF0dXJl",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\n-----END PRIVATE KEY-----",
]
ADDRESSES = [
    "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=A&X-Amz-Signature={}",
    "https://storage.googleapis.com/b/k?X-Goog-Signature={}",
    "https://a.blob.core.windows.net/c/k?sv=2020&sig={}",
    "https://d1.cloudfront.net/k?Policy={0}&Signature={0}&Key-Pair-Id={0}",
    "https://user:{}@example.com/k",
    "https://{}@example.com/k",
    "s3://user:{}@bucket/k",
    "k?Policy={0}&Signature={0}&Key-Pair-Id={0}",
    "/c/k?sv=2020&sig={}",
    "HTTPS://EXAMPLE.COM/?{}",
]


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("name", NAMES)
def test_a_secret_by_its_name_is_taken_out(name: str, form: Callable[[str, str], str]) -> None:
    assert MARK not in redact(f"before {form(name, MARK)} after")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_secret_by_its_shape_is_taken_out(shape: str) -> None:
    for text in (shape, f"got {shape}!", json.dumps({"x": shape}), f"['{shape}']"):
        kept = redact(text)
        assert not [part for part in shape.split("\n") if len(part) > 15 and part in kept
                    and "PRIVATE" not in part], kept  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_signs_an_address_is_taken_out(address: str) -> None:
    text = address.format(MARK)
    for line in (text, f'"{text}"', f"<{text}>", json.dumps(json.dumps({"u": text}))):
        assert MARK not in redact(line)


@pytest.mark.parametrize(
    "spell",
    [str, json.dumps, repr, lambda text: quote(text, safe=""), lambda text: f"b{text!r}"],
)
def test_a_known_secret_is_hidden_under_any_name(spell: Callable[[str], str]) -> None:
    secret = "odd / vålue\n+with \"all\" 'kinds'"
    with logs.hiding({secret, "short"}):
        line = logs.clean(f"strange name -> {spell(secret)} <- and shorter things")
    assert "vålue" not in line
    assert "kinds" not in line
    assert "shorter things" in line
    assert "kinds" in logs.clean(secret)  # the job is over, and another's text is its own


def test_every_logger_of_the_process_is_redacted_by_the_one_handler() -> None:
    """In a process of its own: what it changes is the whole process."""
    script = f"""
import asyncio, logging, sys, threading, warnings
from worker import logs
own = logging.getLogger("library")
own.addHandler(logging.StreamHandler(sys.stdout))
own.propagate = False
logs.configure("DEBUG")
logs.hide(["{MARK}"])
logs.take_over()
for name in ("library", "boto3.x", "httpx", "urllib3.connectionpool", "asyncio", "worker.x", "py"):
    logging.getLogger(name).error("%s in the log of a library", "{MARK}")
warnings.warn("{MARK} in a warning")
def fail():
    raise ValueError("{MARK} in a thread")
thread = threading.Thread(target=fail); thread.start(); thread.join()
async def main():
    async def lost():
        raise ValueError("{MARK} in a task")
    task = asyncio.create_task(lost())
    await asyncio.sleep(0)
    del task
asyncio.run(main())
raise ValueError("{MARK} at the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert MARK not in done.stdout + done.stderr
    assert done.stdout == ""
    for told in ("in a warning", "in a thread", "in a task", "at the end"):
        assert told in done.stderr
    assert done.stderr.count("in the log of a library") == 7


def test_an_event_that_cannot_be_written_is_not_printed_as_it_is(log: Callable[[], str]) -> None:
    class Fails:
        def __str__(self) -> str:
            raise RuntimeError(MARK)

    # not through the logger: pytest's handler, beside ours, raises
    [ours] = [each for each in logging.getLogger().handlers if "logs" in type(each).__module__]
    told = {"name": "library", "levelno": logging.ERROR, "levelname": "ERROR"}
    for message, argument in (
        ("%d of " + MARK, "not a number"),
        ("%s", Fails()),
        ("%s is written, as its number", "\ud800"),
    ):
        ours.handle(logging.makeLogRecord({**told, "msg": message, "args": (argument,)}))
    assert MARK not in log()
    assert log().count("an event of library could not be written") == 2
    assert "as its number" in log()


def test_the_sdks_own_log_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    from runpod.serverless.modules import rp_logger

    from worker.service import serve

    logger = rp_logger.RunPodLogger()
    clean = serve.without_secrets(rp_logger.RunPodLogger.log)
    with logs.hiding([MARK]):
        clean(logger, f"output: {{'x': '{MARK}'}} https://h/p?sig=12345678", "ERROR", "job-1")
    printed = capsys.readouterr().out
    assert "output" in printed
    assert MARK not in printed
    assert "12345678" not in printed
