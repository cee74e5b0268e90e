"""The studio as a person meets it: a real studio process, its own endpoint, a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from local_endpoint.worker_process import kill_group
from tests.support.waiting import wait_until

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
WAIT_MILLISECONDS = 120_000  # a machine may be busy
expect.set_options(timeout=WAIT_MILLISECONDS)

ROOT = Path(__file__).parents[2]
STUDIO_PYTHON = ROOT / ".venv-studio" / "bin" / "python"
START_SECONDS = 600
JOB_MILLISECONDS = 600_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = pytest.mark.browser


class StudioProcess:
    """A running `python -m studio`."""

    def __init__(
        self, directory: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.directory = directory
        self.url = f"http://127.0.0.1:{self.port}/"
        self._options = options
        self._environment = {"PATH": os.defpath, **(environment or {})}
        self.log_path = directory.with_suffix(".log")

    def start(self) -> None:
        command = [str(STUDIO_PYTHON), "-m", "studio", "--port", str(self.port)]
        command += ["--directory", str(self.directory), *self._options]
        with self.log_path.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while b"The studio is at" not in self.log_path.read_bytes()[begin:]:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        assert self.process.wait(300) == 0, self.log

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def keys(self) -> list[str]:
        """Every secret of the endpoint that the studio has started."""
        local = self.directory / "local"
        return [path.read_text().strip() for path in local.glob("*-key")]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Iterator[StudioProcess]:
    directory = tmp_path_factory.mktemp("studio") / "files"
    with StudioProcess(directory, "--model-dir", str(random_model)) as studio:
        yield studio
    assert "Traceback" not in studio.log


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=[
                "--no-sandbox",
                "--use-fake-device-for-media-stream",  # a microphone that beeps
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each a browser of its own; none may fail or ask anybody else for anything.

    Nor may one use gradio's queue, which loses an event now and then (`studio.page`).
    """
    problems, contexts = [], []

    def open_page(url: str, viewport: dict[str, int] = DESKTOP, context: Any = None) -> Any:
        if context is None:
            context = chromium.new_context(
                viewport=viewport, permissions=["microphone"], accept_downloads=True
            )
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MILLISECONDS)
        own = url.split("?")[0]
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))

        def check(request: Any) -> None:
            is_own = request.url.startswith((own, "data:", "blob:"))
            if not is_own or "/queue/" in request.url:
                problems.append(f"asked for {request.url}")

        page.on("request", check)
        page.goto(url)
        expect(page.get_by_role("button", name="Make the video")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> Path:
    """A portrait, a speech, and a file that is neither."""
    directory = tmp_path_factory.mktemp("media")
    (directory / "portrait.png").write_bytes(make_portrait())
    (directory / "speech.wav").write_bytes(make_speech(1.0))
    (directory / "bad.png").write_bytes(b"This is no image.")
    return directory


def fill(page: Any, files: Path, *, portrait: str = "portrait.png", steps: Any = None) -> None:
    """Drops the files, and sets the number of steps if it is given."""
    page.locator("#image input[type=file]").set_input_files(files / portrait)
    page.locator("#audio input[type=file]").set_input_files(files / "speech.wav")
    expect(page.locator("#image img")).to_be_visible()
    expect(page.locator("#audio").get_by_text("0:01")).to_be_visible()
    if steps is not None:
        set_steps(page, steps)


def unfold(page: Any, name: str) -> None:
    """Opens a part of the page.

    gradio draws an opened part once more: what is entered in that moment is lost, and now and then
    the click is.
    """
    part = page.get_by_role("button", name=name)
    deadline = time.monotonic() + WAIT_MILLISECONDS / 1000
    while "open" not in part.get_attribute("class").split():
        assert time.monotonic() < deadline
        part.click()
        page.wait_for_timeout(500)


def set_steps(page: Any, steps: int | None) -> None:
    unfold(page, "Settings")
    number = page.get_by_label("number input for Steps")
    number.fill(str(steps))
    number.press("Tab")


def make(page: Any) -> None:
    page.get_by_role("button", name="Make the video").click()


def bar(page: Any) -> Any:
    return page.get_by_role("progressbar", name="Progress")


def wait_for_step(page: Any) -> None:
    expect(page.locator("#result")).to_contain_text(
        re.compile(r"Step \d+ of \d+"), timeout=JOB_MILLISECONDS
    )


def wait_for_video(page: Any) -> Any:
    player = page.locator("video.result")
    expect(player).to_be_visible(timeout=JOB_MILLISECONDS)
    return player


def job_in_address(page: Any) -> Any:
    page.wait_for_url(re.compile(r"\?job="))
    return page.url.rpartition("=")[2]


def test_a_person_makes_a_video_watches_it_and_takes_it_home(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path, tmp_path: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files)
    make(page)

    expect(bar(page)).to_have_attribute(
        "aria-valuenow", re.compile(r"\d+"), timeout=WAIT_MILLISECONDS
    )
    seen = set()
    player = page.locator("video.result")
    while not player.is_visible():
        # which waits for no card: it goes when the video comes
        seen.update(page.locator("#result .card").all_inner_texts())
        page.wait_for_timeout(200)
    shares = [int(match[1]) for text in seen if (match := re.search(r"(\d+) %", text))]
    assert len(set(shares)) >= 3
    assert any(re.search(r"Step \d+ of 20", text) for text in seen)
    assert any(re.search(r"about .+ left", text) for text in seen)

    player.evaluate("player => player.play()")
    page.wait_for_function(
        "document.querySelector('video.result').ended", timeout=WAIT_MILLISECONDS
    )
    assert player.evaluate("player => player.webkitAudioDecodedByteCount") > 0
    assert player.evaluate("player => player.webkitDecodedFrameCount") > 10
    assert player.evaluate("player => player.duration") == pytest.approx(1.0, abs=0.15)
    expect(page.locator(".caption")).to_contain_text("256 × 256")  # noqa: RUF001

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").nth(-1).click()
    path = tmp_path / "video.mp4"
    download.value.save_as(path)
    assert download.value.suggested_filename.endswith(".mp4")
    kept = studio.directory / "jobs" / job_in_address(page)
    assert path.read_bytes() == next(kept.glob("*.mp4")).read_bytes()


def test_a_video_has_the_shape_and_the_file_that_the_page_names(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files, steps=1)
    unfold(page, "Output")
    page.get_by_label("9:16").check()
    page.get_by_label("webm").check()
    page.locator("[id='output.watermark.text']").get_by_role("textbox").fill("AI")
    unfold(page, "This request as code")
    code = page.locator("#result").get_by_text("watermark")
    expect(code.first).to_be_visible()
    expect(page.locator("#result").get_by_text("9:16").first).to_be_visible()
    make(page)

    player = wait_for_video(page)
    page.wait_for_function("document.querySelector('video.result').videoWidth > 0")
    width, height = player.evaluate("player => [player.videoWidth, player.videoHeight]")
    assert width / height == pytest.approx(9 / 16, rel=0.01)
    assert player.get_attribute("src").endswith(".webm")


def test_a_job_is_cancelled_in_the_middle(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files, steps=100)
    make(page)
    wait_for_step(page)

    page.get_by_role("button", name="Cancel").click()

    expect(page.get_by_text("Cancelled.").first).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#history")).to_contain_text("cancelled")


def test_a_cancel_that_does_not_reach_the_endpoint_is_reported(
    tmp_path_factory: pytest.TempPathFactory,
    open_page: Callable[..., Any],
    files: Path,
    random_model: Path,
) -> None:
    directory = tmp_path_factory.mktemp("deaf") / "files"
    with StudioProcess(directory, "--model-dir", str(random_model)) as studio:
        page = open_page(studio.url)
        fill(page, files, steps=100)
        make(page)
        wait_for_step(page)
        workers = json.loads((directory / "local" / "workers.json").read_text())
        subprocess.run(["pkill", "-KILL", "-f", f"{directory}/local"], check=True)
        for worker in workers:  # else they would wait for their endpoint for ever
            kill_group(worker["pid"])
        page.get_by_role("button", name="Cancel").click()
        failure = page.get_by_text("The job could not be cancelled")
        expect(failure).to_be_visible(timeout=JOB_MILLISECONDS)
        card = page.locator("#result .card").filter(has=bar(page))
        expect(card).to_contain_text("The endpoint does not answer", timeout=JOB_MILLISECONDS)
        expect(card).not_to_contain_text("left")
        expect(failure).to_be_visible()
    assert "Traceback" not in studio.log


def test_a_bad_file_is_told_in_words(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    page.locator("#image input[type=file]").set_input_files(files / "bad.png")
    page.locator("#audio input[type=file]").set_input_files(files / "speech.wav")
    expect(page.locator("#audio").get_by_text("0:01")).to_be_visible()
    make(page)
    message = page.locator("p.field-error")
    expect(message).to_be_visible(timeout=JOB_MILLISECONDS)
    expect(message).to_contain_text("The portrait is not an image")
    assert_right_below(page, "#image", message)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("image", "The portrait is missing."), ("audio", "The speech is missing.")],
)
def test_a_missing_input_is_named_at_its_place(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path, missing: str, words: str
) -> None:
    page = open_page(studio.url)
    present, name = {"image": ("audio", "speech.wav"), "audio": ("image", "portrait.png")}[missing]
    page.locator(f"#{present} input[type=file]").set_input_files(files / name)
    page.locator(f"#{present}").get_by_role("button", name=re.compile("Clear|Remove")).wait_for()
    make(page)
    message = page.get_by_text(words)
    expect(message).to_be_visible()
    assert_right_below(page, f"#{missing}", message)
    expect(page.get_by_role("button", name="Make the video")).to_be_enabled()


def test_a_value_over_its_limit_is_named_at_its_field_which_is_unfolded(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files)
    unfold(page, "Settings")
    page.get_by_label("Seed").fill("9007199254740992")
    page.get_by_role("button", name="Settings").click()
    make(page)
    message = page.get_by_text("Seed must be less than or equal to 9007199254740991.")
    expect(message).to_be_visible()
    assert_right_below(page, "#seed", message)


def assert_right_below(page: Any, field: str, message: Any) -> None:
    def gap() -> Any:
        upper, lower = page.locator(field).bounding_box(), message.bounding_box()
        return lower["y"] - (upper["y"] + upper["height"])

    wait_until(lambda: 0 <= gap() < 60)  # the part of the page may be unfolding


def test_a_reloaded_page_finds_its_job_and_another_tab_has_its_own(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files, steps=60)
    page.locator("#prompt textarea").fill("A person in a garden.")
    make(page)
    wait_for_step(page)
    job = job_in_address(page)

    other = open_page(studio.url, context=page.context)
    expect(other.get_by_text("Your video appears here.")).to_be_visible()
    fill(other, files, steps=2)
    make(other)
    assert job_in_address(other) != job

    page.reload()
    wait_for_step(page)
    assert job_in_address(page) == job
    expect(page.locator("#prompt textarea")).to_have_value("A person in a garden.")
    expect(page.locator("#image img")).to_be_visible()
    address = wait_for_video(page).get_attribute("src")
    assert job in address
    assert job not in wait_for_video(other).get_attribute("src")


def test_a_closed_page_stops_nothing_and_the_history_outlives_the_studio(
    tmp_path_factory: pytest.TempPathFactory,
    open_page: Callable[..., Any],
    files: Path,
    random_model: Path,
) -> None:
    directory = tmp_path_factory.mktemp("restart") / "files"
    with StudioProcess(directory, "--model-dir", str(random_model)) as studio:
        page = open_page(studio.url)
        fill(page, files, steps=2)
        make(page)
        job = job_in_address(page)
        page.close()
        record = studio.directory / "jobs" / job / "record.json"
        wait_until(lambda: '"COMPLETED"' in record.read_text())
        studio.stop(signal.SIGINT)
        studio.start()
        page = open_page(studio.url)
        page.locator("#history").get_by_role("button", name="Thumbnail 1 of 1").click()
        assert job in wait_for_video(page).get_attribute("src")
        assert job_in_address(page) == job
        page.get_by_role("button", name="Use its inputs again").click()
        expect(page.locator("#image img")).to_be_visible()
    assert "Traceback" not in studio.log
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(studio.directory) not in left


def test_speech_can_be_recorded(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    page.locator("#image input[type=file]").set_input_files(files / "portrait.png")
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#audio").get_by_label("Play", exact=True)).to_be_visible()
    set_steps(page, 2)
    make(page)
    player = wait_for_video(page)
    page.wait_for_function("document.querySelector('video.result').duration > 0.5")
    assert player.evaluate("player => player.error") is None


def test_no_key_is_in_the_page_the_browser_or_the_files_that_it_can_fetch(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    typed = "rpa_TYPED-KEY-OF-A-PERSON"
    unfold(page, "Endpoint")
    page.locator("#endpoint input, #endpoint textarea").fill("http://127.0.0.1:9/v2/x")
    page.get_by_label("API key").fill(typed)
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_text("Not connected.")).to_be_visible(timeout=WAIT_MILLISECONDS)
    unfold(page, "This request as code")
    expect(page.get_by_text("$RUNPOD_API_KEY").first).to_be_visible()

    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    databases = page.evaluate("indexedDB.databases().then(found => found.map(each => each.name))")
    texts = [page.content(), stored, studio.log]
    texts += [path.read_text() for path in (studio.directory / "jobs").rglob("*.json")]
    for key in [typed, *studio.keys]:
        assert not any(key in text for text in texts)
    assert len(studio.keys) >= 1
    assert databases == []
    for name in ("local/api-key", "local/bucket.json", "local/endpoint.log"):
        address = f"{studio.url}gradio_api/file={studio.directory / name}"
        assert page.request.get(address).status == 403


def test_the_studios_own_key_goes_to_its_own_endpoint_alone(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files)
    unfold(page, "Endpoint")
    page.locator("#endpoint input, #endpoint textarea").fill("http://127.0.0.1:9/v2/x")
    make(page)
    expect(page.get_by_text("The API key is missing.")).to_be_visible()


def test_a_wrong_key_is_named_at_its_field_and_a_right_one_connects(
    tmp_path_factory: pytest.TempPathFactory, studio: StudioProcess, open_page: Callable[..., Any]
) -> None:
    local = f"http://127.0.0.1:{endpoint_port(studio)}/v2/local"
    with StudioProcess(tmp_path_factory.mktemp("second") / "files", "--endpoint", local) as second:
        page = open_page(second.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Connect").click()
        expect(page.get_by_text("The API key is not taken by the endpoint.")).to_be_visible()
        page.get_by_label("API key").fill((studio.directory / "local" / "api-key").read_text())
        page.get_by_role("button", name="Connect").click()
        expect(page.get_by_text("Connected.")).to_be_visible()
        expect(page.get_by_label("API key")).to_have_value("")
        expect(page.locator("p.field-error")).to_have_count(0)


def test_the_key_of_the_environment_connects_and_is_nowhere_on_the_page(
    tmp_path_factory: pytest.TempPathFactory, studio: StudioProcess, open_page: Callable[..., Any]
) -> None:
    key = (studio.directory / "local" / "api-key").read_text().strip()
    local = f"http://127.0.0.1:{endpoint_port(studio)}/v2/local"
    directory = tmp_path_factory.mktemp("third") / "files"
    with StudioProcess(
        directory, "--endpoint", local, environment={"RUNPOD_API_KEY": key}
    ) as third:
        page = open_page(third.url)
        unfold(page, "Endpoint")
        page.get_by_role("button", name="Connect").click()
        expect(page.get_by_text("Connected.")).to_be_visible()
        assert key not in page.content() + third.log


def endpoint_port(studio: StudioProcess) -> Any:
    log = (studio.directory / "local" / "endpoint.log").read_text()
    return re.findall(r"http://127\.0\.0\.1:(\d+)/v2/local", log)[-1]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_fits_its_width_with_all_of_it_unfolded(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path, viewport: dict[str, int]
) -> None:
    page = open_page(studio.url, viewport)
    fill(page, files)
    unfold_all(page)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == viewport["width"]
    left, right = (page.locator(each).bounding_box() for each in ("#make", "#result"))
    is_beside = right["x"] > left["x"] + left["width"]
    assert is_beside == (viewport is DESKTOP)


def unfold_all(page: Any) -> None:
    for name in ("Settings", "Output", "Endpoint", "This request as code"):
        unfold(page, name)


def test_every_control_has_a_name(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files)
    unfold_all(page)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "radio", "slider", "spinbutton", "tab", "Video"}
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in roles
    ]
    assert len(controls) > 30
    assert [control for control in controls if not control[1].strip()] == []


def test_a_keyboard_reaches_every_control_and_sees_where_it_is(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files)
    page.mouse.click(5, 5)
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const element = document.activeElement;
              const label = element.labels?.[0]?.innerText;
              const name = element.getAttribute("aria-label") || label || element.innerText;
              return [name.trim(), getComputedStyle(element).outlineStyle];
            }"""
        )
        if page.evaluate("document.activeElement === document.body"):
            break
        assert outline == "solid", name
        reached.append(name)
    text = "\n".join(reached)
    for name in ("Upload file", "Record audio", "Prompt", "Draft", "Settings", "Endpoint"):
        assert name in text
    assert reached.index("Make the video") > reached.index("Record audio")
    assert "This request as code" in text


def test_a_keyboard_alone_begins_and_cancels_a_job(
    studio: StudioProcess, open_page: Callable[..., Any], files: Path
) -> None:
    page = open_page(studio.url)
    fill(page, files, steps=100)
    page.get_by_label("Balanced").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("Balanced")).to_be_checked()
    page.get_by_role("button", name="Make the video").focus()
    page.keyboard.press("Enter")
    job_in_address(page)
    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Space")
    expect(page.get_by_text("Cancelled.").first).to_be_visible()


def test_a_file_of_this_machine_is_not_taken_for_an_uploaded_one(tmp_path: Path) -> None:
    """Speaks to the page's server as a program that has no page."""
    with StudioProcess(tmp_path / "files", "--endpoint", "http://127.0.0.1:9/v2/x") as studio:
        config = httpx.get(f"{studio.url}config").json()
        start = next(each for each in config["dependencies"] if each["api_name"] == "_start")
        parts = {part["id"]: part for part in config["components"]}
        (tmp_path / "secret").write_text("secret")
        for path in (tmp_path / "secret", ROOT / "README.md"):
            file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            data = [
                file if parts[part]["type"] in ("image", "audio") else None
                for part in start["inputs"]
            ]
            body = {"data": data, "fn_index": start["id"], "session_hash": "a"}
            answer = httpx.post(f"{studio.url}gradio_api/run/_start", json=body)
            assert answer.status_code == 500  # and the reason is nobody's who may ask
            assert str(path) not in answer.text
        uploads = studio.directory / "uploads"
        assert not any(path.name in ("secret", "README.md") for path in uploads.rglob("*"))


def test_a_port_that_is_taken_is_reported_in_one_line(
    studio: StudioProcess, tmp_path: Path
) -> None:
    second = StudioProcess(tmp_path / "files", "--endpoint", "x", "--port", str(studio.port))
    with pytest.raises(AssertionError, match="Address already in use"):
        second.start()
    assert len(second.log.splitlines()) == 1


def test_another_name_for_this_machine_is_not_answered(
    studio: StudioProcess, open_page: Callable[..., Any]
) -> None:
    page = open_page(studio.url)
    for host, status in ((f"127.0.0.1:{studio.port}", 200), ("studio.example", 403)):
        assert page.request.get(studio.url, headers={"Host": host}).status == status
