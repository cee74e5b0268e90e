"""The page: its layout, and what each of its controls does.

A page holds no more than the id of the job that it shows, which also stands in its address. The
jobs themselves run beside it, in `studio.tracker`.
"""

import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.themes import Default
from pydantic import SecretStr

from avatar_client import AuthenticationError, EndpointError
from avatar_client.contract.bucket import BucketSettings
from avatar_client.contract.job_errors import InvalidInputError, WorkerError
from studio import faces, snippets, views
from studio.connection import Connection
from studio.faces import Faces
from studio.fields import Control, controls, is_output, page_values, request_fields
from studio.speakers import OF_ONE_RECORDING, Speaker, SpeakersPart
from studio.tracker import JobState, JobTracker
from worker.settings import Settings

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
UPLOADS_CLEANUP = (3600, 86_400)  # s between two, and kept; a job has its own copies
UNFOLDED = ("prompt", "preset")  # the others are folded away
OF_SPEAKERS = ("order", "pause_seconds")
MAX_FILE_BYTES = Settings.model_fields["max_input_bytes"].default

# The job that is shown stands in the address, so that a reload finds it and tabs differ.
SET_JOB_IN_ADDRESS = """(id) => {
  const address = new URL(location);
  id ? address.searchParams.set("job", id) : address.searchParams.delete("job");
  history.replaceState(null, "", address);
}"""
# On a phone the result stands far below the button, and an error may stand far above it.
SCROLL_TO_OUTCOME = """() => setTimeout(() => {
  const error = document.querySelector("p.field-error");
  const outcome = error ?? document.querySelector("#result .card, #result video");
  outcome?.scrollIntoView({behavior: "smooth", block: error ? "center" : "nearest"});
}, 200)"""

Updates = dict[Component, Any]


class FormError(Exception):
    """What a person has to correct first, at one field of the page."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class Page:
    """The page of one studio.

    Args:
        tracker: the studio's jobs.
        default: what a page uses unless its user names another; None: there is no key for it.
        endpoint: the name that the page begins with.
        uploads: a bucket for large inputs of endpoints that a user names.
    """

    def __init__(
        self,
        tracker: JobTracker,
        default: Connection | None,
        *,
        endpoint: str,
        uploads: BucketSettings | None,
    ) -> None:
        self._tracker = tracker
        self._default = default
        self._endpoint = endpoint
        self._uploads = uploads
        self._inputs: dict[str, Component] = {}  # by the field's name
        self._errors: dict[str, gr.HTML] = {}
        self.blocks = self._build()

    # Layout

    def _build(self) -> gr.Blocks:
        with gr.Blocks(
            title="Avatar studio", analytics_enabled=False, delete_cache=UPLOADS_CLEANUP
        ) as blocks:
            gr.Markdown(
                "# Avatar studio\nA portrait and a recording become a talking-avatar video.",
                elem_classes="heading",
            )
            if self._default is not None and self._default.note:
                gr.HTML(views.note(self._default.note))
            self._shown = gr.Textbox(visible=False)  # the id of the job
            self._listed = gr.State([])  # the ids in the history
            self._session = gr.State(None)  # the connection that was typed in
            self._timer = gr.Timer(REFRESH_SECONDS, active=False)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._build_inputs()
                with gr.Column(scale=6, min_width=320, elem_id="result"):
                    self._build_result()
            self._connect_events(blocks)
        return blocks

    def _build_inputs(self) -> None:
        self._inputs["image"] = gr.Image(
            label="Portrait",
            type="filepath",
            sources=["upload", "clipboard"],
            height=220,
            buttons=[],
            elem_id="image",
        )
        self._error_slot("image")
        self._inputs["audio"] = gr.Audio(
            label="Speech",
            type="filepath",
            sources=["upload", "microphone"],
            buttons=["download"],
            elem_id="audio",
        )
        self._error_slot("audio")
        known = controls()
        self._speakers_section = gr.Accordion("Several speakers", open=False)
        with self._speakers_section:
            self._speakers = SpeakersPart(self._error_slot)
            with gr.Row():
                for name in OF_SPEAKERS:
                    with gr.Column(min_width=200):
                        self._control(known[name])
        for name in UNFOLDED:
            self._control(known[name])
        self._settings_section = gr.Accordion("Settings", open=False)
        rest = [known[name] for name in known if name not in (*UNFOLDED, *OF_SPEAKERS)]
        with self._settings_section:
            self._controls([control for control in rest if not is_output(control.name)])
        self._output_section = gr.Accordion("Output", open=False)
        with self._output_section:
            self._controls([control for control in rest if is_output(control.name)])
        self._endpoint_section = gr.Accordion("Endpoint", open=self._default is None)
        with self._endpoint_section:
            self._build_endpoint()
        self._make = gr.Button("Make the video", variant="primary", size="lg", elem_id="make")

    def _build_endpoint(self) -> None:
        self._inputs["endpoint"] = gr.Textbox(
            label="Endpoint",
            info="The id of an endpoint on RunPod, or its URL.",
            value=self._endpoint,
            elem_id="endpoint",
        )
        self._error_slot("endpoint")
        hint = "Stays in the studio's memory, for this page alone."
        if self._default is not None:
            hint += " Empty: the studio's own key, for its own endpoint."
        self._inputs["key"] = gr.Textbox(
            "",
            label="API key",
            info=hint,
            type="password",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="key",
        )
        self._error_slot("key")
        self._connect = gr.Button("Connect", size="sm")
        self._connected = gr.HTML(elem_classes="caption")

    def _build_result(self) -> None:
        self._status = gr.HTML(views.EMPTY)
        self._headline = gr.HTML(
            elem_classes="speech-only",
            js_on_load='element.setAttribute("aria-live", "polite")',
        )
        self._video = gr.HTML(visible=False)
        self._caption = gr.HTML(visible=False)
        self._actions = gr.Row(visible=False)
        with self._actions:
            self._cancel = gr.Button("Cancel", visible=False, size="md")
            self._download = gr.DownloadButton("Download", visible=False, size="md")
            self._again = gr.Button("Use its inputs again", visible=False, size="md")
        self._cancel_error = gr.HTML(visible=False)
        self._history = gr.Gallery(
            label="Your videos",
            columns=4,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            fit_columns=False,
            buttons=[],
            visible=False,
            elem_id="history",
        )
        with gr.Accordion("This request as code", open=False):
            gr.Markdown("Files are read where it runs; the key comes from `RUNPOD_API_KEY`.")
            with gr.Tab("curl"):
                self._curl = gr.Code(
                    label="curl", language="shell", interactive=False, wrap_lines=True
                )
            with gr.Tab("Python"):
                self._python = gr.Code(
                    label="Python", language="python", interactive=False, wrap_lines=True
                )

    def _controls(self, controls: list[Control]) -> None:
        """Long texts across the whole width, the others beside each other."""
        for control in controls:
            if control.is_long:
                self._control(control)
        with gr.Row():
            for control in controls:
                if not control.is_long:
                    with gr.Column(min_width=200):
                        self._control(control)

    def _control(self, control: Control) -> None:
        """The component for a field, and the place of its error."""
        component: Component
        initial_values = self._default.initial_values if self._default else {}
        value = initial_values.get(control.name, control.default)
        common = {"label": control.label, "info": control.help, "elem_id": control.name}
        if control.kind == "choice":
            choices = [(control.choice_label(each), each) for each in control.choices]
            component = gr.Radio(choices, value="" if value is None else value, **common)
        elif control.kind == "check":
            component = gr.Checkbox(value, **common)
        elif control.kind == "slider":
            component = gr.Slider(
                control.minimum,
                control.maximum,
                value=value,
                step=control.step,
                buttons=["reset"],
                **common,
            )
        elif control.kind == "number" and control.default is not None:
            # its limits are checked with all others, and reported at the field
            component = gr.Number(value, precision=0 if control.is_integer else None, **common)
        else:  # also a number that may be missing: gradio's own shows 0 then
            component = gr.Textbox(
                value or "",
                lines=2 if control.is_long else 1,
                max_length=control.max_characters,
                **common,
            )
        self._inputs[control.name] = component
        self._error_slot(control.name)

    def _error_slot(self, name: str) -> None:
        self._errors[name] = gr.HTML(visible=False)

    # What happens

    def _connect_events(self, blocks: gr.Blocks) -> None:
        # Not through gradio's queue: an event that is sent while its stream of answers is being
        # closed, as when a field is left for the button, would never be answered.
        options = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        speakers = self._speakers
        entered = {*self._inputs.values(), *speakers.inputs, self._session}
        result = [
            self._shown,
            self._timer,
            self._status,
            self._headline,
            self._video,
            self._caption,
            self._actions,
            self._cancel,
            self._download,
            self._again,
            self._cancel_error,
            self._history,
            self._listed,
        ]
        sections = [
            *(self._speakers_section, self._settings_section, self._output_section),
            self._endpoint_section,
        ]
        errors = [*self._errors.values(), *sections]
        connection = [self._session, self._inputs["key"], self._connected]
        form = [self._inputs[name] for name in ("image", "audio", *controls())]
        filled = [*form, *speakers.outputs]

        blocks.load(self._open, None, [*result, *errors, *filled], **options)
        self._make.click(self._show_sending, None, [self._make, *errors], **options).then(
            self._start,
            entered,
            [self._make, *result, *errors, *connection],
            preprocess=False,  # gradio's own would decode the image; the schema checks the rest
            **options,
        ).then(None, self._shown, None, js=SET_JOB_IN_ADDRESS, **options).then(
            None, None, None, js=SCROLL_TO_OUTCOME, **options
        )
        self._timer.tick(self._refresh, self._shown, [*result, *errors], **options)
        self._cancel.click(self._cancel_job, self._shown, result, **options)
        self._history.select(self._select, self._listed, result, **options).then(
            None, self._shown, None, js=SET_JOB_IN_ADDRESS, **options
        ).then(None, None, None, js=SCROLL_TO_OUTCOME, **options)
        self._again.click(self._refill, self._shown, filled, **options)
        gr.on(
            [self._connect.click, self._inputs["key"].submit],
            self._connect_to,
            [self._inputs["endpoint"], self._inputs["key"], self._session],
            [*errors, *connection],
            **options,
        )
        changes = [self._inputs[name].change for name in self._inputs if name != "key"]
        changes += [part.change for part in speakers.inputs]
        gr.on(
            [blocks.load, *changes],
            self._write_snippets,
            {*form, *speakers.inputs, self._inputs["endpoint"]},
            [self._curl, self._python],
            trigger_mode="always_last",
            preprocess=False,
            **options,
        )

        self._connect_speakers(entered, [*errors, *connection], options)

    def _connect_speakers(
        self, entered: set[Component], errors: list[Component], options: dict[str, Any]
    ) -> None:
        part, image = self._speakers, self._inputs["image"]
        speech = self._inputs["audio"]
        assert isinstance(image, gr.Image)
        raw = {**options, "preprocess": False}
        shown = [*part.outputs, speech]
        part.find.click(self._show_looking, None, [part.find, *errors], **options).then(
            self._find_faces, {*entered, part.found}, [part.find, *shown, *errors], **raw
        )
        part.faces.click(self._choose_face, {part.found, *part.inputs}, shown, **raw)
        for index, row in enumerate(part.rows):
            remove = partial(self._remove_speaker, index)
            row.remove.click(remove, {part.found, *part.inputs}, shown, **raw)
        # boxes are of one portrait
        gr.on([image.upload, image.clear], self._forget_faces, None, shown, **options)

    def _open(self, request: gr.Request) -> Updates:
        """A page that is opened or loaded again: the job in its address, and that job's inputs."""
        job = request.query_params.get("job")
        state = self._tracker.state(job)
        updates = self._result(state) | self._listing() | self._worker_error(state)
        return updates | (self._refill(state.record.id) if state else {})

    def _show_sending(self) -> Updates:
        return {self._make: gr.Button("Sending", interactive=False), **self._clear_errors()}

    async def _start(self, entered: dict[Component, Any]) -> Updates:
        """Sends the job; the errors at the fields, or the job at work."""
        ready: Updates = {self._make: gr.Button("Make the video", interactive=True)}
        try:
            connection, used = self._connection(
                entered[self._inputs["endpoint"]],
                entered[self._inputs["key"]],
                entered[self._session],
            )
            fields = self._fields(entered)
            portrait = self._file(entered, "image")
            for index, speaker in enumerate(fields.get("speakers", ())):
                if speaker["audio"] is None:
                    raise FormError(f"speakers.{index}.audio", "is missing")
            speech = None if "speakers" in fields else self._file(entered, "audio")
            record = await self._tracker.start(connection, portrait, speech, fields)
        except (FormError, WorkerError, EndpointError, ValueError) as error:
            return ready | self._error(error)
        except Exception as error:  # the button has to come back
            logger.error("a job could not be sent: %s", type(error).__name__)
            failed = RuntimeError(f"The studio itself failed ({type(error).__name__}).")
            return ready | self._error(failed)
        return ready | used | self._result(self._tracker.state(record.id)) | self._listing()

    def _refresh(self, shown: str) -> Updates:
        state = self._tracker.state(shown)
        if state is not None and not state.record.is_over and state.is_tracked:
            return {
                self._status: views.status(state),
                self._headline: views.headline(state),
            }
        return self._result(state) | self._listing() | self._worker_error(state)

    async def _cancel_job(self, shown: str) -> Updates:
        failure: Updates = {}
        try:
            await self._tracker.cancel(shown)
        except EndpointError as error:
            text = views.failure("The job could not be cancelled.", str(error))
            failure = {self._cancel_error: gr.HTML(text, visible=True)}
        return self._result(self._tracker.state(shown)) | self._listing() | failure

    def _select(self, listed: list[str], event: gr.SelectData) -> Updates:
        return self._result(self._tracker.state(listed[event.index]))

    def _refill(self, shown: str) -> Updates:
        """The form as it was when the job was sent."""
        record = self._tracker.history.get(shown)
        if record is None:
            return {}
        history = self._tracker.history
        portrait, speech = history.portrait(record), history.speech(record)
        speakers = [Speaker.of(each) for each in history.fields(record).get("speakers", ())]
        found = None
        if speakers:
            with suppress(InvalidInputError):
                found = Faces.of(portrait, sorted(speaker.box for speaker in speakers))
        values = {
            **page_values(record.fields),
            "image": str(portrait),
            "audio": gr.Audio(str(speech) if speech else None, visible=not speakers),
        }
        updates = {self._inputs[name]: value for name, value in values.items()}
        return updates | self._speakers.show(found, speakers)

    def _show_looking(self) -> Updates:
        looking = gr.Button("Looking for faces", interactive=False)
        return {self._speakers.find: looking, **self._clear_errors()}

    async def _find_faces(self, entered: dict[Component, Any]) -> Updates:
        """The faces that the endpoint finds in the portrait; who spoke is chosen anew."""
        ready: Updates = {self._speakers.find: gr.Button("Find the faces", interactive=True)}
        try:
            connection, used = self._connection(
                entered[self._inputs["endpoint"]],
                entered[self._inputs["key"]],
                entered[self._session],
            )
            portrait = self._file(entered, "image")
            found = await faces.find(connection, portrait, self._fields(entered))
        except (FormError, WorkerError, EndpointError, ValueError) as error:
            if isinstance(error, EndpointError) and not isinstance(error, AuthenticationError):
                error = FormError("speakers", f"cannot be chosen: {error}")
            return ready | self._error(error)
        return ready | used | self._show_speakers(found, [])

    def _choose_face(self, entered: dict[Component, Any], event: gr.EventData) -> Updates:
        found, speakers = entered[self._speakers.found], self._speakers.entered(entered)
        return self._speakers.choose(event.face, found, speakers) | self._speech(hidden=True)

    def _remove_speaker(self, index: int, entered: dict[Component, Any]) -> Updates:
        speakers = self._speakers.entered(entered)
        del speakers[index]
        return self._show_speakers(entered[self._speakers.found], speakers)

    def _forget_faces(self) -> Updates:
        return self._show_speakers(None, [])

    def _show_speakers(self, found: Faces | None, speakers: list[Speaker]) -> Updates:
        return self._speakers.show(found, speakers) | self._speech(hidden=bool(speakers))

    def _speech(self, *, hidden: bool) -> Updates:
        """The page's one recording, which speakers with their own take the place of."""
        return {self._inputs["audio"]: gr.Audio(visible=not hidden)}

    async def _connect_to(self, endpoint: str, key: str, session: Connection | None) -> Updates:
        try:
            connection, used = self._connection(endpoint, key, session)
            health = await connection.health()
        except (FormError, EndpointError, ValueError) as error:
            return (
                self._clear_errors() | {self._connected: ""} | self._error(error, self._connected)
            )
        self._tracker.resume(connection)
        return self._clear_errors() | used | {self._connected: views.connected(health)}

    async def _write_snippets(self, entered: dict[Component, Any]) -> Updates:
        # a coroutine and so in no thread: the answers come in the order of the questions
        endpoint = entered[self._inputs["endpoint"]].strip()
        own = self._default if endpoint == self._endpoint else None
        try:
            request = snippets.Request(
                endpoint=own.url if own else endpoint or "ENDPOINT_ID",
                fields=self._written_fields(entered),
                key_path=str(own.key_path) if own and own.key_path else None,
            )
            return {self._curl: snippets.curl(request), self._python: snippets.python(request)}
        except (InvalidInputError, ValueError):
            return {}  # what is wrong is said when the video is made

    # Parts of answers

    def _fields(self, entered: dict[Component, Any]) -> dict[str, Any]:
        """The fields of the request, beside portrait and speech."""
        fields = request_fields({name: entered[self._inputs[name]] for name in controls()})
        if speakers := self._speakers.entered(entered):
            fields = {name: fields[name] for name in fields if name not in OF_ONE_RECORDING}
            fields["speakers"] = [speaker.field() for speaker in speakers]
        return fields

    def _written_fields(self, entered: dict[Component, Any]) -> dict[str, Any]:
        """All fields of the request, with files by their names, or made up ones."""

        def written(file: Path | None, otherwise: str) -> Path:
            return Path(file.name if file else otherwise)

        files = {"image": "portrait.jpg", "audio": "speech.wav"}
        paths = {}
        for name, otherwise in files.items():
            file = entered[self._inputs[name]]
            paths[name] = written(Path(file["path"]) if file else None, otherwise)
        fields = self._fields(entered)
        if "speakers" in fields:
            del paths["audio"]
            for number, speaker in enumerate(fields["speakers"], 1):
                speaker["audio"] = written(speaker["audio"], f"speech-{number}.wav")
        return paths | fields

    def _file(self, entered: dict[Component, Any], name: str) -> Path:
        """The file that was dropped or recorded."""
        file = entered[self._inputs[name]]
        if not file:
            raise FormError(name, "is missing")
        return Path(file["path"])

    def _connection(
        self, endpoint: str, key: str, session: Connection | None
    ) -> tuple[Connection, Updates]:
        """The endpoint to use, and what the page then holds: the typed key leaves the page.

        The studio's own key goes to the studio's own endpoint alone.
        """
        endpoint, key = endpoint.strip(), key.strip()
        if not endpoint:
            raise FormError("endpoint", "is missing")
        own = self._default if endpoint == self._endpoint else None
        if key:
            typed = SecretStr(key)
            if own is not None:
                session = replace(own, api_key=typed)
            else:
                session = Connection(
                    name=endpoint, url=endpoint, api_key=typed, uploads=self._uploads
                )
            return session, {self._session: session, self._inputs["key"]: ""}
        if session is not None and session.name == endpoint:
            return session, {}
        if own is not None:
            return own, {}
        raise FormError("key", "is missing")

    def _result(self, state: JobState | None) -> Updates:
        """Everything about the job that is shown."""
        record = state.record if state else None
        is_done = record is not None and record.status == "COMPLETED"
        is_running = state is not None and state.is_tracked and not state.record.is_over
        path = self._tracker.history.video(record) if record is not None and is_done else None
        return {
            self._shown: record.id if record else "",
            self._timer: gr.Timer(active=is_running),
            self._status: gr.HTML(views.status(state), visible=not is_done),
            self._headline: views.headline(state),
            self._video: gr.HTML(views.video(path) if path else "", visible=is_done),
            self._caption: gr.HTML(views.caption(record) if record else "", visible=is_done),
            self._actions: gr.Row(visible=record is not None),
            self._cancel: gr.Button(visible=is_running),
            self._download: gr.DownloadButton(value=path, visible=is_done),
            self._again: gr.Button(visible=record is not None and not is_running),
            self._cancel_error: gr.HTML("", visible=False),
        }

    def _listing(self) -> Updates:
        """The history, newest first."""
        states = self._tracker.states()
        thumbnails = [
            (str(self._tracker.history.thumbnail(state.record)), views.title(state))
            for state in states
        ]
        return {
            self._history: gr.Gallery(thumbnails, visible=bool(states)),
            self._listed: [state.record.id for state in states],
        }

    def _clear_errors(self) -> Updates:
        return {slot: gr.HTML("", visible=False) for slot in self._errors.values()}

    def _worker_error(self, state: JobState | None) -> Updates:
        """The worker's reason for a failure, at the field that it concerns."""
        error = state.record.error if state else None
        field = (error["field"] or "") if error else ""
        if error is None or not {field, _speaker_of(field)} & self._errors.keys():
            return {}
        return self._error(FormError(error["field"], error["message"]))

    def _error(self, error: Exception, elsewhere: gr.HTML | None = None) -> Updates:
        """The error at its field, with the part of the page that holds the field unfolded.

        One that concerns no field of the page stands in `elsewhere`, or where the result would.
        """
        if isinstance(error, AuthenticationError):
            error = FormError("key", "is not taken by the endpoint")
        elif isinstance(error, ValueError):
            error = FormError("endpoint", f"cannot be used: {error}")
        field = getattr(error, "field", None) or ""
        slot = self._errors.get(field) or self._errors.get(_speaker_of(field))
        if slot is None:
            message = views.sentence(error) if isinstance(error, WorkerError) else str(error)
            title = "Not connected." if elsewhere else "The job was not sent."
            place = elsewhere or self._status
            return {place: gr.HTML(views.failure(title, message), visible=True)}
        text = views.field_error(field, getattr(error, "message", str(error)))
        updates: Updates = {slot: gr.HTML(text, visible=True)}
        if field in ("endpoint", "key"):
            updates[self._endpoint_section] = gr.Accordion(open=True)
        elif field.startswith("speakers") or field in OF_SPEAKERS:
            updates[self._speakers_section] = gr.Accordion(open=True)
        elif field in controls() and field not in UNFOLDED:
            section = self._output_section if is_output(field) else self._settings_section
            updates[section] = gr.Accordion(open=True)
        return updates


def _speaker_of(field: str) -> str:
    """The part of the page for a field of a speaker: `speakers.1` of `speakers.1.face_box`."""
    return ".".join(field.split(".")[:2])


def theme() -> Default:
    """Gradio's own theme with the fonts of the person's system."""
    return Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(  # darker, for the contrast
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_title_text_color="*neutral_800",
        block_label_text_color="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )
