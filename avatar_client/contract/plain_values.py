"""Values as tools without code write them, in the types that a request declares.

Forms, spreadsheets and automation services send every value as text, whole numbers as `42.0`, and
null or an empty text for what was left open. Taken is what can mean one thing only.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
BOOLEANS = {"true": True, "false": False}


def as_declared(values: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """The values by the fields' types, without those that were left open.

    What cannot be told apart from a mistake stays as it is, and is refused by its type.
    """
    annotations = {info.alias or name: info.annotation for name, info in fields.items()}
    plain = {name: _plain(value, annotations.get(name, Any)) for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any, annotation: Any) -> Any:
    types = _types(annotation)
    if isinstance(value, list) and tuple in types:
        [elements] = {_elements(choice) for choice in _choices(annotation)} - {None}
        return [_plain(each, elements) for each in value]
    if isinstance(value, str) and types & {bool, int, float, tuple} and str not in types:
        value = _read(value.strip(), types)
    if isinstance(value, float) and int in types and float not in types and value.is_integer():
        return int(value)
    return value


def _read(text: str, types: set[Any]) -> Any:
    """What the text says; the text itself if that is none of the types."""
    if not text:
        return None
    if bool in types:
        return BOOLEANS.get(text.lower(), text)
    if types & {int, float} and NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    return text


def _choices(annotation: Any) -> list[Any]:
    """The types that an annotation allows, each without its conditions."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (tuple, Literal) or not get_args(annotation):
        return [annotation]
    return [choice for each in get_args(annotation) for choice in _choices(each)]


def _types(annotation: Any) -> set[Any]:
    types: set[Any] = set()
    for choice in _choices(annotation):
        if get_origin(choice) is Literal:
            types |= {type(value) for value in get_args(choice)}
        else:
            types.add(get_origin(choice) or choice)
    return types


def _elements(choice: Any) -> Any:
    """The type of a tuple's elements, all of which have the same; None: it is no tuple."""
    return get_args(choice)[0] if get_origin(choice) is tuple else None
