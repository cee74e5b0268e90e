"""The preview of a job, as its client is told of it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from avatar_client import Progress
from worker.generation.engine import Engine
from worker.service.worker import Worker
from worker.settings import Settings


def run(engine: Engine, job_input: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The job's output, and what was posted while it ran."""
    posts: list[dict[str, Any]] = []

    async def post(payload: dict[str, Any]) -> None:
        posts.append(payload)

    async def job() -> dict[str, Any]:
        worker = Worker(Settings(), engine)
        return await worker.handle({"id": "job-1", "input": job_input}, post=post)

    output = asyncio.run(job())
    assert "error" not in output, output["error"]
    return output, posts


def test_a_job_shows_itself_in_its_progress_where_it_was_asked_to(
    engine: Engine, make_input: Callable[..., dict[str, Any]]
) -> None:
    small = make_input(seed=1, num_inference_steps=3, preset="draft")
    output, posts = run(engine, small | {"preview": True})
    plain, plain_posts = run(engine, small)

    last = Progress.parse(posts[-1])
    assert last is not None
    assert last.preview is not None
    assert output["sha256"] == plain["sha256"]
    assert not any("preview" in payload for payload in plain_posts)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_without_a_map_says_so_and_makes_the_video(
    engine: Engine, make_input: Callable[..., dict[str, Any]], *, dry_run: bool
) -> None:
    blind = replace(engine, latent_to_rgb=None)
    output, posts = run(blind, make_input(preview=True, dry_run=dry_run))
    [warning] = output["warnings"]
    assert "no preview is possible" in warning
    assert "builder.preview" in warning
    assert not any("preview" in payload for payload in posts)
    assert run(blind, make_input(dry_run=True))[0]["warnings"] == []
