"""Signed results: what a receiver can know of an answer that comes by a way that nobody guards.

The signature is an HMAC over the job's id, an expiry and the whole output, in the canonical JSON of
RFC 8785, which JavaScript writes in four lines: however the text is written anew on its way, the
values are what counts. It stands in the output as `v1.EXPIRY.MAC`, the expiry in Unix seconds.
"""

import hashlib
import hmac
import json
import re
import time
from decimal import Decimal
from typing import Any

KEY_PATTERN = r"^[!-~]{32,1024}$"  # of 128 bits or more, if each character is a hexadecimal digit
VERSION = "v1"
_SIGNATURE = re.compile(r"v1\.(?P<expires>[0-9]{1,12})\.(?P<mac>[0-9a-f]{64})")


def require_key(key: str) -> None:
    """Returns if the key can be one.

    Raises:
        ValueError: it cannot; does not show it.
    """
    if re.fullmatch(KEY_PATTERN, key) is None:
        raise ValueError(
            "a signing key has 32 to 1024 characters, letters, digits or signs of ASCII without a "
            "blank; `openssl rand -hex 32` makes one"
        )


def sign(key: str, job_id: str, output: dict[str, Any], life_seconds: int) -> str:
    """The signature of a job's output, which must hold none yet."""
    expires = int(time.time()) + life_seconds
    return f"{VERSION}.{expires}.{_mac(key, job_id, expires, output)}"


def problem(key: str, job_id: str, output: Any) -> str | None:
    """Why the output is not this job's, from a worker with this key; None: it is.

    Raises:
        ValueError: the key is none.
    """
    require_key(key)
    told = output.get("signature") if isinstance(output, dict) else None
    if not isinstance(told, str):
        return "the result is not signed"
    found = _SIGNATURE.fullmatch(told)
    if found is None:
        return "the result's signature is none"
    signed = {name: value for name, value in output.items() if name != "signature"}
    try:
        expected = _mac(key, job_id, int(found["expires"]), signed)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return "the result is no plain JSON"
    if not hmac.compare_digest(expected, found["mac"]):
        return "the result is not what the worker has signed for this job"
    if time.time() >= int(found["expires"]):
        return "the result's signature has expired"
    return None


def canonical(value: Any) -> str:
    """The one text of a JSON value, numbers and the order of keys as in JavaScript.

    Raises:
        ValueError, TypeError, OverflowError: it is none, or a number beyond a double.

    Source: RFC 8785.
    """
    if isinstance(value, dict):
        # by UTF-16, as JavaScript sorts
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{_text(name)}:{canonical(value[name])}" for name in names) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(float(value))
    return _text(value)


def _mac(key: str, job_id: str, expires: int, output: dict[str, Any]) -> str:
    text = canonical([VERSION, job_id, expires, output])
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError("not JSON")
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """The shortest digits that are this double, written as JavaScript does.

    Source: ECMA-262, Number::toString.
    """
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    if not isinstance(exponent, int):
        raise ValueError("not a finite number")
    text = "".join(map(str, digits))
    point = len(text) + exponent  # digits before the decimal point
    minus = "-" * sign
    if len(text) <= point <= 21:
        return minus + text + "0" * exponent
    if 0 < point <= 21:
        return f"{minus}{text[:point]}.{text[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{text}"
    power = point - 1
    rest = f".{text[1:]}" if len(text) > 1 else ""
    return f"{minus}{text[0]}{rest}e{'+' if power > 0 else '-'}{abs(power)}"
