"""The making of one video: encoded, denoised, decoded, finished and written to a file.

What happens here costs the GPU's time. The job times it, tells of it and stops it between.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avatar_client.contract.request import JobInput
from avatar_client.version import __version__
from worker.generation.watch import Watch
from worker.media.drift import DriftMeter
from worker.media.encoding import Encoding
from worker.media.finishing import BLUR, finished
from worker.media.gif import GifWriter
from worker.media.provenance import (
    MAX_ADDED_BYTES,
    Credentials,
    Making,
    mark_picture,
    mark_video,
    xmp,
)
from worker.media.video import VideoFile, write_thumbnail, write_video
from worker.service.estimate import JobPlan
from worker.service.job_inputs import JobInputs
from worker.service.progress import ProgressReporter
from worker.service.resume import JobState
from worker.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from worker.generation.conditioning import Conditioning
    from worker.generation.engine import Engine
    from worker.generation.preview import FramePreview
    from worker.model.sparse_attention import SparseAttention

logger = logging.getLogger(__name__)

NO_PREVIEW = (
    "no preview is possible: the model has no map for it; python -m builder.preview adds one"
)


@dataclass(frozen=True, slots=True)
class MadeVideo:
    """What came of it."""

    file: VideoFile
    pictures: Mapping[str, Path]  # that were asked for, by the name of their field in `output`
    warnings: tuple[str, ...]
    speakers: list[dict[str, Any]]  # as the reply tells of them


@dataclass(slots=True, kw_only=True)
class Production:
    """A video that is being made, and what was seen of it so far."""

    params: JobInput
    settings: Settings
    engine: "Engine"
    plan: JobPlan
    inputs: JobInputs
    state: JobState  # of an earlier try, and of this one; has a seed
    directory: Path  # for its files
    max_bytes: int | None  # of the file
    stage: Callable[[str], AbstractContextManager[None]]  # as the job enters, times and tells it
    check: Callable[[], None]  # raises once the job must not go on
    progress: ProgressReporter
    drift: DriftMeter | None = None  # once there are frames
    sparsity: "SparseAttention | None" = None  # of the preset's attention, if it leaves keys out

    def run(self) -> MadeVideo:
        """The finished files.

        Raises:
            WorkerError: the model, the GPU, the encoder or the disk failed; the file is too large.
            Exception: what `check` raises.
        """
        credentials = self._credentials()  # read before the GPU works
        conditioning, latents = self._denoise()
        video, pictures = self._write(conditioning, latents, credentials)
        warnings = (
            *self.state.warnings,
            *self.inputs.scene.all_warnings,
            *conditioning.warnings,
            *preview_warnings(self.params, self.engine),
        )
        speakers = self.inputs.scene.told_speakers(conditioning.face_boxes)
        return MadeVideo(video, pictures, warnings, speakers)

    @property
    def seed(self) -> int:
        """Of the noise."""
        assert self.state.seed is not None
        return self.state.seed

    def _credentials(self) -> Credentials | None:
        try:
            return Credentials.of(self.settings)
        except RuntimeError as error:  # the start has checked them: they have expired since
            logger.error("the video is not signed: %s", error)
            return None

    def _denoise(self) -> "tuple[Conditioning, Tensor]":
        scene, state = self.inputs.scene, self.state
        with self.stage("preprocess"):
            conditioning = self.engine.encode(
                scene.portrait, scene.voices, scene.params, self.plan.size
            )
        with self.stage("denoise"):
            self.sparsity = self.engine.sparse_attention(self.params, self.seed)
            if state.restored is not None:
                self.progress.skip(self.plan.share_done(state.first_step))
            state.begin_denoising()
            preview = self.engine.preview(conditioning) if self.params.preview else None
            watch = Watch(
                on_step=self._step_report(preview),
                on_state=state.offer,
                preview=preview,
                sparsity=self.sparsity,
            )
            latents = self.engine.denoise(
                conditioning, self.params, self.seed, watch, state.restored
            )
        logger.info("denoised by %d processes", self.engine.num_gpus(self.params))
        return conditioning, latents

    def _step_report(self, preview: "FramePreview | None") -> Callable[[int, int], None]:
        """Reports each denoising step, and ends the loop when the job must not go on."""

        def on_step(step: int, num_steps: int) -> None:
            self.check()
            share = self.plan.share_done(step)
            picture = preview.data_url(share) if preview is not None else None
            self.progress.update(share, step=step, total_steps=num_steps, preview=picture)

        return on_step

    def _write(
        self, conditioning: "Conditioning", latents: "Tensor", credentials: Credentials | None
    ) -> tuple[VideoFile, Mapping[str, Path]]:
        """The video's file, and those of the pictures that were asked for."""
        params, scene, plan = self.params, self.inputs.scene, self.plan
        image_sha256, *audio_sha256 = self.inputs.digests
        making = Making(
            self.settings.avatar_model, __version__, self.seed, image_sha256, tuple(audio_sha256)
        )
        content_type = params.output.video_format.content_type
        pictures: dict[str, Path] = {}
        if params.output.thumbnail:
            pictures["thumbnail"] = self.directory / "thumbnail.jpg"
        gif = GifWriter(params.fps) if params.output.gif else None
        # closed, or a stopped job's frames are still decoded while the next job begins
        with (
            self.stage("decode"),
            closing(self.engine.decode_frames(conditioning, latents)) as frames,
        ):
            self.drift = DriftMeter(scene.portrait, conditioning.face_boxes, plan.video.num_frames)
            shown = finished(
                self.drift.watch(frames), scene.framing, params.output.background or BLUR
            )
            if self.inputs.mark is not None:
                shown = self.inputs.mark.on(shown)
            if gif is not None:
                shown = gif.watch(shown)
            video = write_video(
                self.directory / f"video{params.output.video_format.suffix}",
                self._watched(shown, pictures.get("thumbnail"), xmp(making)),
                fps=params.fps,
                height=plan.shown_size.height,
                width=plan.shown_size.width,
                recording=scene.soundtrack.recording,
                metadata={"seed": str(self.seed), "worker": __version__},
                encoding=encoding_of(params),
                mark=lambda path: mark_video(path, content_type, making, credentials),
                max_bytes=self.max_bytes and self.max_bytes - MAX_ADDED_BYTES,
            )
            if "thumbnail" in pictures:
                mark_picture(pictures["thumbnail"], making, credentials)
            if gif is not None:
                pictures["gif"] = self.directory / "preview.gif"
                gif.write(pictures["gif"], f"AI-generated; seed: {self.seed}")
        return video, pictures

    def _watched(
        self, chunks: Iterator[NDArray[np.uint8]], thumbnail_path: Path | None, xmp: bytes
    ) -> Iterator[NDArray[np.uint8]]:
        """The same frames, reported as they pass; the first one is kept as a picture if asked."""
        passed = 0
        for frames in chunks:
            self.check()
            if thumbnail_path is not None and passed == 0:
                write_thumbnail(frames[0], thumbnail_path, xmp)
            passed += len(frames)
            yield frames
            self.progress.update(passed / self.plan.video.num_frames)


def encoding_of(params: JobInput) -> Encoding:
    """How the request wants its video encoded."""
    output = params.output
    return Encoding.of(output.format, output.codec, output.quality)


def preview_warnings(params: JobInput, engine: "Engine") -> tuple[str, ...]:
    """What to tell a client who asks for previews that this model cannot give."""
    return (NO_PREVIEW,) if params.preview and engine.latent_to_rgb is None else ()
