"""The settings as users see them: `.runpod/hub.json` and the README's table, from `Settings`.

python -m builder.listing    # rewrites both; a test says when that is due
"""

import json
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from worker.settings import Settings

ROOT = Path(__file__).parents[1]
HUB_PATH = ROOT / ".runpod" / "hub.json"
README_PATH = ROOT / "README.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- settings -->\n", "<!-- /settings -->"

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


def table() -> str:
    """The README's table of settings."""
    rows = [
        f"| `{name.upper()}` | {_default(info)} | {info.description} |"
        for name, info in Settings.model_fields.items()
    ]
    return "\n".join(["| Variable | Default | Meaning |", "| --- | --- | --- |", *rows]) + "\n"


def _default(info: FieldInfo) -> str:
    value = info.default
    if value in (None, ""):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def readme(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(TABLE_BEGINS)
    after = rest.split(TABLE_ENDS)[1]
    return before + TABLE_BEGINS + table() + TABLE_ENDS + after


def main() -> None:
    """Rewrites both files."""
    HUB_PATH.write_text(json.dumps(hub(), indent=2) + "\n")
    README_PATH.write_text(readme(README_PATH.read_text()))


if __name__ == "__main__":
    main()
