"""What a job brings: its portrait, its speech and its watermark, fetched, decoded and checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import JobInput
from worker.media.inputs import load_mark, load_portrait, load_speech
from worker.media.watermark import Mark
from worker.service.scene import Scene
from worker.settings import Settings
from worker.shapes import FrameSize

if TYPE_CHECKING:
    from worker.generation.engine import Engine

MIN_FACE_SHARE = 0.02  # of the image's short side: a smaller face has no latent of its own


@dataclass(frozen=True, slots=True)
class JobInputs:
    """What the model gets, what is drawn on it, and what both were made from."""

    scene: Scene
    mark: Mark | None  # on every frame
    digests: tuple[str, str]  # sha256 of the image's and the audio's file

    @classmethod
    def fetch(
        cls,
        params: JobInput,
        directory: Path,
        settings: Settings,
        engine: "Engine",
        *,
        require_fits: Callable[[float], None],
        check: Callable[[], None],
    ) -> "JobInputs":
        """The inputs of a request, whose files lie in the directory from then on.

        Args:
            require_fits: raises where a video of so many seconds cannot be delivered.
            check: raises once the job must not go on.

        Raises:
            WorkerError: one of them is not what it should be, by field.
        """
        portrait = load_portrait(params.image, directory, settings, check=check)
        _require_face_box_inside(params, portrait)
        check()
        [speaker, *others] = params.voices
        if others:
            message = "this worker's model follows one voice: send one speaker"
            raise InvalidInputError(message, field="speakers")
        speech = load_speech(
            speaker.audio,
            directory,
            settings,
            start_seconds=params.audio_start_seconds,
            max_seconds=params.max_seconds,
            check=check,
        )
        shape = (params.output.aspect, params.output.fit)
        engine.require_fits_memory(portrait, params.resolution, *shape)
        require_fits(speech.duration_seconds)
        scene = Scene.of(portrait, speech, params, engine)
        mark = _watermark(params, directory, settings, scene.framing.video, check)
        return cls(scene, mark, (_digest(directory / "image"), _digest(directory / "audio")))


def largest_bytes(params: JobInput, settings: Settings) -> int:
    """What the inputs may take on the disk: those that have to be fetched."""
    mark = params.output.watermark
    recordings = [each.audio for each in params.voices]
    sources = [params.image, *recordings, mark.image if mark is not None else None]
    fetched = sum(source is not None and source.url is not None for source in sources)
    return settings.max_input_bytes * fetched


def _require_face_box_inside(params: JobInput, portrait: Image.Image) -> None:
    if params.face_box is None:
        return
    x, y, width, height = params.face_box
    if x + width > portrait.width or y + height > portrait.height:
        raise InvalidInputError(
            f"reaches over the image's {portrait.width} x {portrait.height} pixels",
            field="face_box",
        )
    if min(width, height) < MIN_FACE_SHARE * min(portrait.size):
        raise InvalidInputError(
            f"must be at least {MIN_FACE_SHARE:.0%} of the image's short side", field="face_box"
        )


def _watermark(
    params: JobInput,
    directory: Path,
    settings: Settings,
    size: FrameSize,
    check: Callable[[], None],
) -> Mark | None:
    """What every frame of that size is marked with; None: nothing was asked for."""
    asked = params.output.watermark
    if asked is None:
        return None
    picture = None
    if asked.image is not None:
        picture = load_mark(asked.image, directory, settings, check=check)
    return Mark.of(asked, picture, size)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
