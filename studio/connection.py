"""Where jobs are sent: an endpoint, its key, and a bucket for what does not fit into a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from avatar_client import AsyncAvatarEndpoint
from avatar_client.contract.bucket import BucketSettings

MAX_COUNT = 10**9
POLL_SECONDS = 0.4  # between two questions about a job, at first; somebody watches


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """An endpoint that may be used. It lives in this process's memory only."""

    name: str  # what the page and the history call it
    url: str  # or the bare id of an endpoint on RunPod
    api_key: SecretStr
    uploads: BucketSettings | None = None
    key_path: Path | None = None  # where a person finds the key, if it is in a file
    note: str = ""  # what a person should know of it
    initial_values: Mapping[str, Any] = field(default_factory=dict)  # of the page's controls

    def open(self) -> AsyncAvatarEndpoint:
        """A client of the endpoint, to be entered as a context.

        Raises:
            ValueError: an address or a key that cannot be one.
        """
        return AsyncAvatarEndpoint(self.url, self.api_key, self.uploads, poll_seconds=POLL_SECONDS)

    async def health(self) -> str:
        """How many workers and jobs the endpoint has, in words.

        Raises:
            EndpointError: it does not answer, or does not take the key.
            ValueError: see `open`.
        """
        async with self.open() as endpoint:
            health = await endpoint.health()
        idle, busy = (_count(health, "workers", name) for name in ("idle", "running"))
        waiting = _count(health, "jobs", "inQueue")
        return f"Connected. Workers: {idle} idle, {busy} busy. Jobs waiting: {waiting}."


def _count(health: Mapping[str, Any], of: str, name: str) -> int:
    """A number of the answer; 0 where the endpoint says something else."""
    counts = health.get(of)
    value = counts.get(name) if isinstance(counts, Mapping) else None
    return value if isinstance(value, int) and 0 <= value < MAX_COUNT else 0
