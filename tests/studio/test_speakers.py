"""Several speakers on the page: faces are clicked, each gets a recording, and the request has both.

The endpoint is scripted: whose mouth moves is the worker's matter.
"""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.studio.test_browser import StudioProcess, expect, job_in_address, make, unfold
from tests.studio.test_browser import chromium as chromium  # fixtures
from tests.studio.test_browser import open_page as open_page
from tests.support.scripted_server import ScriptedServer

ROUTE = "/v2/x"
BOXES = [[20.0, 60.0, 100.0, 120.0], [240.0, 60.0, 100.0, 120.0], [470.0, 60.0, 100.0, 120.0]]

pytestmark = pytest.mark.browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """An endpoint that finds three faces, and then refuses the second speaker's."""
    faces = [{"index": index, "face_box": box} for index, box in enumerate(BOXES)]
    found = {"id": "dry", "status": "COMPLETED", "output": {"dry_run": True, "faces": faces}}
    info = {
        "code": "INVALID_INPUT",
        "message": "has no face in it: 1 face was found",
        "field": "speakers.1.face_box",
        "retryable": False,
    }
    failed = {"id": "job", "status": "FAILED", "output": {"error_info": info}, "error": "no face"}
    with ScriptedServer() as server:
        server.on(
            f"POST {ROUTE}/run", *({"id": each, "status": "IN_QUEUE"} for each in ("dry", "job"))
        )
        server.on(f"GET {ROUTE}/status/dry", found)
        server.on(f"GET {ROUTE}/status/job", failed)
        yield server


@pytest.fixture
def studio(tmp_path: Path, server: ScriptedServer) -> Iterator[StudioProcess]:
    options = ("--endpoint", f"{server.origin}{ROUTE}")
    environment = {"RUNPOD_API_KEY": "rpa_key"}
    with StudioProcess(tmp_path / "files", *options, environment=environment) as studio:
        yield studio
    assert "Traceback" not in studio.log


def face(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_faces_are_clicked_and_each_speaks_its_own_recording(
    studio: StudioProcess,
    server: ScriptedServer,
    open_page: Callable[..., Any],
    make_speech: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    content = io.BytesIO()
    Image.new("RGB", (600, 300), "grey").save(content, "PNG")
    recordings = [make_speech(1.0), make_speech(2.0)]
    page = open_page(studio.url)

    def give(row: int, recording: bytes) -> None:
        part = page.locator(f"[id='speakers.{row}.audio']")
        file = {"name": f"{row}.wav", "mimeType": "audio/wav", "buffer": recording}
        part.locator("input[type=file]").set_input_files(file)
        expect(part.get_by_text(f"0:0{1 + row}")).to_be_visible()

    portrait = {"name": "three.png", "mimeType": "image/png", "buffer": content.getvalue()}
    page.locator("#image input[type=file]").set_input_files(portrait)
    expect(page.locator("#image img")).to_be_visible()
    expect(page.locator("#audio")).to_be_visible()
    unfold(page, "Several speakers")
    page.get_by_role("button", name="Find the faces").click()

    face(page, "Face 3").click()
    face(page, "Face 3, speaker 1").wait_for()
    expect(page.locator("#audio")).to_be_hidden()  # each has a recording of its own
    face(page, "Face 2").click()
    face(page, "Face 2, speaker 2").wait_for()
    face(page, "Face 1").click()
    face(page, "Face 1, speaker 3").wait_for()
    page.get_by_role("button", name="Remove", exact=True).first.click()  # who came after moves up
    face(page, "Face 2, speaker 1").wait_for()
    face(page, "Face 1, speaker 2").wait_for()
    give(0, recordings[0])
    make(page)
    expect(page.get_by_text("The recording of speaker 2 is missing.")).to_be_visible()
    give(1, recordings[1])
    page.get_by_label("In turn").check()
    page.get_by_label("Name").nth(1).fill("Ada")
    make(page)

    # the worker's own refusal, at the speaker whom it concerns
    refusal = page.locator("p.field-error")
    expect(refusal).to_contain_text("The box of speaker 2 has no face in it")
    sent = server.asked(f"POST {ROUTE}/run")[-1].json["input"]
    assert set(sent) == {"preview", "image", "speakers", "order"}
    assert sent["order"] == "in_turn"
    voices = [base64.b64decode(speaker.pop("audio")) for speaker in sent["speakers"]]
    assert voices == recordings
    assert sent["speakers"] == [{"face_box": BOXES[1]}, {"face_box": BOXES[0], "name": "Ada"}]

    job_in_address(page)
    page.reload()
    expect(page.get_by_text("Speaker 2: face 1")).to_be_visible()  # of the two that were chosen
    expect(page.locator("[id='speakers.1.audio']").get_by_text("0:02")).to_be_visible()
    expect(page.get_by_label("Name").nth(1)).to_have_value("Ada")
