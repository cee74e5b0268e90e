"""What the model is shown: the portrait, or the part of it that the video's aspect ratio leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from avatar_client.contract.request import JobInput
from worker import framing
from worker.framing import Framing
from worker.generation.voices import Voice
from worker.media.timeline import Soundtrack
from worker.shapes import Box

if TYPE_CHECKING:
    from worker.generation.engine import Engine


@dataclass(frozen=True, slots=True)
class Scene:
    """One portrait and those who speak in it, as the model gets them."""

    portrait: Image.Image
    soundtrack: Soundtrack
    params: JobInput  # the request's own, but for the first face's box in pixels of `portrait`
    framing: Framing
    # of each voice, in pixels of `portrait`; None, of one alone: it has not been looked for
    face_boxes: tuple[Box | None, ...]
    part: Box | None  # of the upright portrait that `portrait` was cut from; None: it is all of it
    warnings: tuple[str, ...] = ()  # for the client

    @classmethod
    def of(
        cls,
        portrait: Image.Image,
        soundtrack: Soundtrack,
        params: JobInput,
        face_boxes: Sequence[Box | None],  # of each voice
        engine: "Engine",
        warnings: tuple[str, ...] = (),
    ) -> "Scene":
        """The scene that the request asks for.

        Raises:
            InvalidInputError: the aspect ratio that is asked for cuts a face.
        """
        output = params.output
        size = framing.size_of(portrait)
        shape = Framing.of(size, params.resolution, output.aspect, output.fit)
        part = None
        if output.aspect != "source" and output.fit == "cover":
            if None in face_boxes:  # one voice alone
                face_boxes = [engine.find_face(portrait, params.resolution)]
            named = [box for box in face_boxes if box is not None]
            whose = "the face is" if len(named) < 2 else "the faces that speak are together"
            part = framing.cover(size, output.aspect, framing.around(named), whose)
            portrait = framing.cut(portrait, part, shape.model)
            face_boxes = [box and framing.box_in_part(box, part, shape.model) for box in face_boxes]
        params = params.model_copy(update={"face_box": face_boxes[0]})
        return cls(portrait, soundtrack, params, shape, tuple(face_boxes), part, warnings)

    @property
    def voices(self) -> list[Voice]:
        """Who speaks in it."""
        waveforms = self.soundtrack.waveforms
        return [Voice(*each) for each in zip(waveforms, self.face_boxes, strict=True)]

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Those of the recordings, too."""
        return (*self.soundtrack.warnings, *self.warnings)

    def told_speakers(self, used_boxes: Sequence[Box]) -> list[dict[str, Any]]:
        """Who spoke when and with which face, for a client: boxes are of the upright portrait.

        `used_boxes` are those that the model was told of, in pixels of `portrait`; none: the whole
        frame speaks.
        """
        return [
            {
                "face_box": None if box is None else self._told_box(box),
                "start_seconds": round(each.start_seconds, 3),
                "duration_seconds": round(each.speech.duration_seconds, 3),
            }
            for each, box in zip(self.soundtrack.voices, used_boxes or (None,), strict=True)
        ]

    def _told_box(self, box: Box) -> list[float]:
        if self.part is not None:
            box = framing.box_of_whole(box, self.part, framing.size_of(self.portrait))
        return [round(value, 1) for value in box]
