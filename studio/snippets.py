"""A request as a person would write it: for a shell, and in Python.

The files are read where the snippet runs, and the key is that of its environment: neither stands in
the text.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar_client.endpoint import EXECUTION_TIMEOUT_SECONDS
from avatar_client.protocol import base_url
from studio.fields import video_suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the page would send now."""

    endpoint: str  # a URL, or the id of an endpoint on RunPod
    fields: Mapping[str, Any]  # of `input`; each file as the path that it has where this runs
    key_path: str | None = None  # where the key is to be found


def curl(request: Request) -> str:
    """The request for a POSIX shell with curl, and the question for its result."""
    url = shlex.quote(base_url(request.endpoint))
    key = '-H "Authorization: Bearer $RUNPOD_API_KEY"'
    lines = [
        f"    {json.dumps(name)}: {_in_here_document(value)}"
        for name, value in request.fields.items()
    ]
    policy = json.dumps({"executionTimeout": round(EXECUTION_TIMEOUT_SECONDS * 1000)})
    parts = [
        *_key_hint(request),
        f"curl -sS {url}/run \\",
        f"  {key} \\",
        "  -H 'Content-Type: application/json' -d @- <<EOF",
        '{\n  "input": {',
        ",\n".join(lines),
        f'  }},\n  "policy": {policy}\n}}\nEOF',
        "",
        "# The answer holds the id of the job. Its progress, and then its result:",
        f"curl -sS {url}/status/JOB_ID \\",
        f"  {key}",
    ]
    return "\n".join(parts)


def python(request: Request) -> str:
    """The same with the client of this repository, down to the video."""
    arguments = [
        _literal(value) if name in ("image", "audio") else f"{name}={_literal(value)}"
        for name, value in request.fields.items()
    ]
    lines = [
        *_key_hint(request),
        "import os",
        "from pathlib import Path",
        "",
        "from avatar_client import AvatarEndpoint, progress_bar",
        "",
        f"url = {_literal(base_url(request.endpoint))}",
        'with AvatarEndpoint(url, os.environ["RUNPOD_API_KEY"]) as endpoint:',
        "    job = endpoint.submit(",
        *(f"        {argument}," for argument in arguments),
        "    )",
        "    with progress_bar() as show:",
        "        job.wait(on_status=show)",
        f'    job.download("avatar{video_suffix(request.fields)}")',
    ]
    return "\n".join(lines)


def _key_hint(request: Request) -> list[str]:
    if request.key_path is None:
        return []
    return [f"# export RUNPOD_API_KEY=$(cat {shlex.quote(request.key_path)})"]


def _in_here_document(value: Any) -> str:
    """The value as JSON, with what a shell would expand made plain, and files as base64."""
    if isinstance(value, Path):
        return f"\"$(base64 < {shlex.quote(str(value))} | tr -d '\\n')\""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key)}: {_in_here_document(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_in_here_document, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    for special in ("\\", "$", "`"):
        text = text.replace(special, f"\\{special}")
    return text


def _literal(value: Any) -> str:
    """The value as Python source."""
    if isinstance(value, Path):
        return f"Path({_literal(str(value))})"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        pairs = (f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
