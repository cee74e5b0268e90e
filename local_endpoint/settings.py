"""What the local endpoint finds in the environment, and what its workers take over of it."""

import os

from pydantic import Field, SecretStr

from avatar_client.environment import FromEnvironment
from worker.settings import Settings


class LocalSettings(FromEnvironment):
    """What `python -m local_endpoint` finds in the environment."""

    fastapi_port: int = Field(default=8000, ge=0, le=65535)  # of the local endpoint; 0: any
    runpod_api_key: SecretStr | None = None


def worker_environment() -> dict[str, str]:
    """What a worker that this process starts takes over of its environment.

    Neither RunPod's variables, unless they are settings, nor where its files lie.
    """
    settings = {name.upper() for name in Settings.model_fields}
    return {
        name: value
        for name, value in os.environ.items()
        if name in settings or not name.startswith(("RUNPOD_", "HOME", "TMPDIR", "FASTAPI_PORT"))
    }
