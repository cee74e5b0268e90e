"""The part of the page for several people: a click on a face gives it a recording.

It holds the faces that were found and who of them speaks, in the order of the clicks. With one
speaker or more the page's own recording is not used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from avatar_client.contract.speakers import MAX_NAME_CHARACTERS, MAX_SPEAKERS
from studio import views
from studio.faces import Box, Faces

# What a button on a face tells the page.
TELL_FACE = """element.addEventListener("click", (event) => {
  const face = event.target.closest("button[data-face]");
  if (face) trigger("click", {face: Number(face.dataset.face)});
})"""
# Of a request: what belongs to `audio`, and each speaker has in another form.
OF_ONE_RECORDING = ("face_box", "audio_start_seconds")

Updates = dict[Component, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """The controls of one speaker."""

    group: gr.Group
    title: gr.HTML
    audio: gr.Audio
    name: gr.Textbox
    start: gr.Number
    remove: gr.Button

    @property
    def inputs(self) -> list[Component]:
        """What a person enters."""
        return [self.audio, self.name, self.start]


@dataclass(frozen=True, slots=True)
class Speaker:
    """One row of the page as it was filled in."""

    box: Box
    audio: Path | None = None
    name: str = ""
    start_seconds: float = 0.0

    def field(self) -> dict[str, Any]:
        """The speaker as a request has it; `audio` is a path."""
        field: dict[str, Any] = {"audio": self.audio, "face_box": list(self.box)}
        if self.name.strip():
            field["name"] = self.name.strip()
        if self.start_seconds:
            field["start_seconds"] = self.start_seconds
        return field

    @classmethod
    def of(cls, field: Mapping[str, Any]) -> "Speaker":
        """The row that gives the field."""
        x, y, width, height = field["face_box"]
        start_seconds = field.get("start_seconds", 0.0)
        return cls((x, y, width, height), field["audio"], field.get("name", ""), start_seconds)


class SpeakersPart:
    """Its components, drawn where it is made.

    Args:
        error_slot: makes the place of an error, by the name of the field.
    """

    def __init__(self, error_slot: Callable[[str], None]) -> None:
        self.find = gr.Button("Find the faces", size="md")
        error_slot("speakers")
        self.faces = gr.HTML(visible=False, js_on_load=TELL_FACE)
        self.found = gr.State(None)
        self.speaking: gr.State = gr.State([])  # the boxes of those who speak
        self.rows = [self._row(index, error_slot) for index in range(MAX_SPEAKERS)]

    @property
    def inputs(self) -> list[Component]:
        """What the requests are made of."""
        return [self.speaking, *(part for row in self.rows for part in row.inputs)]

    @property
    def outputs(self) -> list[Component]:
        """What `show` changes."""
        shown = [part for row in self.rows for part in (row.group, row.title, *row.inputs)]
        return [self.faces, self.found, self.speaking, *shown]

    def entered(self, entered: Mapping[Component, Any]) -> list[Speaker]:
        """Who speaks, as the components say before gradio has looked at them."""
        speakers = []
        for row, box in zip(self.rows, entered[self.speaking], strict=False):
            file = entered[row.audio]
            speakers.append(
                Speaker(
                    tuple(box),
                    Path(file["path"]) if file else None,
                    entered[row.name] or "",
                    entered[row.start] or 0.0,
                )
            )
        return speakers

    def show(self, found: Faces | None, speakers: Sequence[Speaker]) -> Updates:
        """The faces, and a row for each who speaks."""
        speaking = [speaker.box for speaker in speakers]
        picture = views.faces(found, speaking) if found else ""
        updates: Updates = {
            self.faces: gr.HTML(picture, visible=found is not None),
            self.found: found,
            self.speaking: speaking,
        }
        for number, row in enumerate(self.rows, 1):
            speaker = speakers[number - 1] if number <= len(speakers) else None
            face = ""
            if speaker is not None and found is not None and speaker.box in found.boxes:
                face = f": face {found.boxes.index(speaker.box) + 1}"
            audio = str(speaker.audio) if speaker and speaker.audio else None
            updates |= {
                row.group: gr.Group(visible=speaker is not None),
                row.title: f"<strong>Speaker {number}{face}</strong>",
                row.audio: audio,
                row.name: speaker.name if speaker else "",
                row.start: speaker.start_seconds if speaker else 0,
            }
        return updates

    def choose(self, face: int, found: Faces | None, speakers: list[Speaker]) -> Updates:
        """After a click on a face: it speaks from now on, if it did not."""
        if found is not None and face < len(found.boxes) and len(speakers) < MAX_SPEAKERS:
            box = found.boxes[face]
            if box not in [speaker.box for speaker in speakers]:
                speakers = [*speakers, Speaker(box)]
        return self.show(found, speakers)

    def _row(self, index: int, error_slot: Callable[[str], None]) -> Row:
        name = f"speakers.{index}"
        with gr.Group(visible=False, elem_id=name) as group:
            title = gr.HTML(elem_classes="speaker")
            audio = gr.Audio(
                label=f"Recording {index + 1}",
                type="filepath",
                sources=["upload", "microphone"],
                buttons=["download"],
                elem_id=f"{name}.audio",
            )
            with gr.Row():
                spoken_by = gr.Textbox(label="Name", max_length=MAX_NAME_CHARACTERS)
                start = gr.Number(
                    0, label="Starts at", info="In seconds; in turn: after the one before."
                )
            remove = gr.Button("Remove", size="sm")
        error_slot(name)
        return Row(group, title, audio, spoken_by, start, remove)
