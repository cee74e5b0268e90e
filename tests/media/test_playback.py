"""Videos as a browser plays them: Chromium says when it shows a flash and where it hears a clap."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar_client.contract.formats import Codec, Container
from worker.media.encoding import Encoding
from worker.media.inputs import AudioSegment
from worker.media.video import write_video

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

RATE_HZ = 44_100
# The frames come from the player itself; the sound from the browser's decoder of the same file.
PLAY = """async (name) => {
  const video = document.createElement('video');
  video.muted = true;
  video.src = name;
  document.body.append(video);
  await new Promise((done) => { video.onloadeddata = done; video.onerror = done; });
  if (video.error) return {error: video.error.message};
  const file = await (await fetch(name)).arrayBuffer();
  const context = new OfflineAudioContext(1, 48000, 48000);
  const sound = (await context.decodeAudioData(file)).getChannelData(0);
  const canvas = document.createElement('canvas').getContext('2d');
  const flashes = [];
  const look = (now, frame) => {
    canvas.drawImage(video, 0, 0, 8, 8);
    if (canvas.getImageData(4, 4, 1, 1).data[0] > 128) flashes.push(frame.mediaTime);
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
  video.playbackRate = 0.5;  // a busy machine drops no frame
  await video.play();
  await new Promise((done) => { video.onended = done; });
  return {
    flashes,
    clap: sound.findIndex((sample) => Math.abs(sample) > 0.2) / 48000,
    duration: video.duration,
    heard: video.webkitAudioDecodedByteCount,
  };
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An empty page of a server whose files lie in `page.directory`."""
    directory = tmp_path_factory.mktemp("videos")
    (directory / "index.html").write_text("<body></body>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {".html": "text/html", ".mp4": "video/mp4", ".webm": "video/webm"}  # noqa: RUF012

        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Handler, directory=str(directory))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        playwright.sync_playwright() as api,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = api.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.directory = directory
        yield page
        browser.close()
        server.shutdown()


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_sound_and_picture_meet_in_a_browser(page: Any, container: Container, codec: Codec) -> None:
    frames = np.zeros((50, 64, 96, 3), np.uint8)
    frames[25] = 255
    time = np.arange(2 * RATE_HZ) / RATE_HZ
    clap = 0.5 * np.sin(2 * np.pi * 1000 * time) * ((time >= 1) & (time < 1.02))
    samples = np.rint(32767 * clap).astype("<i2").tobytes()
    path: Path = page.directory / f"{codec}.{container}"
    write_video(
        path,
        [frames],
        fps=25.0,
        height=64,
        width=96,
        recording=AudioSegment(samples, sample_width=2, frame_rate=RATE_HZ, channels=1),
        metadata={},
        encoding=Encoding.of(container, codec, None),
    )

    seen = page.evaluate(PLAY, path.name)

    assert seen["flashes"] == [1.0]
    assert seen["clap"] == pytest.approx(1.0, abs=0.02)
    assert seen["duration"] == pytest.approx(2.0, abs=0.02)
    assert seen["heard"] > 0
