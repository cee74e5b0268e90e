"""The studio at an endpoint whose worker is older than itself, and knows less fields."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from studio.connection import Connection
from studio.history import History, Record
from studio.tracker import JobTracker
from tests.support.scripted_server import Answer, ScriptedServer

JOB_SECONDS = 300


def refusal(name: str) -> Answer:
    """What a worker of before the field answers."""
    info = {"code": "INVALID_INPUT", "message": "unknown key; known: [...]", "retryable": False}
    output = {"error_info": {**info, "field": name}}
    text = f"INVALID_INPUT: {name}: {info['message']}"
    return Answer(body={"id": "job", "status": "FAILED", "output": output, "error": text})


@pytest.fixture
def start(
    tmp_path: Path, make_portrait: Callable[..., bytes], make_speech: Callable[..., bytes]
) -> Callable[..., Record]:
    """Sends jobs one after the other, all with the same fields; the record of the last one."""
    (tmp_path / "portrait.png").write_bytes(make_portrait(64, 64))
    (tmp_path / "speech.wav").write_bytes(make_speech(0.1))

    def start(server: ScriptedServer, number: int, fields: dict[str, Any]) -> Record:
        async def story() -> Record:
            url = f"{server.origin}/v2/old"
            connection = Connection(name="old", url=url, api_key=SecretStr("key"))
            tracker = JobTracker(History(tmp_path / "jobs"))
            async with asyncio.timeout(JOB_SECONDS):
                for _ in range(number):
                    files = (tmp_path / "portrait.png", tmp_path / "speech.wav")
                    record = await tracker.start(connection, *files, fields)
                    while not record.is_over:
                        await asyncio.sleep(0.01)
                        [state] = [one for one in tracker.states() if one.record.id == record.id]
                        record = state.record
            await tracker.close()
            return record

        return asyncio.run(story())

    return start


def sent(server: ScriptedServer) -> list[set[str]]:
    inputs = [asked.json["input"] for asked in server.asked("POST /v2/old/run")]
    return [set(each) - {"image", "audio"} for each in inputs]


def test_what_the_studio_asks_for_by_itself_is_left_out_where_it_is_unknown(
    start: Callable[..., Record],
) -> None:
    failed = {"id": "late", "status": "FAILED", "error": "GENERATION_FAILED: too dark"}
    with ScriptedServer() as server:
        server.on(
            "POST /v2/old/run",
            *({"id": name, "status": "IN_QUEUE"} for name in ("early", "late", "late")),
        )
        server.on("GET /v2/old/status/early", refusal("preview"))
        server.on("GET /v2/old/status/late", failed)

        record = start(server, 2, {"seed": 1})

        assert sent(server) == [{"preview", "seed"}, {"seed"}, {"seed"}]
    assert record.error is not None
    assert record.error["code"] == "GENERATION_FAILED"


def test_what_a_person_asked_for_is_not_left_out_but_told_at_its_field(
    start: Callable[..., Record],
) -> None:
    with ScriptedServer() as server:
        server.on("POST /v2/old/run", {"id": "job", "status": "IN_QUEUE"})
        server.on("GET /v2/old/status/job", refusal("output.gif"))

        record = start(server, 1, {"output": {"gif": True}})

        assert sent(server) == [{"preview", "output"}]
    assert record.error is not None
    assert record.error["field"] == "output.gif"
    assert "whose worker is older" in record.error["message"]
