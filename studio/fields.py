"""The page's controls, made from the request's own schema, and their values as a request.

Kinds, limits, choices and defaults are the schema's; only the words for people stand here. A field
that the schema gains appears on the page under its own name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.errors import InvalidInputError
from worker.schema import PRESETS, GenerationParams
from worker.shapes import FRAME_RATES

Kind = Literal["choice", "slider", "number", "text", "box"]

# label, and what it does
WORDS = {
    "prompt": ("Prompt", "What the scene shows."),
    "negative_prompt": ("Negative prompt", "What it must not show. Empty: the model's own list."),
    "resolution": ("Resolution", "About the short side, in pixels. Larger takes longer."),
    "preset": (
        "Preset",
        f"Steps: {', '.join(f'{name} {preset[0]}' for name, preset in PRESETS.items())}.",
    ),
    "num_inference_steps": ("Steps", "The preset sets them."),
    "guidance_scale": ("Guidance", "Up to 1: off."),
    "flow_shift": ("Flow shift", ""),
    "seed": ("Seed", "The same seed gives the same video. Empty: drawn."),
    "fps": ("Frames a second", ""),
    "motion.pose": ("Head motion", ""),
    "motion.expression": ("Expression", ""),
    "face_box": (
        "Face",
        "The face that speaks: x, y, width, height in pixels. Empty: the largest.",
    ),
    "audio_start_seconds": ("Speech starts at", "Seconds into the recording."),
    "max_seconds": ("Longest speech", "Seconds that are used. Empty: all of it."),
}
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
    above: float | None = None  # a minimum that is not allowed itself
    whole: bool = False
    max_characters: int | None = None

    @property
    def label(self) -> str:
        """What the page calls it."""
        return WORDS[self.name][0] if self.name in WORDS else _spoken(self.name)

    @property
    def help(self) -> str:
        """What it does and what is allowed."""
        return " ".join(filter(None, (WORDS.get(self.name, ("", ""))[1], self.limits)))

    @property
    def limits(self) -> str:
        """What is allowed, in words."""
        if self.max_characters is not None:
            return f"At most {self.max_characters} characters."
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:.16g}."
        if self.minimum is not None:
            return f"{self.minimum:g} or more."
        return f"More than {self.above:g}." if self.above is not None else ""

    @property
    def step(self) -> float:
        """By how much a slider moves."""
        return 1 if self.whole or (self.maximum or 0) >= 100 else 0.1


def controls() -> dict[str, Control]:
    """Every field that decides the frames, by name, in the schema's order."""
    schema = GenerationParams.model_json_schema()
    found = _controls(schema["properties"], schema.get("$defs", {}))
    return {control.name: control for control in found}


def request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `input` for the page's values; what is the default is left out.

    Raises:
        InvalidInputError: a text that holds no number. All else is the schema's to check.
    """
    fields: dict[str, Any] = {}
    known = controls()
    for name, entered in values.items():
        value = _sent(known[name], entered)
        if value is None or value == _default(known[name], values.get("preset")):
            continue
        *outer, last = name.split(".")
        target = fields
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = value
    return fields


def page_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the controls showed when they made `fields`."""
    return {
        name: _shown(control, _looked_up(fields, name), fields.get("preset"))
        for name, control in controls().items()
    }


def preset_steps(preset: str) -> int:
    """The denoising steps that a preset stands for."""
    return PRESETS[preset].num_inference_steps


def _controls(
    properties: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = ""
) -> Iterator[Control]:
    for key, described in properties.items():
        name = prefix + key
        if reference := described.get("$ref"):
            inner = definitions[reference.rpartition("/")[2]]
            yield from _controls(inner["properties"], definitions, f"{name}.")
        else:
            yield _control(name, described)


def _control(name: str, described: Mapping[str, Any]) -> Control:
    variants = [each for each in described.get("anyOf", [described]) if each["type"] != "null"]
    schema = variants[0]
    choices = tuple(schema.get("enum", CHOICES.get(name, ())))
    limits = {"minimum": schema.get("minimum"), "maximum": schema.get("maximum")}
    kind: Kind
    if choices:
        kind = "choice"
    elif schema["type"] == "array":
        kind = "box"
    elif schema["type"] == "string":
        kind = "text"
    else:
        closed = None not in limits.values()
        kind = "slider" if closed and described["default"] is not None else "number"
    return Control(
        name=name,
        kind=kind,
        default=described["default"],
        choices=choices,
        above=schema.get("exclusiveMinimum"),
        whole=schema["type"] == "integer",
        max_characters=schema.get("maxLength"),
        **limits,
    )


def _sent(control: Control, entered: Any) -> Any:
    """The value as the request holds it; None: nothing was entered."""
    if isinstance(entered, str):
        entered = entered.strip()
        if not entered:
            return None
        readers = {"box": _box, "number": _number}
        return readers[control.kind](entered, control) if control.kind in readers else entered
    if control.whole and isinstance(entered, float) and entered.is_integer():
        return int(entered)
    return entered


def _number(text: str, control: Control) -> float:
    try:
        return int(text) if control.whole else float(text)
    except ValueError:
        kind = "a whole number" if control.whole else "a number"
        raise InvalidInputError(f"must be {kind}", field=control.name) from None


def _box(text: str, control: Control) -> list[float]:
    try:
        box = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InvalidInputError(BOX_ERROR, field=control.name)
    return box


def _default(control: Control, preset: str | None) -> Any:
    if control.name == "num_inference_steps" and preset in PRESETS:
        return preset_steps(preset)
    return control.default


def _looked_up(fields: Mapping[str, Any], name: str) -> Any:
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(control: Control, sent: Any, preset: str | None) -> Any:
    if sent is None:
        sent = _default(control, preset)
    if sent is None:
        return ""
    return ", ".join(f"{part:g}" for part in sent) if control.kind == "box" else sent


def _spoken(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ").capitalize()
