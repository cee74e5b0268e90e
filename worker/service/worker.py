"""The life of one job: checked, fetched, generated, written, handed over, cleaned up.

The handler's coroutine waits while one thread does the work, so that the SDK can stop a job at any
time: a stop sets an event that the denoising loop meets at its next step, the thread ends, its
files are gone, and nothing is posted.
"""

import asyncio
import contextvars
import ctypes
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatar_client.contract.job_errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    WorkerError,
)
from avatar_client.contract.presets import PRESETS, computed_step_indices
from avatar_client.version import __version__
from worker import import_guard, logs
from worker.media.inputs import Speech, load_portrait, load_speech
from worker.media.video import write_thumbnail, write_video
from worker.service import job_request
from worker.service.delivery import Delivery
from worker.service.estimate import Speedometer, job_flops, work_share
from worker.service.job_request import JobRequest
from worker.service.progress import PostProgress, ProgressReporter
from worker.settings import Settings
from worker.shapes import VideoPlan, count_frames, fit_size

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from worker.generation.engine import Engine

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.5  # between two looks whether the thread waits for a lost process


class _StoppedError(Exception):
    """The client cancelled the job: nothing is posted."""


@dataclass(slots=True)
class Run:
    """One job on its way through the worker's thread."""

    request: JobRequest
    progress: ProgressReporter
    deadline_seconds: float  # 0: none
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    directory: Path | None = None  # of its files, while there are any

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
        """Raises if the job must not go on."""
        if self.stop.is_set():
            raise _StoppedError
        if self.deadline_seconds and self.elapsed_seconds > self.deadline_seconds:
            raise DeadlineExceededError(
                f"the job took longer than this worker's limit of {self.deadline_seconds:g} s"
            )


class Worker:
    """Serves one job after another with one loaded model.

    Args:
        settings: what the operator set.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.load_error: Exception | None = None
        self._damaged = False
        self._engine: Engine | None = None
        self._speed = Speedometer()
        # one thread: one job on the GPU, also while a stopped one is still leaving it
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def load(self) -> None:
        """Loads the model; a failure is kept in `load_error` for the fitness check."""
        try:
            self.engine  # noqa: B018 (a property that loads)
        except Exception as error:
            logger.exception("the model could not be loaded")
            self.load_error = error

    @property
    def engine(self) -> "Engine":
        """The loaded model; loads it on first use."""
        if self._engine is None:
            from worker.generation.engine import Engine  # imports torch

            self._engine = Engine.start(self.settings)
            self._speed.gpu_name = self._engine.gpu_name
            self._speed.num_gpus = self._engine.num_ranks
        return self._engine

    @property
    def damaged(self) -> bool:
        """Whether the process must not run another job."""
        return self._damaged or (self._engine is not None and self._engine.is_lost)

    def leave(self) -> None:
        """Ends the other GPUs' processes, if there are any, and this one with them.

        At once: the thread may wait for one of them in vain, and torch's own end does.
        """
        if self._engine is None or self._engine.num_ranks == 1:
            return
        self._engine.close()
        for process in multiprocessing.active_children():  # the SDK's, which would go on
            process.terminate()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if self.damaged else 0)

    async def handle(
        self, job: dict[str, Any], *, post: PostProgress | None = None
    ) -> dict[str, Any]:
        """One job in, its output out. A failure comes back as `{"error": ...}`, never raised.

        Args:
            job: as the queue gives it: `id`, `input`, perhaps `s3Config`.
            post: sends a progress payload to the client; None: nobody listens.

        Raises:
            asyncio.CancelledError: the job was stopped; its thread has ended by then, unless it
                waits for another GPU in vain.
        """
        logs.job_id.set(job_request.safe_id(job.get("id")))
        try:
            request = job_request.parse(job)
        except WorkerError as error:
            logger.warning("refused: %s", error)
            return error.to_output(stage="parse")
        async with ProgressReporter(post) as progress:
            run = Run(request, progress, self.settings.job_timeout_seconds)
            context = contextvars.copy_context()  # the job's id, for the thread's log lines
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._thread, context.run, self._outcome, run)
            try:
                failure = await self._given_up(work, run)
            except asyncio.CancelledError:
                run.stop.set()
                await self._ended(work, run)
                logger.info("stopped after %.1f s", run.elapsed_seconds)
                raise
            return failure.to_output(stage=progress.stage) if failure else work.result()

    async def _given_up(self, work: "asyncio.Future[Any]", run: Run) -> WorkerError | None:
        """Waits until the thread ends, or waits for another GPU in vain: that job's error."""
        while not work.done():
            await asyncio.wait({work}, timeout=WATCH_SECONDS)
            failure = self._engine.stuck_error if self._engine else None
            if failure is not None and not work.done():
                logger.error("given up in %s: %s", run.progress.stage, failure)
                if run.directory is not None:
                    shutil.rmtree(run.directory, ignore_errors=True)
                return failure
        return None

    async def _ended(self, work: "asyncio.Future[Any]", run: Run) -> None:
        """The same, however often the job is stopped meanwhile."""
        while True:
            with suppress(asyncio.CancelledError):
                await self._given_up(work, run)
                return

    def _outcome(self, run: Run) -> dict[str, Any]:
        """The output of a job, whatever happens in it. Runs in the worker's thread."""
        try:
            output = self._result(run)
            json.dumps(output, allow_nan=False)  # the SDK drops what is not JSON without a word
            logger.info("done in %.1f s", run.elapsed_seconds)
            return output
        except _StoppedError:
            return {}
        except WorkerError as error:
            logger.warning("failed in %s: %s", run.progress.stage, error, exc_info=error.__cause__)
            failure = error
        except Exception:
            reference = secrets.token_hex(4)
            logger.exception("unforeseen failure, reference %s", reference)
            failure = InternalError(f"something unforeseen went wrong; reference {reference}")
        finally:
            _give_back_memory()
        self._damaged |= failure.refresh_worker
        return failure.to_output(stage=run.progress.stage)

    def _result(self, run: Run) -> dict[str, Any]:
        request = run.request
        delivery = Delivery.choose(request, self.settings)
        if not request.input.dry_run and (stored := delivery.recall(request.fingerprint)):
            logger.info("already in the bucket: nothing is generated")
            return self._output(run, stored | {"reused": True})
        with tempfile.TemporaryDirectory(prefix="avatar-") as directory:
            run.directory = Path(directory)
            with run.stage("download"):
                portrait, speech = self._fetch(run, Path(directory))
                delivery.require_room(speech.duration_seconds)
            if request.input.dry_run:
                return self._plan(run, delivery, portrait, speech)
            return self._generate(run, delivery, portrait, speech, Path(directory))

    def _fetch(self, run: Run, directory: Path) -> tuple["Image.Image", Speech]:
        params = run.request.input
        portrait = load_portrait(params.image, directory, self.settings)
        run.check()
        speech = load_speech(
            params.audio,
            directory,
            self.settings,
            start_seconds=params.audio_start_seconds,
            max_seconds=params.max_seconds,
        )
        if params.face_box is not None:
            x, y, width, height = params.face_box
            if x + width > portrait.width or y + height > portrait.height:
                raise InvalidInputError(
                    f"reaches over the image's {portrait.width} x {portrait.height} pixels",
                    field="face_box",
                )
        self.engine.require_fits_memory(portrait, params.resolution)
        return portrait, speech

    def _plan(
        self, run: Run, delivery: Delivery, portrait: "Image.Image", speech: Speech
    ) -> dict[str, Any]:
        """The answer to a dry run."""
        params = run.request.input
        size = fit_size(portrait.height, portrait.width, params.resolution)
        video = VideoPlan(count_frames(len(speech.waveform), params.fps))
        steps, schedule = params.num_inference_steps, PRESETS[params.preset].step_cache_schedule
        flops = job_flops(video, size, steps, schedule)
        return {
            "dry_run": True,
            "plan": {
                "width": size.width,
                "height": size.height,
                "num_frames": video.num_frames,
                "fps": params.fps,
                "duration_seconds": round(speech.duration_seconds, 3),
                "num_windows": video.num_windows,
                "num_inference_steps": steps,
                "num_computed_steps": len(computed_step_indices(steps, schedule)),
                **delivery.describe(),
            },
            "estimate_seconds": self._speed.estimate_seconds(flops),
            "user_data": params.user_data,
            "worker": self._identity(),
        }

    def _generate(
        self,
        run: Run,
        delivery: Delivery,
        portrait: "Image.Image",
        speech: Speech,
        directory: Path,
    ) -> dict[str, Any]:
        params, engine = run.request.input, self.engine
        seed = job_request.draw_seed() if params.seed is None else params.seed

        with run.stage("preprocess"):
            conditioning = engine.encode(portrait, speech.waveform, params)
        with run.stage("denoise"):
            latents = engine.denoise(conditioning, params, seed, _step_report(run))
        logger.info(
            "denoised in %.1f s by %d processes",
            run.stage_seconds["denoise_seconds"],
            engine.num_gpus(params),
        )
        size = fit_size(portrait.height, portrait.width, params.resolution)
        schedule = PRESETS[params.preset].step_cache_schedule
        flops = job_flops(conditioning.plan, size, params.num_inference_steps, schedule)
        self._speed.record(flops, run.stage_seconds["denoise_seconds"])

        # closed, or a stopped job's frames are still decoded while the next job begins
        with run.stage("decode"), closing(engine.decode_frames(conditioning, latents)) as frames:
            thumbnail_path = directory / "thumbnail.jpg" if params.output.thumbnail else None
            video = write_video(
                directory / "video.mp4",
                _watched(frames, run, conditioning.num_frames, thumbnail_path),
                fps=params.fps,
                height=conditioning.height,
                width=conditioning.width,
                recording=speech.recording,
                metadata={"seed": str(seed), "worker": __version__},
                max_bytes=delivery.max_bytes,
            )
        facts = {
            "sha256": video.sha256,
            "size_bytes": video.size_bytes,
            "duration_seconds": round(video.duration_seconds, 3),
            "num_frames": video.num_frames,
            "fps": params.fps,
            "width": conditioning.width,
            "height": conditioning.height,
            "seed": seed,
            "warnings": list(conditioning.warnings),
        }
        with run.stage("upload"):
            handed_over = delivery.hand_over(video, thumbnail_path, run.request.fingerprint, facts)
        return self._output(run, facts | handed_over)

    def _output(self, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
        params = run.request.input
        engine = self._engine
        return {
            **facts,
            "content_type": "video/mp4",
            "parameters": params.model_dump(
                mode="json",
                include={
                    "preset",
                    "resolution",
                    "num_inference_steps",
                    "guidance_scale",
                    "flow_shift",
                    "motion",
                },
            ),
            "user_data": params.user_data,
            "metrics": {
                **run.stage_seconds,
                "total_seconds": round(run.elapsed_seconds, 3),
                "peak_memory_gib": engine.peak_memory_gib if engine else None,
                "gpu": engine.gpu_name if engine else None,
                "num_gpus": engine.num_gpus(params) if engine else None,
                **_load_metrics(engine),
            },
            "worker": self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": self.settings.avatar_model,
            "imports": import_guard.report().brief(),
        }


def _load_metrics(engine: "Engine | None") -> dict[str, float | None]:
    """How this worker's model was loaded; None where nothing was read from a disk."""
    report = engine.load_report if engine else None
    ratio = report.disk_ratio if report else None
    return {
        "model_load_seconds": round(engine.load_seconds, 1) if engine else None,
        "model_load_bytes": report.num_bytes if report else None,
        "model_load_gigabytes_per_second": (
            round(report.bytes_per_second / 1e9, 2) if report else None
        ),
        "model_load_disk_ratio": None if ratio is None else round(ratio, 2),
    }


def _step_report(run: Run) -> Callable[[int, int], None]:
    """Reports each denoising step, and ends the loop when the job must not go on."""

    schedule = PRESETS[run.request.input.preset].step_cache_schedule

    def on_step(step: int, num_steps: int) -> None:
        run.check()
        share = work_share(step, num_steps, schedule)
        run.progress.update(share, step=step, total_steps=num_steps)

    return on_step


def _watched(
    chunks: Iterator["np.ndarray"], run: Run, num_frames: int, thumbnail_path: Path | None
) -> Iterator["np.ndarray"]:
    """The same frames; reports them as they pass and keeps the first as a picture if asked."""
    passed = 0
    for frames in chunks:
        run.check()
        if thumbnail_path is not None and passed == 0:
            write_thumbnail(frames[0], thumbnail_path)
        passed += len(frames)
        yield frames
        run.progress.update(passed / num_frames)


def _give_back_memory() -> None:
    """Returns what the job has freed to the system: glibc keeps it, and the process would swell."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
