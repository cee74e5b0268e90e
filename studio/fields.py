"""The page's controls, made from the request's own schema, and their values as a request.

Kinds, limits, choices, defaults and what is said of them are the schema's; only labels stand here.
A field that the schema gains appears on the page under its own name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from avatar_client.contract import schema
from avatar_client.contract.formats import suffix_of
from avatar_client.contract.job_errors import InvalidInputError
from avatar_client.contract.request import (
    SPEECH_FIELDS,
    GenerationParams,
    JobInput,
    OutputOptions,
)
from worker.shapes import FRAME_RATES

Kind = Literal["choice", "slider", "number", "text", "box", "check"]

LABELS = {
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "fps": "Frames a second",
    "motion.pose": "Head motion",
    "motion.expression": "Expression",
    "face_box": "Face",
    "audio_start_seconds": "Speech starts at",
    "max_seconds": "Longest speech",
    "pause_seconds": "Pause",
    "output.aspect": "Aspect ratio",
    "output.gif": "GIF",
    "output.watermark.text": "Watermark",
    "output.watermark.place": "Corner of the watermark",
    "output.watermark.opacity": "Opacity of the watermark",
}
# Of `output`: what says where the files go, which is the studio's to know, and a second picture.
NO_CONTROLS = {
    f"output.{name}"
    for name in (
        *("delivery", "key", "prefix", "url_expires_seconds", "overwrite"),
        "watermark.image",
    )
}
LINE_CHARACTERS = 100
# Kept as they stand in the schema; other choices are words.
SIGNS = {"mp4", "webm", "h264", "hevc", "vp9"}
CHOICES = {"fps": FRAME_RATES}  # what the schema checks with code of its own
BOX_ERROR = "must be four numbers: x, y, width, height"


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One control of the page: a field of the request, and its limits."""

    name: str  # dotted, as errors name it
    kind: Kind
    default: Any  # None: may stay empty
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    is_integer: bool = False
    max_characters: int | None = None
    help: str  # what it does and what is allowed

    @property
    def label(self) -> str:
        """The control's label."""
        return LABELS.get(self.name) or _label_of(self.name)

    @property
    def is_long(self) -> bool:
        """Whether it holds more than a line."""
        return (self.max_characters or 0) > LINE_CHARACTERS

    def choice_label(self, value: Any) -> str:
        """A choice as a person reads it."""
        if not isinstance(value, str):
            return f"{value:g}"
        return value if value in SIGNS else re.sub("[-_]", " ", value).capitalize() or "Automatic"

    @property
    def step(self) -> float:
        """The step of a slider."""
        return 1 if self.is_integer or (self.maximum or 0) >= 100 else 0.1


@cache
def controls() -> Mapping[str, Control]:
    """Every field that decides frames, sound or files, by name, in the schema's order."""
    forms = {
        **dict(schema.described_fields(GenerationParams)),
        **{name: form for name, form in schema.described_fields(JobInput) if name in SPEECH_FIELDS},
        **{f"output.{name}": form for name, form in schema.described_fields(OutputOptions)},
    }
    return {name: _control(name, form) for name, form in forms.items() if name not in NO_CONTROLS}


def is_output(name: str) -> bool:
    """Whether a field is of the video's files and their shape, and not of what is seen in them."""
    return name.startswith("output.")


def request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `input` for the page's values; what is the default is left out.

    Raises:
        InvalidInputError: a text that holds no number. All else is the schema's to check.
    """
    fields: dict[str, Any] = {}
    known = controls()
    for name, entered in values.items():
        value = _request_value(known[name], entered)
        if value is None or value == known[name].default:
            continue
        *outer, last = name.split(".")
        target = fields
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = value
    output = fields.get("output", {})
    if "text" not in output.get("watermark", {"text": ""}):  # a place for no mark
        del output["watermark"]
    return {name: value for name, value in fields.items() if value != {}}


def page_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The controls' values that give `fields`."""
    return {
        name: _page_value(control, _nested_value(fields, name))
        for name, control in controls().items()
    }


def video_suffix(fields: Mapping[str, Any]) -> str:
    """The suffix of the video that such a request asks for."""
    return suffix_of(f"video/{_nested_value(fields, 'output.format')}")


def _control(name: str, described: Mapping[str, Any]) -> Control:
    choices = tuple(described.get("enum", CHOICES.get(name, ())))
    limits = {"minimum": described.get("minimum"), "maximum": described.get("maximum")}
    kind: Kind
    if choices:
        kind = "choice"
        if described["default"] is None:
            choices = ("", *choices)
    elif described["type"] == "boolean":
        kind = "check"
    elif described["type"] == "array":
        kind = "box"
    elif described["type"] == "string":
        kind = "text"
    else:
        closed = None not in limits.values()
        kind = "slider" if closed and described["default"] is not None else "number"
    # a slider shows its ends by itself
    limits_in_words = "" if kind == "slider" else schema.limits(described)
    return Control(
        name=name,
        kind=kind,
        default=described["default"],
        choices=choices,
        is_integer=described["type"] == "integer",
        max_characters=described.get("maxLength"),
        help=f"{described['description']} {limits_in_words}".strip(),
        **limits,
    )


def _request_value(control: Control, entered: Any) -> Any:
    """The value for the request; None: nothing was entered."""
    if isinstance(entered, str):
        entered = entered.strip()
        if not entered:
            return None
        parsers = {"box": _parse_box, "number": _parse_number}
        return parsers[control.kind](entered, control) if control.kind in parsers else entered
    if control.is_integer and isinstance(entered, float) and entered.is_integer():
        return int(entered)
    return entered


def _parse_number(text: str, control: Control) -> float:
    try:
        return int(text) if control.is_integer else float(text)
    except ValueError:
        kind = "a whole number" if control.is_integer else "a number"
        raise InvalidInputError(f"must be {kind}", field=control.name) from None


def _parse_box(text: str, control: Control) -> list[float]:
    try:
        box = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InvalidInputError(BOX_ERROR, field=control.name)
    return box


def _nested_value(fields: Mapping[str, Any], name: str) -> Any:
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _page_value(control: Control, sent: Any) -> Any:
    if sent is None:
        sent = control.default
    if sent is None:
        return ""
    return ", ".join(f"{part:g}" for part in sent) if control.kind == "box" else sent


def _label_of(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ").capitalize()
