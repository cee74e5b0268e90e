"""Settings and request stand in several places; the code's is the one that counts."""

import json

from builder import listing
from worker.settings import Settings


def test_the_hub_listing_is_made_from_the_settings() -> None:
    assert json.loads(listing.HUB_PATH.read_text()) == json.loads(json.dumps(listing.hub())), (
        "run python -m builder.listing"
    )


def test_the_readme_lists_every_setting_and_every_field_of_the_request() -> None:
    text = listing.README_PATH.read_text()
    assert listing.readme(text) == text, "run python -m builder.listing"


def test_the_hub_listing_has_what_the_hub_requires() -> None:
    hub = listing.hub()
    assert {"title", "description", "type", "category", "config"} <= set(hub)
    assert {"runsOn", "containerDiskInGb"} <= set(hub["config"])
    for entry in hub["config"]["env"]:
        assert entry["input"]["type"] in ("string", "number", "boolean")
        assert entry["input"]["description"].endswith(".")


def test_every_default_of_the_listing_is_a_value_that_the_settings_accept() -> None:
    entries = listing.hub()["config"]["env"]
    given = {e["key"]: str(e["input"]["default"]) for e in entries if "default" in e["input"]}
    assert Settings.from_env(given) == Settings()


def test_the_hub_test_is_a_small_request_that_the_worker_accepts() -> None:
    from worker.service import job_request

    document = json.loads((listing.ROOT / ".runpod" / "tests.json").read_text())
    assert len(document["tests"]) == 1
    request = job_request.parse({"id": "hub", "input": document["tests"][0]["input"]})
    assert request.input.resolution == 256
    assert request.input.num_inference_steps <= 4
