"""Make a talking-avatar video on an endpoint, from a shell.

The API key is read from RUNPOD_API_KEY, the endpoint from RUNPOD_ENDPOINT_ID unless it is named by
--endpoint, a bucket for inputs of more than 10 MB from BUCKET_*, and the key with which results
must be signed, if any, from RESULT_SIGNING_KEY.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from avatar_client.contract import schema
from avatar_client.contract.formats import require_suffix, suffix_of
from avatar_client.contract.job_errors import InputUrlBlockedError, InvalidInputError, WorkerError
from avatar_client.contract.request import JobInput
from avatar_client.endpoint import EXECUTION_TIMEOUT_SECONDS, AvatarEndpoint, AvatarJob
from avatar_client.endpoint_errors import EndpointError
from avatar_client.environment import ClientSettings
from avatar_client.responses import JobStatus, checked_id, plain
from avatar_client.terminal import progress_bar

MAX_WARNINGS = 20  # that are shown
DONE, FAILED, BAD_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130

FILES = ("image", "audio", "speakers")  # which have options of their own

Option = tuple[str, dict[str, Any]]  # a value's dotted name in `input`, its JSON schema


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 failed, 2 bad arguments, 130 cancelled by Ctrl-C."""
    options = list(_options())
    parsed = _parser(options).parse_args(arguments)
    try:
        endpoint = _endpoint(parsed.endpoint)
    except ValueError as error:
        return _say(error, BAD_ARGUMENTS)
    try:
        with endpoint:
            return int(parsed.command(endpoint, parsed, options))
    except (InvalidInputError, InputUrlBlockedError) as error:
        return _say(f"{error.field}: {error.message}", BAD_ARGUMENTS)
    except (EndpointError, WorkerError) as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _generate(endpoint: AvatarEndpoint, parsed: argparse.Namespace, options: list[Option]) -> int:
    fields: dict[str, Any] = {}
    for name, _ in options:
        if (value := getattr(parsed, _option_name(name))) is not None:
            *parents, last = name.split(".")
            inner = fields
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
    if parsed.speaker:
        fields["speakers"] = parsed.speaker
    if parsed.output is not None:
        container = fields.get("output", {}).get("format", "mp4")
        require_suffix(parsed.output.name, container, "--output")
    job: AvatarJob | None = None
    try:
        job = endpoint.submit(
            parsed.image,
            parsed.audio,
            webhook=parsed.webhook,
            execution_timeout_seconds=parsed.execution_timeout_seconds,
            **fields,
        )
        _say(f"job {job.id}")
        return _wait_and_download(job, parsed.output)
    except KeyboardInterrupt:
        return _say(_interrupted(job), INTERRUPTED)


def _interrupted(job: AvatarJob | None) -> str:
    """What became of the job that nobody waits for any more."""
    if job is None:
        return "interrupted; if the job was sent already, it runs"
    try:
        return f"job {job.id} is {job.cancel().status}"
    except EndpointError as error:
        return f"job {job.id} could not be cancelled: {error}"


def _download(endpoint: AvatarEndpoint, parsed: argparse.Namespace, *_: Any) -> int:
    return _wait_and_download(endpoint.job(parsed.id), parsed.output)


def _wait_and_download(job: AvatarJob, target: Path | None) -> int:
    preview_path = (target or Path("avatar")).with_suffix(".preview.jpg")
    with progress_bar() as show:

        def on_status(status: JobStatus) -> None:
            show(status)
            if status.progress is not None and status.progress.preview is not None:
                with contextlib.suppress(OSError):  # what matters is the video
                    preview_path.write_bytes(status.progress.preview)

        output = job.wait(on_status=on_status).output or {}
    if output.get("dry_run"):
        print(json.dumps(output, indent=2))  # noqa: T201
        return DONE
    warnings = output.get("warnings")
    for warning in warnings[:MAX_WARNINGS] if isinstance(warnings, list) else ():
        _say(f"warning: {plain(warning)}")
    target = target or Path(f"avatar{suffix_of(output.get('content_type'))}")
    print(job.download(target))  # noqa: T201
    preview_path.unlink(missing_ok=True)
    return DONE


def _status(endpoint: AvatarEndpoint, parsed: argparse.Namespace, *_: Any) -> int:
    print(_line(endpoint.job(parsed.id).status()))  # noqa: T201
    return DONE


def _cancel(endpoint: AvatarEndpoint, parsed: argparse.Namespace, *_: Any) -> int:
    print(_line(endpoint.job(parsed.id).cancel()))  # noqa: T201
    return DONE


def _line(job: JobStatus) -> str:
    progress = job.progress
    parts = [job.status]
    if progress:
        parts.append(f"{100 * progress.progress:.0f} %: {progress.message}")
    if job.error:
        parts.append(str(job.error))
    return "  ".join(parts)


def _say(what: object, exit_code: int = DONE) -> int:
    """The exit code, after a line for the person in front of the terminal."""
    print(what, file=sys.stderr)  # noqa: T201
    return exit_code


def _endpoint(named: str | None) -> AvatarEndpoint:
    settings = ClientSettings.from_env()
    address = named or settings.runpod_endpoint_id
    if address is None:
        raise ValueError("name the endpoint by --endpoint or RUNPOD_ENDPOINT_ID")
    if settings.runpod_api_key is None:
        raise ValueError("put the API key into RUNPOD_API_KEY")
    return AvatarEndpoint(
        address,
        settings.runpod_api_key,
        settings.bucket,
        signing_key=settings.result_signing_key,
    )


def _parser(options: list[Option]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avatar", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=run)
        added.add_argument("--endpoint", metavar="URL|ID", help="default: RUNPOD_ENDPOINT_ID")
        return added

    generate = command("generate", _generate, "make a video; Ctrl-C cancels the job")
    generate.add_argument("--image", required=True, type=_media, metavar="FILE|URL")
    generate.add_argument("--audio", type=_media, metavar="FILE|URL", help="or one --speaker each")
    generate.add_argument(
        "--speaker",
        action="append",
        type=_speaker,
        metavar="FACE[@SECONDS]=FILE|URL",
        help="in the place of --audio, up to four times: left, right, a face's index from the left "
        "or its box x,y,width,height, when it begins, and its recording; for example "
        "left=a.wav right@2.5=b.wav",
    )
    generate.add_argument("--webhook", metavar="URL", help="called when the job is over")
    generate.add_argument(
        "--execution-timeout-seconds",
        type=float,
        default=EXECUTION_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="the platform ends the job after so long; default: %(default)g",
    )
    for name, described in options:
        generate.add_argument(_option_name(name), dest=_option_name(name), **_argument(described))
    download = command("download", _download, "wait for a job, then fetch its video")
    status = command("status", _status, "say how far a job is")
    cancel = command("cancel", _cancel, "end a job")
    for added in (download, status, cancel):
        added.add_argument("id", type=_job_id, metavar="ID", help="of the job")
    for added in (generate, download):
        added.add_argument(
            "--output",
            type=_target,
            metavar="FILE",
            help="default: avatar.mp4 or avatar.webm",
        )
    return parser


def _options() -> Iterator[Option]:
    """The values of `input` but for files, and for secrets, which a process list shows."""
    for name, described in schema.described_fields(JobInput):
        if name.partition(".")[0] not in FILES and "$ref" not in described:
            yield name, described


def _option_name(name: str) -> str:
    return "--" + name.replace(".", "-").replace("_", "-")


def _argument(described: dict[str, Any]) -> dict[str, Any]:
    """How argparse reads a value of this schema. Its limits are the schema's own matter."""
    kind = described.get("type")
    if kind == "boolean":
        return {
            "action": argparse.BooleanOptionalAction,
            "default": None,
            "help": _help({"description": described["description"]}),
        }
    argument: dict[str, Any] = {"metavar": (kind or "json").upper(), "help": _help(described)}
    if "enum" in described:
        argument |= {"choices": described["enum"], "metavar": None}
    if kind == "array":
        argument |= {"nargs": described["minItems"], "metavar": "NUMBER"}
    if kind != "string":
        argument["type"] = _number if kind else _json
    return argument


def _help(described: dict[str, Any]) -> str:
    default = described.get("default")
    texts = [
        described.get("description", ""),
        schema.limits(described),
        "" if default is None else f"Default: {default}",
    ]
    return " ".join(filter(None, texts)).replace("`", "").replace("%", "%%")


def _media(text: str) -> Path | str:
    """An address as it is, anything else as a file."""
    return text if re.match(r"[a-z]+://|data:", text, re.IGNORECASE) else Path(text)


def _speaker(text: str) -> dict[str, Any]:
    """A speaker as the request has it. What it says of the face is the schema's own matter."""
    place, equals, media = text.partition("=")
    face, at, seconds = place.partition("@")
    if not equals or not media:
        raise argparse.ArgumentTypeError(f"{text!r} is not FACE[@SECONDS]=FILE|URL")
    speaker: dict[str, Any] = {"audio": _media(media)}
    if "," in face:
        speaker["face_box"] = [_number(part) for part in face.split(",")]
    elif face:
        speaker["face"] = face
    if at:
        speaker["start_seconds"] = _number(seconds)
    return speaker


def _target(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():  # before anything is paid for
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def _job_id(text: str) -> str:
    try:
        return checked_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number")


def _json(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
