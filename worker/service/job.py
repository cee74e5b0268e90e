"""One job on its way: found or fetched, generated, delivered; told, timed and stopped between.

All of it runs in the worker's thread. What the client gets is put together in `result`.
"""

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from avatar_client.contract.job_errors import DeadlineExceededError
from avatar_client.contract.request import JobInput
from worker.media.claim import Claim
from worker.media.provenance import COPIES
from worker.media.store_client import Patience
from worker.own_directory import own_directory
from worker.service import machine, result
from worker.service.abandon import CHECK_SECONDS, call_abandonably
from worker.service.delivery import Delivery
from worker.service.estimate import JobPlan, ThroughputEstimator
from worker.service.job_inputs import JobInputs, largest_bytes
from worker.service.job_request import Fingerprint, JobRequest
from worker.service.production import Production, encoding_of, preview_warnings
from worker.service.progress import ProgressReporter
from worker.service.resume import JobState, Resumption
from worker.service.scene import Scene
from worker.settings import Settings
from worker.shapes import VideoPlan, count_frames, uses_cfg

if TYPE_CHECKING:
    from worker.generation.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.5, 5.0  # after another worker's video


class JobStoppedError(Exception):
    """The platform stopped the job: nothing is posted.

    Its client has cancelled it or, after a time without contact, another worker has been given it:
    then it may go on from the state that this one leaves.
    """

    def __init__(self, *, may_be_elsewhere: bool = False) -> None:
        super().__init__()
        self.retryable = may_be_elsewhere


@dataclass(slots=True)
class JobRun:
    """One job on its way through the worker's thread."""

    request: JobRequest
    settings: Settings
    progress: ProgressReporter
    stop: threading.Event = field(default_factory=threading.Event)  # set to end it at its next step
    started: float = field(default_factory=time.monotonic)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    was_out_of_touch: bool = False  # with the platform, which may have taken this worker for dead
    _directory: Path | None = None  # of its files, while there are any
    _delivery: Delivery | None = None  # once it is decided
    _has_kept_result: bool = False
    _claim: Claim | None = None  # on a request that other workers may have been given, too
    _state: JobState | None = None  # once there is something to restore or to keep
    _production: Production | None = None  # once the video is being made

    @property
    def elapsed_seconds(self) -> float:
        """Time since the job reached this worker."""
        return time.monotonic() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells the client of the stage, and times it."""
        self.check()
        self.progress.enter(name)
        begun = time.monotonic()
        yield
        self.stage_seconds[f"{name}_seconds"] = round(time.monotonic() - begun, 3)

    def check(self) -> None:
        """Returns if the job may go on.

        Raises:
            JobStoppedError: it was stopped.
            DeadlineExceededError: it takes longer than the operator allows.
            UploadError: another worker makes the same request.
        """
        if self.stop.is_set():
            out_of_touch = self.was_out_of_touch or self.progress.was_unanswered
            raise JobStoppedError(may_be_elsewhere=out_of_touch)
        if self._claim is not None:
            self._claim.require_held()
        limit_seconds = self.settings.job_timeout_seconds
        if limit_seconds and self.elapsed_seconds > limit_seconds:
            raise DeadlineExceededError(
                f"the job took longer than this worker's limit of {limit_seconds:g} s"
            )

    def remove_files(self) -> None:
        """Removes the job's files while its thread cannot, because it waits in vain."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def keep_result(self, payload: dict[str, Any]) -> str | None:
        """Where the result now lies beside the job's video; None: there is no such place."""
        is_delivered = isinstance(payload.get("output"), dict) and "key" in payload["output"]
        if self._delivery is None or not is_delivered:
            return None
        where = self._delivery.keep_result(payload)
        self._has_kept_result = where is not None
        return where

    def drop_kept_result(self) -> None:
        """Removes a result that was kept."""
        if self._delivery is not None and self._has_kept_result:
            self._delivery.drop_kept_result()

    def execute(
        self,
        engine: "Engine",
        throughput: ThroughputEstimator,
        resumption: Resumption | None = None,
    ) -> dict[str, Any]:
        """What the client gets. No file stays behind, but for a state if the job may come again.

        Raises:
            WorkerError: the job cannot be served, or failed.
            JobStoppedError: it was cancelled.
        """
        params = self.request.input
        patience = Patience(
            self.settings.store_retry_seconds, self.check, self.progress.wait_for_store
        )
        delivery = self._delivery = self._abandonably(
            lambda: Delivery.from_request(self.request, self.settings, patience)
        )
        existing = self._abandonably(lambda: delivery.find_existing(self.request.fingerprint))
        if existing is not None and not params.dry_run:
            return self._reused(engine, delivery, existing)
        self._abandonably(delivery.prove)
        machine.require_room(largest_bytes(params, self.settings))
        with own_directory("job") as directory, ExitStack() as ending:
            self._directory = directory
            with self.stage("download"):
                inputs = JobInputs.fetch(
                    params,
                    directory,
                    self.settings,
                    engine,
                    require_fits=delivery.require_fits_reply,
                    check=self.check,
                )
            plan = _plan(params, inputs.scene)
            self._require_room(plan)
            fingerprint = self.request.fingerprint_with(inputs.digests)
            existing = self._turn(delivery, fingerprint, ending)
            if existing is not None:
                return self._reused(engine, delivery, existing)
            if params.dry_run:
                return self._dry_run_output(engine, throughput, delivery, plan, inputs)
            with self._resumable(engine, plan, inputs.scene, resumption) as state:
                self._production = production = Production(
                    params=params,
                    settings=self.settings,
                    engine=engine,
                    plan=plan,
                    inputs=inputs,
                    state=state,
                    directory=directory,
                    max_bytes=delivery.max_bytes,
                    stage=self.stage,
                    check=self.check,
                    progress=self.progress,
                )
                video = self._deliver(production, delivery, fingerprint)
            if state.first_step == 0:  # a part of a job would teach another throughput
                denoise_seconds = self.stage_seconds["denoise_seconds"]
                throughput.record(plan, denoise_seconds, sum(self.stage_seconds.values()))
            return self._output(engine, video)

    def _reused(
        self, engine: "Engine", delivery: Delivery, existing: dict[str, Any]
    ) -> dict[str, Any]:
        logger.info("already in the bucket: nothing is generated")
        self._abandonably(delivery.drop_claim)  # of a worker that was lost once it had delivered
        return self._output(engine, existing | {"reused": True})

    def _require_room(self, plan: JobPlan) -> None:
        copies = COPIES if self.settings.c2pa_certificate is not None else 1
        rate = encoding_of(self.request.input).rate
        machine.require_room(copies * plan.video_room_bytes(rate))

    def _resumable(
        self, engine: "Engine", plan: JobPlan, scene: Scene, resumption: Resumption | None
    ) -> JobState:
        """The state of an earlier try of this job, if there is one, and of this try."""
        state = self._state = JobState(resumption, plan.num_inference_steps)
        if resumption is not None:
            name = resumption.name(self.request, scene.portrait, scene.voices)
            identity = engine.identity(self.request.input)
            state.restore(name, identity, self._abandonably, self.check)
        if state.seed is None:
            state.seed = self.request.seed
        return state

    def _deliver(
        self, production: Production, delivery: Delivery, fingerprint: Fingerprint
    ) -> dict[str, Any]:
        """What is known of the video, once it is made and lies where the client wants it."""
        made = production.run()
        metadata = result.video_metadata(
            self.request.input,
            production.plan,
            made.file,
            production.seed,
            made.warnings,
            made.speakers,
        )
        with self.stage("upload"):
            address = self._abandonably(
                lambda: delivery.deliver(made.file, made.pictures, fingerprint, metadata)
            )
        if self._claim is not None:
            self._claim.is_done = True
        return metadata | address

    def _turn(
        self, delivery: Delivery, fingerprint: Fingerprint, ending: ExitStack
    ) -> dict[str, Any] | None:
        """The video of this request if another job has made it; None: this one makes it now.

        While another one does, it is waited for. Where a request has no id there is no other.
        """
        if self.request.input.request_id is None:
            return None
        if self.request.input.dry_run:
            self._abandonably(lambda: delivery.find_existing(fingerprint))  # or a refusal
            return None
        claim = self._abandonably(lambda: delivery.claim(fingerprint))
        if claim is not None:
            ending.callback(claim.release)
        pause_seconds = FIRST_LOOK_SECONDS
        while True:
            existing = self._abandonably(lambda: delivery.find_existing(fingerprint))
            if existing is not None and claim is not None:
                claim.is_done = True
            if existing is not None or claim is None or self._claim is not None:
                return existing
            if self._abandonably(lambda: claim.take(delivery.patience)):
                self._claim = claim  # and look once more: it may have been given up for a video
            else:
                self.progress.update(0.0, message="Waiting for the worker that makes this video")
                self._pause(pause_seconds)
                pause_seconds = min(1.5 * pause_seconds, LONGEST_LOOK_SECONDS)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, CHECK_SECONDS))

    def _abandonably(self, call: Callable[[], T], limit_seconds: float = math.inf) -> T:
        """The result of a call that may hang; a stop or the deadline is met at once."""
        return call_abandonably(call, self.check, limit_seconds)

    def _dry_run_output(
        self,
        engine: "Engine",
        throughput: ThroughputEstimator,
        delivery: Delivery,
        plan: JobPlan,
        inputs: JobInputs,
    ) -> dict[str, Any]:
        params, scene = self.request.input, inputs.scene
        assert inputs.faces is not None
        foreseen = engine.foresee(scene.portrait, scene.params, plan.size)
        return result.dry_run_output(
            params,
            plan,
            delivery.describe(),
            scene.soundtrack.duration_seconds,
            inputs.faces,
            throughput.estimate_seconds(plan),
            self.settings.price_per_second,
            (*scene.all_warnings, *foreseen, *preview_warnings(params, engine)),
            self.settings.avatar_model,
        )

    def _output(self, engine: "Engine", video: dict[str, Any]) -> dict[str, Any]:
        params, production = self.request.input, self._production
        metrics = result.job_metrics(
            params,
            engine,
            self.stage_seconds,
            self.elapsed_seconds,
            self.settings.price_per_second,
            production.sparsity if production is not None else None,
        )
        if self._state is not None:
            metrics |= self._state.metrics
        if production is not None and production.drift is not None:
            metrics["drift"] = production.drift.summary()
        return result.video_output(params, video, metrics, self.settings.avatar_model)


def _plan(params: JobInput, scene: Scene) -> JobPlan:
    return JobPlan(
        size=scene.framing.model,
        video=VideoPlan(count_frames(len(scene.soundtrack.waveforms[0]), params.fps)),
        num_inference_steps=params.num_inference_steps,
        preset=params.preset,
        num_cfg_branches=2 if uses_cfg(params.guidance_scale) else 1,
        video_size=scene.framing.video,
    )
