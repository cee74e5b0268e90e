"""Settings and request stand in several places; the code's is the one that counts."""

import json
import re
from pathlib import Path
from typing import Any

from builder import listing
from builder.download import VARIANTS
from worker.loading import model_directory
from worker.service import fitness
from worker.settings import Settings


def test_the_hub_s_files_are_made_from_the_settings() -> None:
    for path, content in (
        (listing.HUB_PATH, listing.hub()),
        (listing.TESTS_PATH, listing.hub_tests()),
    ):
        assert json.loads(path.read_text()) == json.loads(json.dumps(content)), (
            "run python -m builder.listing"
        )


def test_the_readme_lists_every_setting_and_every_field_of_the_request() -> None:
    text = listing.README_PATH.read_text()
    assert listing.readme(text) == text, "run python -m builder.listing"


def entries() -> dict[str, dict[str, Any]]:
    return {entry["key"]: entry["input"] for entry in listing.hub()["config"]["env"]}


def filled_in(defaults: dict[str, Any]) -> dict[str, str]:
    """The environment that the form gives with these values, the rest as it stands there."""
    values = {key: one["default"] for key, one in entries().items() if "default" in one}
    return {key: str(value) for key, value in (values | defaults).items()}


def test_the_hub_listing_has_what_the_hub_requires() -> None:
    hub = listing.hub()
    assert {"title", "description", "type", "category", "config", "iconUrl"} <= set(hub)
    assert {"runsOn", "containerDiskInGb"} <= set(hub["config"])
    for entry in entries().values():
        assert entry["type"] in ("string", "number", "boolean", "huggingface")
        assert entry["description"].endswith(".")
    assert len(entries()) == len(hub["config"]["env"])
    assert set(entries()) == {name.upper() for name in Settings.model_fields} | {
        "RUNPOD_INIT_TIMEOUT",
        "HF_TOKEN",
    }


def test_the_form_leaves_no_model_open() -> None:
    model = entries()["MODEL_REPOSITORY"]
    assert (model["type"], model["required"], model["advanced"]) == ("huggingface", True, False)
    settings = Settings.from_env(filled_in({"MODEL_REPOSITORY": "me/model"}))
    assert settings == Settings(model_repository="me/model", allow_model_download=True)


def test_every_preset_is_of_the_listing_and_starts(tmp_path: Path) -> None:
    presets = listing.hub()["config"]["presets"]
    assert {preset["defaults"]["AVATAR_MODEL"] for preset in presets} == {
        "hunyuan-video-avatar",
        "demo",
    }
    for preset in presets:
        assert set(preset["defaults"]) <= set(entries())
        chosen = {"MODEL_REPOSITORY": "me/model"} | preset["defaults"]
        settings = Settings.from_env(filled_in(chosen))
        if settings.avatar_model == "demo":
            assert model_directory.find(settings, tmp_path).path == model_directory.DEMO_DIR
            assert "MODEL_REPOSITORY" in preset["defaults"]  # which the form asks for
        else:  # the cache of RunPod holds the model, or the worker fetches it
            assert settings.allow_model_download
            snapshot = make_snapshot(tmp_path, "me/model")
            assert model_directory.find(settings, tmp_path).path == snapshot


def make_snapshot(root: Path, repository: str) -> Path:
    cached = root / model_directory.CACHE_DIR / f"models--{repository.replace('/', '--')}"
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "model_index.json").write_text("{}")
    return snapshot


def test_the_disk_holds_the_largest_model_and_jobs() -> None:
    image = (listing.ROOT / "docs" / "image.md").read_text()
    [*sizes_gb] = (float(size) for size in re.findall(r"(\d+\.\d) GB \|", image))
    jobs_gb = fitness.MIN_FREE_DISK_BYTES / 1e9
    spare_gb = model_directory.SPARE_BYTES / 1e9
    assert len(sizes_gb) == len(VARIANTS)
    assert max(sizes_gb) + jobs_gb + spare_gb < listing.CONTAINER_DISK_GB


def test_the_hub_test_is_a_small_request_that_the_worker_accepts() -> None:
    from worker.service import job_request

    document = json.loads((listing.ROOT / ".runpod" / "tests.json").read_text())
    assert len(document["tests"]) == 1
    request = job_request.parse({"id": "hub", "input": document["tests"][0]["input"]})
    assert request.input.resolution == 256
    assert request.input.num_inference_steps <= 4
