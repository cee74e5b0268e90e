"""What the model is shown: the portrait, or the part of it that the video's aspect ratio leaves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from avatar_client.contract.request import JobInput
from worker import framing
from worker.framing import Framing
from worker.generation.voices import Voice
from worker.media.inputs import Speech

if TYPE_CHECKING:
    from worker.generation.engine import Engine


@dataclass(frozen=True, slots=True)
class Scene:
    """One portrait and one speech, as the model gets them."""

    portrait: Image.Image
    speech: Speech
    params: JobInput  # the request's own, but for a face box in pixels of `portrait`
    framing: Framing

    @classmethod
    def of(
        cls, portrait: Image.Image, speech: Speech, params: JobInput, engine: "Engine"
    ) -> "Scene":
        """The scene that the request asks for.

        Raises:
            InvalidInputError: the aspect ratio that is asked for cuts the face.
        """
        output = params.output
        size = framing.size_of(portrait)
        shape = Framing.of(size, params.resolution, output.aspect, output.fit)
        if output.aspect != "source" and output.fit == "cover":
            face = engine.find_face(portrait, params)
            part = framing.cover(size, output.aspect, face)
            portrait = framing.cut(portrait, part, shape.model)
            if face is not None:
                face = framing.box_in_part(face, part, shape.model)
            params = params.model_copy(update={"face_box": face})
        return cls(portrait, speech, params, shape)

    @property
    def voices(self) -> list[Voice]:
        """Who speaks in it."""
        return [Voice(self.speech.waveform, self.params.face_box)]
