"""Settings and request as users see them: the files in `.runpod` and the README's tables.

python -m builder.listing    # rewrites them; a test says when that is due
"""

import base64
import json
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from avatar_client.contract import schema
from avatar_client.contract.request import JobInput
from worker.settings import Settings

ROOT = Path(__file__).parents[1]
HUB_PATH = ROOT / ".runpod" / "hub.json"
TESTS_PATH = ROOT / ".runpod" / "tests.json"
README_PATH = ROOT / "README.md"

# What the hosts must offer: an exact list, not a floor. The first is what the torch wheel is built
# for; the drivers of later releases run it too. An entry that RunPod does not have matches no host.
CUDA_VERSIONS = ["13.0", "13.1", "13.2", "13.3"]

# The largest model, should it be downloaded into the container, and room for jobs: 42.4 GB and 2.
CONTAINER_DISK_GB = 60

ICON_PATH = ROOT / ".runpod" / "icon.svg"

HUB = {
    "title": "HunyuanVideo-Avatar",
    "description": "One portrait and one speech recording in, a talking-avatar video out.",
    "type": "serverless",
    "category": "video",
}
CONFIG = {
    "runsOn": "GPU",
    "containerDiskInGb": CONTAINER_DISK_GB,
    "gpuCount": 1,
    "gpuIds": "HOPPER_141,ADA_80_PRO,AMPERE_80",
    "allowedCudaVersions": CUDA_VERSIONS,
}

# The form asks for a model whatever is chosen above it. The demo reads none: the smallest will do.
ANY_MODEL = "hf-internal-testing/tiny-random-bert"
PRESETS = [
    {
        "name": "HunyuanVideo-Avatar, 16 bits (a repository of 42 GB)",
        "defaults": {
            "AVATAR_MODEL": "hunyuan-video-avatar",
            "ALLOW_MODEL_DOWNLOAD": True,
            "RUNPOD_INIT_TIMEOUT": 1800,
        },
    },
    {
        "name": "HunyuanVideo-Avatar, 8 bits (a repository of 23 GB)",
        "defaults": {
            "AVATAR_MODEL": "hunyuan-video-avatar",
            "ALLOW_MODEL_DOWNLOAD": True,
            "RUNPOD_INIT_TIMEOUT": 1200,
        },
    },
    {
        "name": "Demo: drawn faces, nothing to download",
        "defaults": {
            "AVATAR_MODEL": "demo",
            "MODEL_REPOSITORY": ANY_MODEL,
            "ALLOW_MODEL_DOWNLOAD": False,
            "RUNPOD_INIT_TIMEOUT": 800,
        },
    },
]

# Not the worker's own, but of whom it needs.
PLATFORM_INPUTS = {
    "RUNPOD_INIT_TIMEOUT": {
        "name": "Init timeout",
        "type": "number",
        "description": "How long RunPod waits for a worker to start, in seconds. A model that the "
        "worker downloads itself takes minutes.",
        "required": False,
        "advanced": True,
        "default": 1800,
    },
    "HF_TOKEN": {
        "name": "Hugging Face token",
        "type": "string",
        "description": "Token that may read the model's repository, if that is private.",
        "required": False,
        "advanced": False,
    },
}
INPUTS = ("image", "audio", "speakers")

# Where the form's entry is another than a setting gives by itself.
FORM: dict[str, dict[str, Any]] = {
    "model_repository": {
        "name": "Model",
        "type": "huggingface",
        "required": True,
        "advanced": False,
    },
    # RunPod's cache is looked at first; without it nothing would start
    "allow_model_download": {"default": True, "advanced": False},
    "avatar_model": {"advanced": False},
}


def hub() -> dict[str, Any]:
    """The listing for RunPod's Hub."""
    fields = Settings.model_fields
    env = [
        *({"key": name.upper(), "input": _hub_input(name, fields[name])} for name in FORM),
        *({"key": name, "input": entry} for name, entry in PLATFORM_INPUTS.items()),
        *(
            {"key": name.upper(), "input": _hub_input(name, info)}
            for name, info in fields.items()
            if name not in FORM
        ),
    ]
    icon = base64.b64encode(ICON_PATH.read_bytes()).decode()
    return {
        **HUB,
        "iconUrl": f"data:image/svg+xml;base64,{icon}",  # no address of ours outlives a move
        "config": {**CONFIG, "presets": PRESETS, "env": env},
    }


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
    return entry | FORM.get(name, {})


def _hub_type(info: FieldInfo) -> str:
    if isinstance(info.default, bool):
        return "boolean"
    return "number" if isinstance(info.default, int | float) else "string"


def hub_tests() -> dict[str, Any]:
    """The Hub's own tests, where they must run on what the listing asks for."""
    document: dict[str, Any] = json.loads(TESTS_PATH.read_text())
    return document | {"config": document["config"] | {"allowedCudaVersions": CUDA_VERSIONS}}


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
    """The README's table of the request's fields, the inputs first."""
    rows = [
        (
            name,
            _shown(described["default"]) if "default" in described else "required",
            f"{described['description']} {_allowed(described)}".strip(),
        )
        for name, described in schema.described_fields(JobInput)
    ]
    return _table(
        "Field of `input`", sorted(rows, key=lambda row: row[0].partition(".")[0] not in INPUTS)
    )


def _table(head: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in rows]
    return "\n".join([f"| {head} | Default | Meaning |", "| --- | --- | --- |", *lines]) + "\n"


def _shown(default: Any) -> str:
    if default in (None, ""):
        return "none"
    return f"`{json.dumps(default) if not isinstance(default, str) else default}`"


def _allowed(described: dict[str, Any]) -> str:
    choices = described.get("enum", ())
    return f"One of {', '.join(map(str, choices))}." if choices else schema.limits(described)


def readme(text: str) -> str:
    """The README with its tables made anew."""
    for name, table in (("settings", settings_table()), ("request", request_table())):
        begins, ends = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begins)
        text = before + begins + table + ends + rest.split(ends)[1]
    return text


def main() -> None:
    """Rewrites them."""
    HUB_PATH.write_text(json.dumps(hub(), indent=2) + "\n")
    TESTS_PATH.write_text(json.dumps(hub_tests(), indent=2) + "\n")
    README_PATH.write_text(readme(README_PATH.read_text()))


if __name__ == "__main__":
    main()
