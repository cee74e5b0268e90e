"""Two people in one picture, through a whole job: who spoke when, whose face, and the sound."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract.job_errors import InvalidInputError
from tests.support.pictures import encoded
from tests.support.recordings import voice, write
from worker.generation.engine import Engine
from worker.media import recording
from worker.service import job_request
from worker.service.estimate import ThroughputEstimator
from worker.service.job import JobRun
from worker.service.progress import ProgressReporter
from worker.settings import Settings

BOXES = [[40, 40, 80, 90], [190, 40, 80, 90]]
NOBODY = encoded(Image.new("RGB", (320, 320), "grey"), "PNG")


def speaker(index: int, seconds: float = 0.24, **fields: Any) -> dict[str, Any]:
    sound = write(voice(seconds, 16_000, channels=index + 1, seed=index), 16_000)
    return {"audio": base64.b64encode(sound).decode(), "face_box": BOXES[index], **fields}


@pytest.fixture
def execute(
    engine: Engine, make_input: Callable[..., dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """What comes of a job with speakers."""

    def run(*speakers: dict[str, Any], **fields: Any) -> dict[str, Any]:
        image = base64.b64encode(NOBODY).decode()
        raw = make_input(image=image, speakers=list(speakers), **fields)
        del raw["audio"]

        async def act() -> dict[str, Any]:
            request = job_request.parse({"id": "job-1", "input": raw})
            job = JobRun(request, Settings(), ProgressReporter(None))
            return job.execute(engine, ThroughputEstimator())

        return asyncio.run(act())

    return run


def test_two_speak_in_turn_each_with_a_face_and_at_a_place_of_his_own(
    execute: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    asked = [speaker(0, name="Ada"), speaker(1, name="Björn, 2nd")]
    made = execute(*asked, order="in_turn", pause_seconds=0.08, seed=3, output={"aspect": "4:5"})

    assert made["speakers"] == [
        {"name": "Ada", "face_box": BOXES[0], "start_seconds": 0.0, "duration_seconds": 0.24},
        {
            "name": "Björn, 2nd",
            "face_box": BOXES[1],
            "start_seconds": 0.32,
            "duration_seconds": 0.24,
        },
    ]
    assert made["num_frames"] == 14
    path = tmp_path / "video.mp4"
    path.write_bytes(base64.b64decode(made["video_base64"]))
    with path.open("rb") as file:
        heard = recording.decode(file, 0.0, 10.0)
    assert len(heard.samples) == 2  # one of the two is stereo
    assert np.abs(heard.samples).max() < 1.0
    for index, start in enumerate((0.0, 0.32)):
        own = voice(0.24, 16_000, seed=index)[0]
        middle = heard.samples[0, round(start * 16_000) :][: len(own)]
        assert np.corrcoef(own, middle)[0, 1] > 0.95
    pause = heard.samples[:, round(0.27 * 16_000) : round(0.29 * 16_000)]
    assert np.abs(pause).max() < 0.02


def test_a_dry_run_refuses_what_the_job_would_and_shows_the_faces_otherwise(
    execute: Callable[..., dict[str, Any]],
) -> None:
    planned = execute(speaker(0), speaker(1, start_seconds=0.1), dry_run=True)
    assert planned["plan"]["duration_seconds"] == 0.34
    assert planned["faces"] == []
    assert planned["faces_thumbnail"].startswith("data:image/jpeg;base64,")
    assert any("taken as they are" in warning for warning in planned["warnings"])
    with pytest.raises(InvalidInputError) as caught:
        execute(speaker(0), speaker(1), dry_run=True, output={"aspect": "9:16"})
    assert caught.value.field == "output.aspect"
