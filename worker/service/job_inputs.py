"""What a job brings: portrait, recordings and watermark, fetched, decoded and checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_client.contract.request import JobInput
from worker.media.inputs import load_mark, load_portrait
from worker.media.watermark import Mark
from worker.service import faces, soundtrack
from worker.service.faces import ShownFaces
from worker.service.scene import Scene
from worker.settings import Settings
from worker.shapes import FrameSize

if TYPE_CHECKING:
    from worker.generation.engine import Engine


@dataclass(frozen=True, slots=True)
class JobInputs:
    """What the model gets, what is drawn on it, and what both were made from."""

    scene: Scene
    mark: Mark | None  # on every frame
    digests: tuple[str, ...]  # sha256 of the image's file, and of each recording's
    faces: ShownFaces | None  # for a client who wants to choose; None: it makes a video

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
        chosen = faces.choose(params, portrait, engine)
        check()
        sound = soundtrack.load(params, directory, settings, check)
        shape = (params.output.aspect, params.output.fit)
        engine.require_fits_memory(portrait, params.resolution, *shape)
        require_fits(sound.duration_seconds)
        scene = Scene.of(portrait, sound, params, chosen.boxes, engine, chosen.warnings)
        mark = _watermark(params, directory, settings, scene.framing.video, check)
        files = ["image", *(params.field_of(index, "audio") for index in range(len(sound.voices)))]
        return cls(
            scene,
            mark,
            tuple(_digest(directory / name) for name in files),
            ShownFaces.of(portrait, params.resolution, engine) if params.dry_run else None,
        )


def largest_bytes(params: JobInput, settings: Settings) -> int:
    """What the inputs may take on the disk: those that have to be fetched."""
    mark = params.output.watermark
    recordings = [each.audio for each in params.voices]
    sources = [params.image, *recordings, mark.image if mark is not None else None]
    fetched = sum(source is not None and source.url is not None for source in sources)
    return settings.max_input_bytes * fetched


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
