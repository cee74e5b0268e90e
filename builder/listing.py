"""Settings and request as users see them: `.runpod/hub.json` and the README's tables.

python -m builder.listing    # rewrites both; a test says when that is due
"""

import json
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from avatar_client.contract import request
from worker.settings import Settings

ROOT = Path(__file__).parents[1]
HUB_PATH = ROOT / ".runpod" / "hub.json"
README_PATH = ROOT / "README.md"

HUB = {
    "title": "HunyuanVideo-Avatar",
    "description": "One portrait and one speech recording in, a talking-avatar video out.",
    "type": "serverless",
    "category": "video",
    "config": {
        "runsOn": "GPU",
        "containerDiskInGb": 20,
        "gpuCount": 1,
        "gpuIds": "HOPPER_141,ADA_80_PRO,AMPERE_80",
        "allowedCudaVersions": ["13.0"],  # an exact list, not a floor; what the torch wheel needs
    },
}


def hub() -> dict[str, Any]:
    """The listing for RunPod's Hub."""
    fields = Settings.model_fields.items()
    env = [{"key": name.upper(), "input": _hub_input(name, info)} for name, info in fields]
    return {**HUB, "config": {**HUB["config"], "env": env}}  # type: ignore[dict-item]


def _hub_input(name: str, info: FieldInfo) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name.replace("_", " ").capitalize(),
        "type": _hub_type(info),
        "description": info.description,
        "required": False,
        "advanced": not name.startswith("bucket"),
    }
    if info.default is not None:
        entry["default"] = info.default
    if typing.get_origin(info.annotation) is typing.Literal:
        choices = typing.get_args(info.annotation)
        entry["options"] = [{"label": choice, "value": choice} for choice in choices]
    return entry


def _hub_type(info: FieldInfo) -> str:
    if isinstance(info.default, bool):
        return "boolean"
    return "number" if isinstance(info.default, int | float) else "string"


def settings_table() -> str:
    """The README's table of settings."""
    return _table(
        "Variable",
        [
            (name.upper(), _shown(info.default), str(info.description))
            for name, info in Settings.model_fields.items()
        ],
    )


def request_table() -> str:
    """The README's table of the request's fields, the required ones first."""
    rows = [
        (
            name,
            _shown(described["default"]) if "default" in described else "required",
            f"{described['description']} {_allowed(described)}".strip(),
        )
        for name, described in request.described_fields(request.JobInput)
    ]
    return _table("Field of `input`", sorted(rows, key=lambda row: row[1] != "required"))


def _table(head: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in rows]
    return "\n".join([f"| {head} | Default | Meaning |", "| --- | --- | --- |", *lines]) + "\n"


def _shown(default: Any) -> str:
    if default in (None, ""):
        return "none"
    return f"`{json.dumps(default) if not isinstance(default, str) else default}`"


def _allowed(described: dict[str, Any]) -> str:
    choices = described.get("enum", ())
    return f"One of {', '.join(map(str, choices))}." if choices else request.limits(described)


def readme(text: str) -> str:
    """The README with its tables made anew."""
    for name, table in (("settings", settings_table()), ("request", request_table())):
        begins, ends = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begins)
        text = before + begins + table + ends + rest.split(ends)[1]
    return text


def main() -> None:
    """Rewrites both files."""
    HUB_PATH.write_text(json.dumps(hub(), indent=2) + "\n")
    README_PATH.write_text(readme(README_PATH.read_text()))


if __name__ == "__main__":
    main()
