"""One job on its way: what ends it between two steps, and what it notes."""

import asyncio
import base64
import hashlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import c2pa
import pytest
from PIL import Image

from avatar_client.contract.job_errors import DeadlineExceededError, InvalidInputError, WorkerError
from avatar_client.contract.request import JobInput
from tests.support.certificates import signing_pair
from tests.support.pictures import encoded
from worker.generation.engine import Engine
from worker.service import job_request
from worker.service.estimate import ThroughputEstimator
from worker.service.job import JobRun, JobStoppedError
from worker.service.progress import ProgressReporter
from worker.service.scene import Scene
from worker.settings import Settings


@pytest.fixture
def make_run(make_input: Callable[..., dict[str, Any]]) -> Callable[..., JobRun]:
    """A job whose progress nobody hears; call it where an event loop runs."""

    def make(settings: Settings | None = None, **changes: Any) -> JobRun:
        request = job_request.parse({"id": "job-1", "input": make_input(**changes)})
        return JobRun(request, settings or Settings(), ProgressReporter(None))

    return make


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where jobs keep their files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def in_loop(act: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return act()

    return asyncio.run(run())


def test_a_job_that_is_stopped_enters_no_further_stage(make_run: Callable[..., JobRun]) -> None:
    def act() -> None:
        run = make_run()
        with run.stage("download"):
            run.stop.set()
        with pytest.raises(JobStoppedError), run.stage("denoise"):
            raise AssertionError
        assert list(run.stage_seconds) == ["download_seconds"]
        assert run.progress.stage == "download"

    in_loop(act)


@pytest.mark.parametrize("sign", ["stood still", "was not answered", None])
def test_a_stop_after_a_time_without_contact_may_mean_that_another_worker_has_the_job(
    make_run: Callable[..., JobRun], sign: str | None
) -> None:
    def act() -> None:
        run = make_run()
        run.was_out_of_touch = sign == "stood still"
        run.progress.was_unanswered = sign == "was not answered"
        run.stop.set()
        with pytest.raises(JobStoppedError) as stopped:
            run.check()
        assert stopped.value.retryable is (sign is not None)

    in_loop(act)


def test_a_job_has_the_operators_time_and_without_a_limit_any(
    make_run: Callable[..., JobRun],
) -> None:
    def act() -> None:
        make_run(Settings(job_timeout_seconds=60.0)).check()
        late = make_run(Settings(job_timeout_seconds=60.0))
        late.started -= 61.0
        with pytest.raises(DeadlineExceededError, match="limit of 60 s"):
            late.check()
        unlimited = make_run()
        unlimited.started -= 1e6
        unlimited.check()

    in_loop(act)


def test_what_a_finished_job_took_is_learned_for_the_next_estimate(
    make_run: Callable[..., JobRun], engine: Engine, temporary_directory: Path
) -> None:
    throughput = ThroughputEstimator()

    def act() -> tuple[dict[str, Any], ...]:
        before = make_run(dry_run=True).execute(engine, throughput)
        made = make_run(seed=3).execute(engine, throughput)
        after = make_run(dry_run=True).execute(engine, throughput)
        return before, made, after

    before, made, after = in_loop(act)
    assert before["estimate_seconds"] is None
    assert after["estimate_seconds"] == pytest.approx(made["metrics"]["total_seconds"], abs=0.1)
    assert list(made["metrics"])[:5] == [
        f"{stage}_seconds" for stage in ("download", "preprocess", "denoise", "decode", "upload")
    ]
    assert list(temporary_directory.iterdir()) == []


def test_a_dry_run_tells_what_the_reply_would_warn_of(
    make_run: Callable[..., JobRun], engine: Engine, make_speech: Callable[..., bytes]
) -> None:
    recording = bytearray(make_speech(seconds=0.4))
    recording[44:] = bytes(len(recording) - 44)  # after the header of a WAV
    silence = base64.b64encode(recording).decode()

    said = {"audio": silence, "prompt": "so many words " * 140}
    planned = in_loop(lambda: make_run(dry_run=True, **said).execute(engine, ThroughputEstimator()))
    made = in_loop(lambda: make_run(**said).execute(engine, ThroughputEstimator()))

    silent, cut = planned["warnings"]
    assert silent == "the recording is silent"
    assert cut.startswith("the prompt is longer")
    assert made["warnings"] == planned["warnings"]


def test_a_dry_run_warns_of_a_portrait_without_a_face(
    make_run: Callable[..., JobRun], engine: Engine
) -> None:
    wall = base64.b64encode(encoded(Image.new("RGB", (300, 300), "grey"), "PNG")).decode()

    def planned(**changes: Any) -> list[str]:
        run = make_run(dry_run=True, image=wall, **changes)
        warnings: list[str] = run.execute(engine, ThroughputEstimator())["warnings"]
        return warnings

    [told] = in_loop(planned)
    assert told.startswith("no face was found")
    assert in_loop(lambda: planned(face_box=[0, 0, 100, 100])) == []


@pytest.fixture(scope="module")
def tall_portrait(make_portrait: Callable[..., bytes]) -> str:
    """A face of 320 pixels in the upper half of 320 x 560."""
    image = Image.new("RGB", (320, 560), "grey")
    image.paste(Image.open(io.BytesIO(make_portrait())), (0, 60))
    return base64.b64encode(encoded(image, "PNG")).decode()


@pytest.mark.parametrize(
    ("output", "size"),
    [
        ({}, (220, 384)),
        ({"aspect": "16:9", "fit": "contain", "format": "webm"}, (448, 252)),
        pytest.param(
            {"aspect": "4:5", "codec": "hevc", "quality": 30}, (256, 320), marks=pytest.mark.slow
        ),
    ],
)
def test_a_video_has_the_shape_and_the_format_that_its_plan_tells(
    make_run: Callable[..., JobRun],
    engine: Engine,
    tall_portrait: str,
    output: dict[str, Any],
    size: tuple[int, int],
) -> None:
    asked: dict[str, Any] = {"image": tall_portrait, "face_box": [80, 120, 160, 180]}
    logo = base64.b64encode(encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 255)), "PNG")).decode()
    mark = {"image": logo, "opacity": 1, "place": "top-left"}
    asked["output"] = {**output, "thumbnail": True, "gif": True, "watermark": mark}
    throughput = ThroughputEstimator()

    plan = in_loop(lambda: make_run(**asked, dry_run=True).execute(engine, throughput))["plan"]
    is_signed = "codec" in output
    certificate, key = signing_pair() if is_signed else (None, None)
    settings = Settings(c2pa_certificate=certificate, c2pa_private_key=key)
    made = in_loop(lambda: make_run(settings, **asked).execute(engine, throughput))

    assert made["provenance"] == ("c2pa" if is_signed else "metadata")
    assert (plan["width"], plan["height"]) == (made["width"], made["height"]) == size
    assert made["content_type"] == f"video/{output.get('format', 'mp4')}"
    with av.open(io.BytesIO(base64.b64decode(made["video_base64"]))) as container:
        picture = container.streams.video[0].codec_context
        assert (picture.width, picture.height) == size
        vp9 = "vp9" if made["content_type"] == "video/webm" else "h264"
        assert picture.name == output.get("codec", vp9)
    content = base64.b64decode(made["thumbnail_base64"])
    thumbnail = Image.open(io.BytesIO(content))
    assert thumbnail.size == size
    assert thumbnail.getpixel((20, 20)) == pytest.approx((255, 0, 0), abs=12)
    gif = Image.open(io.BytesIO(base64.b64decode(made["gif_base64"])))
    assert gif.width / gif.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert gif.convert("RGB").getpixel((15, 15)) == pytest.approx((255, 0, 0), abs=30)
    if is_signed:
        for kind, name in (("image/jpeg", "thumbnail"), ("video/mp4", "video")):
            content = base64.b64decode(made[f"{name}_base64"])
            with c2pa.Reader(kind, io.BytesIO(content)) as reader:
                assert reader.get_validation_state() == "Valid"
                assert hashlib.sha256(base64.b64decode(tall_portrait)).hexdigest() in reader.json()


def test_a_face_that_the_ratio_would_cut_is_refused_before_it_costs_anything(
    make_run: Callable[..., JobRun], engine: Engine, tall_portrait: str
) -> None:
    asked = {"image": tall_portrait, "output": {"aspect": "16:9"}}

    def act() -> None:
        for is_dry in (True, False):
            run = make_run(**asked, dry_run=is_dry, face_box=[10, 100, 300, 300])
            with pytest.raises(InvalidInputError, match="higher than the part") as caught:
                run.execute(engine, ThroughputEstimator())
            assert caught.value.field == "output.aspect"
            assert run.stage_seconds == {}

    in_loop(act)


def test_the_face_that_is_found_in_the_whole_portrait_is_the_one_in_its_part(
    make_speech: Callable[..., bytes], engine: Engine
) -> None:
    photo = Image.open(Path(__file__).parents[1] / "data" / "astronaut.jpg").convert("RGB")
    image = Image.new("RGB", (600, 200), "grey")
    image.paste(photo, (400, 0))
    media = {"image": "AA==", "audio": "AA=="}
    params = JobInput.model_validate({**media, "resolution": 256, "output": {"aspect": "1:1"}})

    nobody_hears: Any = None
    scene = Scene.of(image, nobody_hears, params, [None], engine)

    assert scene.portrait.size == (256, 256)
    assert scene.params.face_box is not None
    x, y, width, height = scene.params.face_box
    assert x < 256 * 95 / 200 < x + width  # where it is in the photo, which is the part
    assert y < 256 * 65 / 200 < y + height


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"face_box": [300, 300, 100, 100]}, "face_box"), ({"audio": "AAAA"}, "audio")],
)
def test_a_job_that_fails_leaves_no_file(
    make_run: Callable[..., JobRun],
    engine: Engine,
    temporary_directory: Path,
    changes: dict[str, Any],
    field: str,
) -> None:
    def act() -> None:
        with pytest.raises(WorkerError) as caught:
            make_run(**changes).execute(engine, ThroughputEstimator())
        assert caught.value.field == field

    in_loop(act)
    assert list(temporary_directory.iterdir()) == []


def test_the_files_of_a_job_whose_thread_is_stuck_can_be_removed(
    make_run: Callable[..., JobRun],
    engine: Engine,
    temporary_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[Path] = []

    def act() -> None:
        run = make_run()
        run.remove_files()  # there are none yet

        def meet(*_: Any) -> None:  # as the coroutine does while the thread waits in vain
            assert list(temporary_directory.iterdir()) != []
            run.remove_files()
            left.extend(temporary_directory.iterdir())
            raise InvalidInputError("the end")

        monkeypatch.setattr(Engine, "encode", meet)
        with pytest.raises(InvalidInputError):
            run.execute(engine, ThroughputEstimator())

    in_loop(act)
    assert left == []
