"""A job that was broken off goes on from its last state, or begins anew and says why."""

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from avatar_client.contract.job_errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidInputError,
    UploadError,
)
from tests.conftest import BucketServer
from tests.support.waiting import wait_until
from worker.generation.denoising_state import DenoisingState, ModelIdentity
from worker.generation.engine import Engine
from worker.generation.voices import Voice
from worker.media import state_store
from worker.media.state_store import SUFFIX, BucketStore, DirectoryStore
from worker.service import job_request, resume
from worker.service.job import JobStoppedError
from worker.service.resume import JobState, Resumption
from worker.service.worker import Worker
from worker.settings import Settings

SECRET = "the operator's own secret"
KEY = b"k" * 32
JOB_STEPS = 2  # all of them computed
NUM_STEPS, STEP = 4, 3  # of states that no job has computed
WAIT_SECONDS = 60.0
IDENTITY = ModelIdentity(weights="w", code="c", arithmetic="bfloat16", gpu="NVIDIA H200")
NAME = "0" * 64


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POLL_SECONDS", 0.001)


# Through the worker


@pytest.fixture(scope="module")
def job_input(make_input: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_input(num_inference_steps=JOB_STEPS, guidance_scale=1.0, seed=5)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A worker's that keeps each state at once."""
    return Settings.model_validate(
        {
            "resume_dir": str(tmp_path / "volume"),
            "resume_secret": SECRET,
            "resume_interval_seconds": 1e-6,
        }
    )


def handle(worker: Worker, job_input: dict[str, Any], job_id: str = "job-1") -> dict[str, Any]:
    return asyncio.run(worker.handle({"id": job_id, "input": job_input}))


def kept_states(settings: Settings) -> list[Path]:
    return sorted(Path(settings.resume_dir).glob(f"*{SUFFIX}"))


def kept_step(settings: Settings) -> int:
    """The step that the only state is of; 0: there is none."""
    for path in kept_states(settings):
        with suppress(FileNotFoundError):
            return resume.facts_of(path.read_bytes()).step
    return 0


@pytest.fixture(scope="module")
def undisturbed(engine: Engine, job_input: dict[str, Any]) -> dict[str, Any]:
    return handle(Worker(Settings(), engine), job_input)


def break_off(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, during: str, step: int
) -> None:
    """Has the engine fail inside `during`, once the state after `step` steps is kept."""
    if during == "decode":

        def decode_frames(*_: object) -> Any:
            wait_until(lambda: kept_step(settings) == step)
            raise GenerationError("broken off")

        monkeypatch.setattr(Engine, "decode_frames", decode_frames)
        return
    forward = engine.pipeline.transformer.forward
    passes = 0

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == step + 1:
            wait_until(lambda: kept_step(settings) == step)
            raise RuntimeError("broken off")
        return forward(*arguments, **named)

    monkeypatch.setattr(engine.pipeline.transformer, "forward", fail)


@pytest.mark.parametrize(("during", "step"), [("denoise", 1), ("decode", JOB_STEPS)])
def test_a_job_goes_on_where_it_was_broken_off_and_becomes_the_same_video(
    engine: Engine,
    settings: Settings,
    job_input: dict[str, Any],
    undisturbed: dict[str, Any],
    during: str,
    step: int,
) -> None:
    with pytest.MonkeyPatch.context() as patches:
        break_off(engine, settings, patches, during, step)
        broken = handle(Worker(settings, engine), job_input)
    assert broken["error_info"]["retryable"]
    assert [path.stat().st_mode & 0o777 for path in kept_states(settings)] == [0o600]
    passes: list[object] = []
    hook = engine.pipeline.transformer.register_forward_pre_hook(lambda *_: passes.append(1))

    again = handle(Worker(settings, engine), job_input, "another-try")
    hook.remove()

    assert again["sha256"] == undisturbed["sha256"]
    assert again["warnings"] == undisturbed["warnings"]
    assert len(passes) == JOB_STEPS - step
    assert again["metrics"]["resumed_from_step"] == step
    assert again["metrics"]["seconds_saved"] > 0
    assert "resumed_from_step" not in undisturbed["metrics"]
    assert kept_states(settings) == []


def test_a_state_that_nobody_signed_is_refused_and_the_job_says_so(
    engine: Engine, settings: Settings, job_input: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    planted: list[str] = []

    def plant(self: Resumption, *job: Any) -> str:
        name = real_name(self, *job)
        planted.append(name)
        self.store.put(name, lambda path: path.write_bytes(b"planted" * 100), 700)
        return name

    real_name = Resumption.name
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Resumption, "name", plant)
        output = handle(Worker(settings, engine), job_input)

    [reason] = [each for each in output["warnings"] if "begun anew" in each]
    assert "not signed" in reason
    assert planted[0] not in str(output)
    assert output["sha256"] == undisturbed["sha256"]
    assert "resumed_from_step" not in output["metrics"]
    assert kept_states(settings) == []


def test_a_place_that_keeps_nothing_costs_no_job(
    engine: Engine, settings: Settings, job_input: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    Path(settings.resume_dir).write_text("a file, where a directory should be")
    output = handle(Worker(settings, engine), job_input)
    assert output["sha256"] == undisturbed["sha256"]
    assert "could not be found out" in str(output["warnings"])


def test_a_stop_is_met_while_a_state_is_looked_for(
    engine: Engine,
    settings: Settings,
    job_input: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, is_over = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        is_over.wait(WAIT_SECONDS)

    monkeypatch.setattr(DirectoryStore, "get", hang)

    async def stop() -> None:
        task = asyncio.create_task(
            Worker(settings, engine).handle({"id": "job-1", "input": job_input})
        )
        await asyncio.to_thread(asked.wait, WAIT_SECONDS)
        task.cancel()
        await task

    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stop())
    is_over.set()
    assert time.monotonic() - begun < WAIT_SECONDS / 2


# One state


@pytest.fixture
def resumption(tmp_path: Path) -> Resumption:
    return Resumption(DirectoryStore(tmp_path / "states"), KEY, interval_seconds=1e-6)


def some_state(step: int = STEP, fill: float = 0.5) -> DenoisingState:
    return DenoisingState(
        step=step,
        latents=torch.full((1, 4, 33, 4, 4), fill),
        reference_latents=torch.ones(1, 4, 33, 4, 4),
        random_state=torch.Generator().get_state(),
    )


def opened(
    resumption: Resumption | None,
    name: str = NAME,
    identity: ModelIdentity = IDENTITY,
    num_steps: int = NUM_STEPS,
) -> JobState:
    """The state of a job, after what an earlier try has left was looked for."""
    state = JobState(resumption, num_steps)
    if resumption is not None:
        state.restore(name, identity, lambda call, limit_seconds: call(), lambda: None)
    if state.seed is None:
        state.seed = 7
    return state


def leave(resumption: Resumption, error: BaseException, step: int = STEP) -> None:
    """A try that is broken off by this error after a state was kept."""
    kept = path_of(resumption)
    with suppress(type(error)), opened(resumption) as state:
        state.begin_denoising()
        state.offer(some_state(step))
        wait_until(lambda: kept.exists() and resume.facts_of(kept.read_bytes()).step == step)
        raise error


def path_of(resumption: Resumption, name: str = NAME) -> Path:
    assert isinstance(resumption.store, DirectoryStore)
    return Path(str(resumption.store)) / f"{name}{SUFFIX}"


BROKEN = GenerationError("the model failed")


def test_what_is_kept_comes_back_bit_for_bit_with_its_seed(resumption: Resumption) -> None:
    leave(resumption, BROKEN)

    state = opened(resumption)

    assert state.restored is not None
    assert state.seed == 7
    assert state.first_step == STEP
    assert torch.equal(state.restored.latents, some_state().latents)
    assert torch.equal(state.restored.reference_latents, some_state().reference_latents)
    assert state.warnings == ()


def test_time_that_was_saved_adds_up_over_several_tries(resumption: Resumption) -> None:
    leave(resumption, BROKEN, step=1)
    first = opened(resumption).metrics["seconds_saved"]
    leave(resumption, BROKEN, step=2)
    second = opened(resumption).metrics
    assert second["resumed_from_step"] == 2
    assert second["seconds_saved"] >= first


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (BROKEN, True),
        (UploadError("the store did not answer"), True),
        (LookupError("unforeseen"), True),
        (JobStoppedError(), False),
        (JobStoppedError(may_be_elsewhere=True), True),
        (DeadlineExceededError("too long"), False),
        (InvalidInputError("another object lies there"), False),
    ],
)
def test_a_state_stays_where_the_job_may_come_again(
    resumption: Resumption, error: BaseException, is_kept: bool
) -> None:
    leave(resumption, error)
    assert path_of(resumption).exists() is is_kept


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "planted": (lambda path: path.write_bytes(b"planted" * 1000), "not signed"),
    "empty": (lambda path: path.write_bytes(b""), "not signed"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not signed"),
    "a byte changed": (lambda path: change(path, lambda c: c.__setitem__(-99, c[-99] ^ 1)), "not"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_state_that_was_tampered_with_is_refused(resumption: Resumption, how: str) -> None:
    leave(resumption, BROKEN)
    tamper, reason = REFUSED[how]
    tamper(path_of(resumption))
    require_refused(opened(resumption), reason)


def require_refused(state: JobState, reason: str) -> None:
    assert state.restored is None
    assert state.metrics == {}
    [warning] = state.warnings
    assert warning.startswith("the job was begun anew: the state of an earlier try ")
    assert reason in warning


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "others"}, "other weights"),
        ({"code": "another"}, "another version"),
        ({"arithmetic": "float8"}, "another way (bfloat16)"),
    ],
)
def test_a_state_of_another_model_is_refused(
    resumption: Resumption, changes: dict[str, str], reason: str
) -> None:
    leave(resumption, BROKEN)
    require_refused(opened(resumption, identity=replace(IDENTITY, **changes)), reason)


def test_another_kind_of_gpu_with_the_same_arithmetic_goes_on(resumption: Resumption) -> None:
    leave(resumption, BROKEN)
    state = opened(resumption, identity=replace(IDENTITY, gpu="NVIDIA H100 80GB HBM3"))
    assert state.first_step == STEP


def test_a_state_of_another_job_another_key_or_another_day_is_refused(
    resumption: Resumption, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(resumption, BROKEN)
    other = "1" * 64
    shutil.copy(path_of(resumption), path_of(resumption, other))
    require_refused(opened(resumption, other), "belongs to another job")
    require_refused(opened(replace(resumption, key=b"x" * 32)), "not signed")
    require_refused(opened(resumption, num_steps=NUM_STEPS + 1), "has other steps")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + resume.MAX_AGE_SECONDS + 1)
    require_refused(opened(resumption), "more than a day old")


def test_a_state_of_no_numbers_is_not_kept(
    resumption: Resumption, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(resumption) as state:
        state.offer(some_state(fill=float("nan")))
        wait_until(lambda: "was not kept" in caplog.text)
    assert not path_of(resumption).exists()


def test_states_are_kept_at_intervals_and_at_once_where_the_worker_is_to_end(
    tmp_path: Path,
) -> None:
    resumption = Resumption(DirectoryStore(tmp_path), KEY, interval_seconds=1000.0)
    with opened(resumption) as state:
        state.begin_denoising()
        for step in (1, 2, NUM_STEPS):
            state.offer(some_state(step))
            time.sleep(0.05)
        assert not path_of(resumption).exists()
        resumption.is_ending = True
        wait_until(path_of(resumption).exists)
    assert not path_of(resumption).exists()  # it is done


def test_the_last_state_is_kept_if_the_steps_took_an_interval(tmp_path: Path) -> None:
    resumption = Resumption(DirectoryStore(tmp_path), KEY, interval_seconds=0.01)
    with opened(resumption) as state:
        state.begin_denoising()
        state.offer(some_state(1))
        wait_until(path_of(resumption).exists)
        resumption.interval_seconds = 1000.0  # the next one is never over ...
        vars(state)["_started"] -= 1000.0  # ... but so long ago the steps have begun
        state.offer(some_state(NUM_STEPS))
        wait_until(lambda: resume.facts_of(path_of(resumption).read_bytes()).step == NUM_STEPS)


# Names


VOICES = [
    Voice(np.full(100, 0.25, np.float32), (0.0, 0.0, 4.0, 4.0)),
    Voice(np.full(100, 0.5, np.float32), (4.0, 0.0, 4.0, 4.0)),
]


def name(
    resumption: Resumption,
    job_id: str = "a",
    shade: int = 9,
    voices: Sequence[Voice] = VOICES[:1],
    **job_input: Any,
) -> str:
    media = {"image": "aGk=", "audio": "aGk="}
    request = job_request.parse({"id": job_id, "input": media | job_input})
    return resumption.name(request, Image.new("RGB", (8, 8), (shade, 9, 9)), voices)


def test_the_same_request_has_the_same_state_where_it_must_be_the_same_video(
    resumption: Resumption,
) -> None:
    seeded = name(resumption, seed=1)
    assert name(resumption, "b", seed=1) == seeded
    assert name(resumption, seed=1, user_data="x") == seeded
    assert name(resumption) == name(resumption)
    others = [
        name(resumption),
        name(resumption, "b"),  # without a seed each job is a video of its own
        name(resumption, seed=2),
        name(resumption, seed=1, prompt="Another."),
        name(resumption, seed=1, shade=10),
        name(resumption, seed=1, voices=VOICES[1:]),
        name(resumption, seed=1, voices=VOICES),
        name(resumption, seed=1, voices=VOICES[::-1]),
        name(resumption, seed=1, voices=[replace(VOICES[0], face_box=VOICES[1].face_box)]),
        name(resumption, seed=1, bystanders="free"),
        name(replace(resumption, key=b"x" * 32), seed=1),
    ]
    assert len({seeded, *others}) == 1 + len(others)


# Places


def bucket_settings(store: BucketServer, **changes: Any) -> Settings:
    values = {each.lower(): value for each, value in store.environment.items()}
    return Settings.model_validate(values | changes)


def test_states_are_kept_where_the_operator_alone_reads(
    object_store: BucketServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    in_bucket = Resumption.from_settings(bucket_settings(object_store))
    assert in_bucket is not None
    assert isinstance(in_bucket.store, BucketStore)
    own = Resumption.from_settings(bucket_settings(object_store, resume_secret=SECRET))
    assert own is not None
    assert own.key != in_bucket.key
    assert object_store.secret_access_key.encode() not in in_bucket.key
    for reason, settings in {
        "neither a network volume nor a bucket": Settings.model_validate({"resume_secret": SECRET}),
        "only the operator reads": bucket_settings(
            object_store, bucket_public_base_url="https://cdn.example.com"
        ),
        "set RESUME_SECRET": Settings(resume_dir=str(tmp_path)),
        "RESUME_INTERVAL_SECONDS is 0": bucket_settings(object_store, resume_interval_seconds=0),
    }.items():
        caplog.clear()
        assert Resumption.from_settings(settings) is None
        assert reason in caplog.text
        assert object_store.secret_access_key not in caplog.text
    monkeypatch.setattr(state_store, "VOLUME", tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    on_volume = Resumption.from_settings(bucket_settings(object_store))
    assert on_volume is not None
    assert str(on_volume.store).startswith(str(tmp_path))
