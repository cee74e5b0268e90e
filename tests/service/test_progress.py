"""What a client is told while its job runs."""

import asyncio
import threading
import time
from typing import Any

import pytest

from worker.service.progress import STAGES, ProgressReporter


class Listener:
    """A client's side: keeps what arrives, and answers as slowly as it is told to."""

    def __init__(self, delay_seconds: float = 0.0) -> None:
        self.payloads: list[dict[str, Any]] = []
        self.delay_seconds = delay_seconds

    async def __call__(self, payload: dict[str, Any]) -> None:
        await asyncio.sleep(self.delay_seconds)
        self.payloads.append(payload)

    async def has_heard(self, count: int) -> None:
        """Returns when so many have arrived."""
        while len(self.payloads) < count:
            await asyncio.sleep(0.001)


def run_job(
    listener: Listener, *, interval_seconds: float = 0.0, pause_seconds: float = 0.0
) -> None:
    """A job of 20 steps, told from a thread as the real one is."""

    async def job() -> None:
        def work() -> None:
            for stage in STAGES:
                progress.enter(stage.name)
                for step in range(1, 21):
                    progress.update(step / 20, step=step, total_steps=20)
                    threading.Event().wait(pause_seconds)

        async with ProgressReporter(listener, interval_seconds=interval_seconds) as progress:
            await asyncio.to_thread(work)

    asyncio.run(job())


def test_progress_arrives_in_order_and_never_falls() -> None:
    listener = Listener()
    run_job(listener, pause_seconds=0.002)
    shares = [payload["progress"] for payload in listener.payloads]
    stages = [payload["stage_index"] for payload in listener.payloads]
    assert len(shares) > 20
    assert shares == sorted(shares)
    assert stages == sorted(stages)
    assert set(stages) == {1, 2, 3, 4, 5}


def test_the_last_value_arrives_before_the_job_returns_however_slow_the_client() -> None:
    listener = Listener(delay_seconds=0.2)
    run_job(listener, interval_seconds=10.0)
    last = listener.payloads[-1]
    assert (last["stage"], last["progress"], last["step"]) == ("upload", 1.0, 20)


def test_the_newest_value_wins_between_two_posts() -> None:
    listener = Listener()
    begun = time.monotonic()
    run_job(listener, interval_seconds=0.1, pause_seconds=0.005)  # 100 values in half a second
    assert 2 <= len(listener.payloads) <= (time.monotonic() - begun) / 0.1 + 2


@pytest.mark.parametrize(
    ("status", "is_unanswered"), [(None, True), (503, False)], ids=["nobody", "a refusal"]
)
def test_a_value_that_nobody_answers_is_noticed(status: int | None, is_unanswered: bool) -> None:
    class NotTakenError(Exception):
        def __init__(self) -> None:
            self.status = status

    async def post(payload: dict[str, Any]) -> None:
        raise NotTakenError

    async def job() -> ProgressReporter:
        async with ProgressReporter(post) as progress:
            await asyncio.to_thread(progress.update, 0.5)
        return progress

    assert asyncio.run(job()).was_unanswered is is_unanswered


def test_a_preview_stays_until_there_is_a_newer_one() -> None:
    """A client asks now and then, and must not miss it."""
    listener = Listener()

    async def job() -> None:
        async with ProgressReporter(listener, interval_seconds=0.0) as progress:
            for number, preview in enumerate((None, "first", None, "second", None), start=1):
                progress.update(0.5, preview=preview)
                await listener.has_heard(number)

    asyncio.run(job())
    seen = [payload.get("preview") for payload in listener.payloads]
    assert seen == [None, "first", "first", "second", "second"]
    assert "preview" not in listener.payloads[0]


def test_a_client_that_refuses_every_value_does_not_stop_the_job() -> None:
    async def refuse(payload: dict[str, Any]) -> None:
        raise ConnectionError("gone")

    async def job() -> str:
        async with ProgressReporter(refuse, interval_seconds=0.0) as progress:
            progress.enter("denoise")
            await asyncio.sleep(0.02)
            return "done"

    assert asyncio.run(job()) == "done"


def test_a_stopped_job_posts_nothing_more() -> None:
    listener = Listener()

    async def job() -> None:
        async with ProgressReporter(listener, interval_seconds=10.0) as progress:
            progress.enter("denoise")
            await listener.has_heard(1)
            progress.update(0.5, step=1, total_steps=2)
            await asyncio.sleep(0.02)
            raise asyncio.CancelledError

    async def stop() -> None:
        await asyncio.wait({asyncio.create_task(job())})

    asyncio.run(stop())
    assert [payload["step"] for payload in listener.payloads] == [None]


def test_the_remaining_time_is_unknown_until_the_first_step() -> None:
    listener = Listener()
    run_job(listener, pause_seconds=0.002)
    for payload in listener.payloads:
        known = payload["eta_seconds"] is not None
        assert known == (payload["progress"] > 0.05)


def test_a_job_that_is_stopped_while_its_last_value_is_posted_leaves_no_task_behind() -> None:
    async def stop_late() -> set[asyncio.Task[Any]]:
        has_ended, is_posting = asyncio.Event(), asyncio.Event()

        async def post(_: dict[str, Any]) -> None:
            is_posting.set()
            await asyncio.sleep(1000.0)

        async def job() -> None:
            async with ProgressReporter(post) as progress:
                progress.enter("upload")
                await is_posting.wait()
                has_ended.set()

        task = asyncio.create_task(job())
        await has_ended.wait()
        await asyncio.sleep(0)  # the job waits for its post now
        task.cancel()
        await asyncio.wait({task})
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(stop_late()) == set()


def test_what_an_earlier_try_did_does_not_shorten_the_time_that_is_left() -> None:
    listener = Listener()

    async def job() -> None:
        async with ProgressReporter(listener, interval_seconds=0.0) as progress:
            progress.enter("denoise")
            progress.skip(0.8)
            await listener.has_heard(1)
            await asyncio.sleep(0.2)
            progress.update(0.85, step=17, total_steps=20)
            await listener.has_heard(2)

    asyncio.run(job())
    [first] = [each for each in listener.payloads if each["step"] is None][-1:]
    last = listener.payloads[-1]
    assert first["progress"] > 0.7
    assert first["eta_seconds"] is None
    # 0.2 s took it to a tenth of the job by itself; the rest is twice as much, and not a seventh
    assert last["eta_seconds"] > last["elapsed_seconds"]
