"""One job on its way: found or fetched, generated, delivered; told, timed and stopped between.

All of it runs in the worker's thread. What the client gets is put together in `result`.
"""

import contextvars
import hashlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.job_errors import DeadlineExceededError, InvalidInputError
from avatar_client.version import __version__
from worker.media.claim import Claim
from worker.media.drift import DriftMeter
from worker.media.encoding import Encoding
from worker.media.finishing import BLUR, finished
from worker.media.inputs import Speech, load_mark, load_portrait, load_speech
from worker.media.provenance import (
    COPIES,
    MAX_ADDED_BYTES,
    Credentials,
    Making,
    mark_picture,
    mark_video,
    xmp,
)
from worker.media.store_client import Patience
from worker.media.video import write_thumbnail, write_video
from worker.media.watermark import Mark
from worker.own_directory import own_directory
from worker.service import machine, result
from worker.service.delivery import Delivery
from worker.service.estimate import JobPlan, ThroughputEstimator
from worker.service.job_request import Fingerprint, JobRequest, draw_seed
from worker.service.progress import ProgressReporter
from worker.service.resume import JobState, Resumption
from worker.service.scene import Scene
from worker.settings import Settings
from worker.shapes import FrameSize, VideoPlan, count_frames, uses_cfg

if TYPE_CHECKING:
    from torch import Tensor

    from worker.generation.conditioning import Conditioning
    from worker.generation.engine import Engine
    from worker.generation.preview import FramePreview
    from worker.model.sparse_attention import SparseAttention

logger = logging.getLogger(__name__)

T = TypeVar("T")

NO_PREVIEW = (
    "no preview is possible: the model has no map for it; python -m builder.preview adds one"
)
MIN_FACE_SHARE = 0.02  # of the image's short side: a smaller face has no latent of its own
FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.5, 5.0  # after another worker's video
CHECK_SECONDS = 0.25  # between two looks whether a job that waits was stopped


class JobStoppedError(Exception):
    """The client cancelled the job: nothing is posted."""

    retryable = False


@dataclass(slots=True)
class JobRun:
    """One job on its way through the worker's thread."""

    request: JobRequest
    settings: Settings
    progress: ProgressReporter
    stop: threading.Event = field(default_factory=threading.Event)  # set to end it at its next step
    started: float = field(default_factory=time.monotonic)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    _directory: Path | None = None  # of its files, while there are any
    _delivery: Delivery | None = None  # once it is decided
    _has_kept_result: bool = False
    _mark: Mark | None = None  # on every frame
    _input_digests: list[str] = field(default_factory=list)  # sha256 of image and audio
    _claim: Claim | None = None  # on a request that other workers may have been given, too
    _drift: DriftMeter | None = None  # once there are frames
    _sparsity: "SparseAttention | None" = None  # of the preset's attention, if it leaves keys out
    _state: JobState | None = None  # once there is something to restore or to keep

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
            JobStoppedError: it was cancelled.
            DeadlineExceededError: it takes longer than the operator allows.
            UploadError: another worker makes the same request.
        """
        if self.stop.is_set():
            raise JobStoppedError
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
        fingerprint = self.request.fingerprint
        patience = Patience(
            self.settings.store_retry_seconds, self.check, self.progress.wait_for_store
        )
        delivery = self._delivery = self._abandonably(
            lambda: Delivery.from_request(self.request, self.settings, patience)
        )
        existing = self._abandonably(lambda: delivery.find_existing(fingerprint))
        if existing is not None and not params.dry_run:
            logger.info("already in the bucket: nothing is generated")
            return self._output(engine, existing | {"reused": True})
        self._abandonably(delivery.prove)
        machine.require_room(self._largest_inputs_bytes())
        with own_directory("job") as directory, ExitStack() as ending:
            self._directory = directory
            with self.stage("download"):
                portrait, speech = self._fetch(directory)
                shape = (params.output.aspect, params.output.fit)
                engine.require_fits_memory(portrait, params.resolution, *shape)
                delivery.require_fits_reply(speech.duration_seconds)
                scene = Scene.of(portrait, speech, params, engine)
                self._mark = self._watermark(directory, scene.framing.video)
            fingerprint = self._fingerprint_with_content(directory)
            plan = self._plan(scene)
            copies = COPIES if self.settings.c2pa_certificate is not None else 1
            machine.require_room(copies * plan.video_room_bytes(self._encoding.rate))
            existing = self._turn(delivery, fingerprint, ending)
            if existing is not None:
                return self._output(engine, existing | {"reused": True})
            if params.dry_run:
                return self._dry_run_output(engine, throughput, delivery, plan, scene)
            with self._resumable(engine, plan, scene, resumption):
                return self._generate(engine, throughput, delivery, fingerprint, plan, scene)

    def _resumable(
        self,
        engine: "Engine",
        plan: JobPlan,
        scene: Scene,
        resumption: Resumption | None,
    ) -> JobState:
        """The state of an earlier try of this job, if there is one, and of this try."""
        state = self._state = JobState(resumption, plan.num_inference_steps)
        if resumption is not None:
            name = resumption.name(self.request, scene.portrait, scene.speech.waveform)
            identity = engine.identity(self.request.input)
            state.restore(name, identity, self._abandonably, self.check)
        if state.seed is None:
            seed = self.request.input.seed
            state.seed = draw_seed() if seed is None else seed
        return state

    def _generate(
        self,
        engine: "Engine",
        throughput: ThroughputEstimator,
        delivery: Delivery,
        fingerprint: Fingerprint,
        plan: JobPlan,
        scene: Scene,
    ) -> dict[str, Any]:
        """The reply to a job, once its video is made and delivered."""
        params, state, directory = self.request.input, self._state, self._directory
        assert state is not None
        assert state.seed is not None
        assert directory is not None
        making = self._making(state.seed)
        credentials = self._credentials()
        conditioning, latents = self._denoise(engine, plan, scene, state)
        # closed, or a stopped job's frames are still decoded while the next job begins
        with (
            self.stage("decode"),
            closing(engine.decode_frames(conditioning, latents)) as frames,
        ):
            thumbnail_path = directory / "thumbnail.jpg" if params.output.thumbnail else None
            content_type = params.output.video_format.content_type
            self._drift = DriftMeter(scene.portrait, conditioning.face_box, plan.video.num_frames)
            measured = self._drift.watch(frames)
            shown = finished(measured, scene.framing, params.output.background or BLUR)
            if self._mark is not None:
                shown = self._mark.on(shown)
            video = write_video(
                directory / f"video{params.output.video_format.suffix}",
                self._watched(shown, plan.video.num_frames, thumbnail_path, xmp(making)),
                fps=params.fps,
                height=plan.shown_size.height,
                width=plan.shown_size.width,
                recording=scene.speech.recording,
                metadata={"seed": str(state.seed), "worker": __version__},
                encoding=self._encoding,
                mark=lambda path: mark_video(path, content_type, making, credentials),
                max_bytes=delivery.max_bytes and delivery.max_bytes - MAX_ADDED_BYTES,
            )
            if thumbnail_path is not None:
                mark_picture(thumbnail_path, making, credentials)
        warnings = (
            *state.warnings,
            *scene.speech.warnings,
            *conditioning.warnings,
            *self._preview_warnings(engine),
        )
        metadata = result.video_metadata(params, plan, video, state.seed, warnings)
        with self.stage("upload"):
            address = self._abandonably(
                lambda: delivery.deliver(video, thumbnail_path, fingerprint, metadata)
            )
        if self._claim is not None:
            self._claim.is_done = True
        if state.first_step == 0:  # a part of a job would teach another throughput
            denoise_seconds = self.stage_seconds["denoise_seconds"]
            throughput.record(plan, denoise_seconds, sum(self.stage_seconds.values()))
        return self._output(engine, metadata | address)

    def _making(self, seed: int) -> Making:
        return Making(self.settings.avatar_model, __version__, seed, *self._input_digests)

    def _credentials(self) -> Credentials | None:
        try:
            return Credentials.of(self.settings)
        except RuntimeError as error:  # the start has checked them: they have expired since
            logger.error("the video is not signed: %s", error)
            return None

    def _fingerprint_with_content(self, directory: Path) -> Fingerprint:
        self._input_digests = []
        for name in ("image", "audio"):
            with (directory / name).open("rb") as file:
                self._input_digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return self.request.fingerprint_with(*self._input_digests)

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
        """The result of a call that may hang: of a store that answers a byte a second, say.

        A stop or the deadline is met at once. The call is then left behind, in a thread that ends
        with it or with the process.

        Raises:
            TimeoutError: it took longer than the limit.
        """
        outcome: list[T | BaseException] = []
        context = contextvars.copy_context()  # the job's id, for the thread's log lines

        def run() -> None:
            try:
                outcome.append(context.run(call))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, name="store", daemon=True)
        thread.start()
        end = time.monotonic() + limit_seconds
        while thread.is_alive():
            thread.join(CHECK_SECONDS)
            self.check()
            if thread.is_alive() and time.monotonic() > end:
                raise TimeoutError
        [answer] = outcome
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _largest_inputs_bytes(self) -> int:
        """What the inputs may take on the disk: those that have to be fetched."""
        mark = self.request.input.output.watermark
        marks = [mark.image] if mark is not None and mark.image is not None else []
        sources = (self.request.input.image, self.request.input.audio, *marks)
        return self.settings.max_input_bytes * sum(source.url is not None for source in sources)

    def _watermark(self, directory: Path, size: FrameSize) -> Mark | None:
        """What every frame is marked with; None: nothing was asked for."""
        asked = self.request.input.output.watermark
        if asked is None:
            return None
        picture = None
        if asked.image is not None:
            picture = load_mark(asked.image, directory, self.settings, check=self.check)
        return Mark.of(asked, picture, size)

    def _fetch(self, directory: Path) -> tuple[Image.Image, Speech]:
        params = self.request.input
        portrait = load_portrait(params.image, directory, self.settings, check=self.check)
        self.check()
        speech = load_speech(
            params.audio,
            directory,
            self.settings,
            start_seconds=params.audio_start_seconds,
            max_seconds=params.max_seconds,
            check=self.check,
        )
        if params.face_box is not None:
            x, y, width, height = params.face_box
            if x + width > portrait.width or y + height > portrait.height:
                raise InvalidInputError(
                    f"reaches over the image's {portrait.width} x {portrait.height} pixels",
                    field="face_box",
                )
            if min(width, height) < MIN_FACE_SHARE * min(portrait.size):
                raise InvalidInputError(
                    f"must be at least {MIN_FACE_SHARE:.0%} of the image's short side",
                    field="face_box",
                )
        return portrait, speech

    @property
    def _encoding(self) -> Encoding:
        output = self.request.input.output
        return Encoding.of(output.format, output.codec, output.quality)

    def _plan(self, scene: Scene) -> JobPlan:
        params = self.request.input
        return JobPlan(
            size=scene.framing.model,
            video=VideoPlan(count_frames(len(scene.speech.waveform), params.fps)),
            num_inference_steps=params.num_inference_steps,
            preset=params.preset,
            num_cfg_branches=2 if uses_cfg(params.guidance_scale) else 1,
            video_size=scene.framing.video,
        )

    def _dry_run_output(
        self,
        engine: "Engine",
        throughput: ThroughputEstimator,
        delivery: Delivery,
        plan: JobPlan,
        scene: Scene,
    ) -> dict[str, Any]:
        params = self.request.input
        foreseen = engine.foresee(scene.portrait, scene.params, plan.size)
        return result.dry_run_output(
            params,
            plan,
            delivery.describe(),
            scene.speech.duration_seconds,
            throughput.estimate_seconds(plan),
            self.settings.price_per_second,
            (*scene.speech.warnings, *foreseen, *self._preview_warnings(engine)),
            self.settings.avatar_model,
        )

    def _preview_warnings(self, engine: "Engine") -> tuple[str, ...]:
        is_missing = self.request.input.preview and engine.latent_to_rgb is None
        return (NO_PREVIEW,) if is_missing else ()

    def _denoise(
        self, engine: "Engine", plan: JobPlan, scene: Scene, state: JobState
    ) -> "tuple[Conditioning, Tensor]":
        params, seed = self.request.input, state.seed
        assert seed is not None
        with self.stage("preprocess"):
            conditioning = engine.encode(
                scene.portrait, scene.speech.waveform, scene.params, plan.size
            )
        with self.stage("denoise"):
            self._sparsity = engine.sparse_attention(params, seed)
            if state.restored is not None:
                self.progress.skip(plan.share_done(state.first_step))
            state.begin_denoising()
            preview = engine.preview(conditioning) if params.preview else None
            latents = engine.denoise(
                conditioning,
                params,
                seed,
                self._step_report(plan, preview),
                self._sparsity,
                state.restored,
                state.offer,
                preview,
            )
        logger.info(
            "denoised in %.1f s by %d processes",
            self.stage_seconds["denoise_seconds"],
            engine.num_gpus(params),
        )
        return conditioning, latents

    def _step_report(
        self, plan: JobPlan, preview: "FramePreview | None"
    ) -> Callable[[int, int], None]:
        """Reports each denoising step, and ends the loop when the job must not go on."""

        def on_step(step: int, num_steps: int) -> None:
            self.check()
            share = plan.share_done(step)
            picture = preview.data_url(share) if preview is not None else None
            self.progress.update(share, step=step, total_steps=num_steps, preview=picture)

        return on_step

    def _watched(
        self,
        chunks: Iterator[NDArray[np.uint8]],
        num_frames: int,
        thumbnail_path: Path | None,
        xmp: bytes,
    ) -> Iterator[NDArray[np.uint8]]:
        """The same frames, reported as they pass; the first one is kept as a picture if asked."""
        passed = 0
        for frames in chunks:
            self.check()
            if thumbnail_path is not None and passed == 0:
                write_thumbnail(frames[0], thumbnail_path, xmp)
            passed += len(frames)
            yield frames
            self.progress.update(passed / num_frames)

    def _output(self, engine: "Engine", video: dict[str, Any]) -> dict[str, Any]:
        params = self.request.input
        metrics = result.job_metrics(
            params,
            engine,
            self.stage_seconds,
            self.elapsed_seconds,
            self.settings.price_per_second,
            self._sparsity,
        )
        if self._state is not None:
            metrics |= self._state.metrics
        if self._drift is not None:
            metrics["drift"] = self._drift.summary()
        return result.video_output(params, video, metrics, self.settings.avatar_model)
