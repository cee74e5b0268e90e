"""JSON of strangers: read whatever is in it, and refused by its place where it cannot be sent on.

What a job brings comes back in its result, its webhook and its errors. A lone surrogate has no
UTF-8, NaN no JSON, and a number or a nesting that some reader on the way refuses loses the result.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from avatar_client.contract.job_errors import InvalidInputError

MAX_DEPTH = 32  # of objects and lists in one another
MAX_VALUES = 10_000
MAX_FIELD_CHARACTERS = 80
_LONGEST_NUMBER = 400  # digits; a double has at most 309
_CUT_DEPTH = 3 * MAX_DEPTH  # deeper text is not read: json itself fails at about a thousand
_MAX_TOKENS = 2_000_000  # some seconds
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]++|[\]}]++', re.DOTALL)


def read(text: bytes) -> Any:
    """The value of a JSON text, which may then be told from a job by `require_plain`.

    What is too deep comes as empty, and still as too deep; a number that is too long as infinite.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        return json.loads(_without_depths(text), parse_int=_whole_number)


def require_plain(value: Any, prefix: str = "") -> None:
    """Returns if a value can be sent as JSON in UTF-8, and read by whoever gets it.

    Raises:
        InvalidInputError: it cannot; names the field, below `prefix`.
    """
    for number, (place, depth, inner) in enumerate(_walk(value)):
        fault = _fault(inner, depth)
        if fault is None and number >= MAX_VALUES:
            place, fault = place[:1], f"holds more than {MAX_VALUES} values"
        if fault is not None:
            raise InvalidInputError(fault, field=field_name(prefix, place))


def field_name(prefix: str, place: tuple[Any, ...]) -> str | None:
    """A place as errors name it. A key is the client's own text: kept short and printable."""
    path = ".".join(str(part)[:MAX_FIELD_CHARACTERS] for part in place[:MAX_DEPTH])
    return ascii(prefix + path)[1:-1].rstrip(".")[:MAX_FIELD_CHARACTERS] or None


def _walk(value: Any) -> Iterator[tuple[tuple[Any, ...], int, Any]]:
    """Each value with its place and depth, keys too, down to the first level that is too deep."""
    waiting: list[tuple[tuple[Any, ...], int, Any]] = [((), 0, value)]
    while waiting:
        place, depth, inner = waiting.pop()
        yield place, depth, inner
        if depth > MAX_DEPTH:
            continue
        if isinstance(inner, dict):
            for key, each in inner.items():
                yield (*place, key), depth, key if isinstance(key, str) else object()
                waiting.append(((*place, key), depth + 1, each))
        elif isinstance(inner, list | tuple):
            waiting += (((*place, index), depth + 1, each) for index, each in enumerate(inner))


def _fault(value: Any, depth: int) -> str | None:
    """Why a value cannot be sent, leaving aside what is in it."""
    if isinstance(value, str):
        return None if _has_utf8(value) else "holds a character that is none (a lone surrogate)"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return None if _is_finite(value) else "must be a finite number"
    if not isinstance(value, dict | list | tuple):
        return "must be plain JSON"
    if depth > MAX_DEPTH:
        return f"is nested more than {MAX_DEPTH} deep"
    return f"holds more than {MAX_VALUES} values" if len(value) > MAX_VALUES else None


def _has_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond any double
        return False


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else math.inf


def _without_depths(text: bytes) -> bytes:
    """The text without what lies deeper than `_CUT_DEPTH`.

    Raises:
        ValueError: it is not worth the time.
    """
    kept: list[bytes] = []
    depth = begin = 0
    for number, token in enumerate(_TOKENS.finditer(text)):
        if number == _MAX_TOKENS:
            raise ValueError("too deep, and too long")
        if token[0][0] in b"[{":
            deeper = depth + len(token[0])
            if depth < _CUT_DEPTH <= deeper:
                kept.append(text[begin : token.start() + _CUT_DEPTH - depth])
                begin = len(text)
            depth = deeper
        elif token[0][0] in b"]}":
            shallower = depth - len(token[0])
            if shallower < _CUT_DEPTH <= depth:
                begin = token.start() + depth - _CUT_DEPTH
            depth = shallower
    return b"".join([*kept, text[begin:]])
