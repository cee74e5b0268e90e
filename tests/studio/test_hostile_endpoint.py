"""The studio in a real browser before an endpoint, a file and another page that mean it ill."""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from avatar_client.contract.preview import to_data_url
from tests.studio.test_browser import StudioProcess, job_in_address, make, unfold
from tests.support.pictures import jpeg
from tests.support.scripted_server import Answer, ScriptedServer

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

pytestmark = pytest.mark.browser

# Each would set the mark, which nothing else does.
RUN = "window.hostile = 1"
SCRIPTS = (
    f"<img src=x onerror='{RUN}'><script>{RUN}</script><svg onload='{RUN}'></svg>"
    f'" autofocus onfocus="{RUN}" <iframe srcdoc="<script>parent.{RUN}</script>"></iframe>'
)
ROUTE = "/v2/x"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """An endpoint that puts markup wherever it can."""
    progress = {"stage": SCRIPTS, "progress": 0.5, "message": SCRIPTS, "step": 1, "total_steps": 2}
    markup = f"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' onload='{RUN}'/>"
    odd = [progress | {"preview": each} for each in (SCRIPTS, markup, to_data_url(jpeg()))]
    error = {"code": SCRIPTS, "message": SCRIPTS, "field": SCRIPTS, "retryable": True}
    with ScriptedServer() as server:
        counts = dict.fromkeys(("idle", "running", "inQueue"), SCRIPTS)
        server.on(f"GET {ROUTE}/health", {"workers": counts, "jobs": counts})
        server.on(f"POST {ROUTE}/run", {"id": "job-1", "status": SCRIPTS})
        server.on(
            f"GET {ROUTE}/status/job-1",
            {"id": "job-1", "status": SCRIPTS, "output": None},
            *[
                {"id": "job-1", "status": "IN_PROGRESS", "output": each}
                for each in (progress, *odd, *4 * odd[-1:])
            ],
            {"id": "job-1", "status": "FAILED", "output": {"error_info": error}, "error": SCRIPTS},
        )
        yield server


@pytest.fixture
def studio(tmp_path: Path, server: ScriptedServer) -> Iterator[StudioProcess]:
    environment = {"RUNPOD_API_KEY": "rpa_key"}
    options = ("--endpoint", f"{server.origin}{ROUTE}")
    with StudioProcess(tmp_path / "files", *options, environment=environment) as studio:
        yield studio
    assert "Traceback" not in studio.log


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_context(accept_downloads=True).new_page()
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def require_no_script(page: Any) -> None:
    page.wait_for_timeout(500)  # for what an image's failure would start
    assert page.evaluate("window.hostile") is None
    hostile = "#result script, #result img[src=x], #result iframe, p[role=status] *"
    assert page.locator(hostile).count() == 0


def test_no_text_of_an_endpoint_runs_in_the_page(
    studio: StudioProcess,
    page: Any,
    tmp_path: Path,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> None:
    (tmp_path / "portrait.png").write_bytes(make_portrait())
    (tmp_path / "speech.wav").write_bytes(make_speech(1.0))
    page.goto(studio.url)
    unfold(page, "Endpoint")
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("p[role=status]")).to_contain_text("Connected. Workers: 0 idle")
    require_no_script(page)

    page.locator("#image input[type=file]").set_input_files(tmp_path / "portrait.png")
    page.locator("#audio input[type=file]").set_input_files(tmp_path / "speech.wav")
    expect(page.locator("#audio").get_by_text("0:01")).to_be_visible()
    make(page)
    expect(page.locator("#result .card")).to_contain_text("<img src=x", timeout=60_000)
    require_no_script(page)
    picture = page.locator("#result .card img.preview")  # the only one that is a picture
    expect(picture).to_be_visible(timeout=60_000)
    assert picture.evaluate("image => image.naturalWidth") == 64
    require_no_script(page)
    failed = page.locator("#result .card.failed")
    expect(failed).to_contain_text("<script>", timeout=60_000)
    require_no_script(page)

    page.reload()  # and from the file that it has become
    expect(page.locator("#result .card.failed")).to_contain_text("<script>")
    require_no_script(page)
    kept = studio.directory / "jobs" / job_in_address(page)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert stat.S_IMODE((kept / "record.json").stat().st_mode) == 0o600


def test_a_file_of_a_job_is_downloaded_and_never_a_page(
    studio: StudioProcess, page: Any, tmp_path: Path
) -> None:
    directory = studio.directory / "jobs" / "20260131-120000-0-abc"
    directory.mkdir(parents=True)
    (directory / "portrait.html").write_text(f"<script>{RUN}</script>")
    address = f"{studio.url}gradio_api/file={directory / 'portrait.html'}"

    page.goto(studio.url)
    with page.expect_download() as download:
        page.evaluate("address => { window.open(address, '_self') }", address)
    assert download.value.suggested_filename == "portrait.html"
    answer = httpx.get(address)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_another_page_of_the_browser_reaches_nothing(
    studio: StudioProcess, page: Any, server: ScriptedServer
) -> None:
    """The other page is the endpoint's, which has an origin of its own on this machine."""
    other = server.on(
        "GET /evil", Answer(body=b"<title>evil</title>", headers={"Content-Type": "text/html"})
    )
    page.goto(other)
    post = """async ([url, mode]) => {
      const form = new FormData();
      form.append("files", new File(["x"], "x.png"));
      try { return (await fetch(url, {method: "POST", body: form, mode})).status }
      catch (error) { return "refused" }
    }"""
    upload = f"{studio.url}gradio_api/upload"
    assert page.evaluate(post, [upload, "cors"]) in (403, "refused")
    page.evaluate(post, [upload, "no-cors"])  # its answer is hidden from a page, its effect is not
    uploads = [path for path in (studio.directory / "uploads").rglob("*") if path.is_file()]
    assert uploads == []
    own = {"Origin": studio.url.rstrip("/")}
    sent = httpx.post(upload, files={"files": ("x.png", b"x")}, headers=own)
    assert sent.status_code == 200  # the same from the studio's own page
    assert json.loads(sent.text)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_leads_here_is_not_answered(studio: StudioProcess, host: str) -> None:
    answer = httpx.get(studio.url, headers={"Host": f"{host}:{studio.port}"})
    assert answer.status_code == 403
    assert "gradio" not in answer.text
