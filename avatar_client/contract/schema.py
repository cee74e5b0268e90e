"""What all parts of a request have in common: frozen values, described, and refused by name."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from avatar_client.contract import plain_json, plain_values
from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError, WorkerError
from avatar_client.contract.media_source import BlockedSchemeError

Model = TypeVar("Model", bound=BaseModel)
Finite = Annotated[float, Field(allow_inf_nan=False)]

# What pydantic says in Python's words.
PLAIN_WORDS = {
    "Value error, ": "",
    "Input should": "must",
    "Tuple should": "must",
    "a valid tuple": "a list",
    " after validation": "",
}


class Frozen(BaseModel):
    """Part of a request, in the types that it declares and nothing beside them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # which may be a secret under a mistyped key
    )

    @model_validator(mode="before")
    @classmethod
    def _as_declared(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return plain_values.as_declared(values, cls.model_fields)


def described_fields(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each value that a request may hold: its dotted name, and its JSON schema.

    An object's values come by their own names, but for one that holds a secret; those of each
    object in a list by the list's name and `N`.
    """
    schema = model.model_json_schema()
    yield from _described(schema["properties"], schema.get("$defs", {}), "")


def _described(
    properties: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in properties.items():
        # optional values are written as a choice between the value and null
        choices = [one for one in value.get("anyOf", [value]) if one.get("type") != "null"]
        form = {**choices[0], **value}
        inner = _properties(form, definitions)
        if inner and not any(one.get("writeOnly") for one in inner.values()):
            yield from _described(inner, definitions, f"{prefix}{name}.")
            continue
        yield prefix + name, form
        if elements := _properties(form.get("items", {}), definitions):
            yield from _described(elements, definitions, f"{prefix}{name}.N.")


def _properties(form: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the object that a schema refers to; empty if it is none."""
    named = form.get("$ref", "").rpartition("/")[2]
    properties: Mapping[str, Any] = definitions.get(named, {}).get("properties", {})
    return properties


def limits(described: Mapping[str, Any]) -> str:
    """What a field's JSON schema allows, in words; nothing where it says all by itself."""
    low, high = described.get("minimum"), described.get("maximum")
    if low is not None and high is not None:
        return f"{low:g} to {high:.16g}."
    if low is not None:
        return f"{low:g} or more."
    if (above := described.get("exclusiveMinimum")) is not None:
        return f"More than {above:g}."
    longest = described.get("maxLength")
    return "" if longest is None else f"At most {longest} characters."


def validated(model: type[Model], raw: Any, prefix: str = "") -> Model:
    """The checked values.

    Raises:
        InvalidInputError: a value cannot be served, or sent on; names the field, below `prefix`.
        InputUrlBlockedError: an input names an address that is never fetched.
    """
    plain_json.require_plain(raw, prefix)
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        error = failure.errors(include_url=False, include_input=False)[0]
        kind: type[WorkerError] = InvalidInputError
        message = error["msg"]
        if error["type"] == "extra_forbidden":
            message = _unknown_key(model, error["loc"])
        elif error["type"] == "model_type":
            message = "must be an object"
        elif isinstance(error.get("ctx", {}).get("error"), BlockedSchemeError):
            kind = InputUrlBlockedError
        for python, plain in PLAIN_WORDS.items():
            message = message.replace(python, plain)
        field = plain_json.field_name(prefix, error["loc"])
        raise kind(message[:1].lower() + message[1:], field=field) from None


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    for name in location[:-1]:
        if isinstance(name, int):  # in a list, all of whose objects are the same
            continue
        [model] = (
            found
            for own_name, info in model.model_fields.items()
            if name == (info.alias or own_name)
            for found in _models(info.annotation)
        )
    known = [info.alias or name for name, info in model.model_fields.items()]
    given = str(location[-1])[: plain_json.MAX_FIELD_CHARACTERS]
    near = difflib.get_close_matches(given, known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {known}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model that a field holds: itself, or in a list or a "model or None"."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
