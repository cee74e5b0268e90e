"""Jobs through handler.py and RunPod's SDK in a row: every stage's seconds, and peak memory.

    python -m benchmarks.served_jobs --directory DIR [--resolutions 256 384] [--repeat 5]
    python -m benchmarks.served_jobs --demo --steps 4

Takes the model directory that `python -m benchmarks.loading` writes, or the demo model. handler.py
runs with the SDK's local server; each job brings its portrait and 5.1 s of noise in the request,
and takes its video in the reply. Presets and resolutions are gone through `--repeat` times.
"""

import argparse
import base64
import io
import os
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.random_model import report
from worker.shapes import SAMPLE_RATE_HZ

ROOT = Path(__file__).parents[1]
SPEECH_SECONDS = 5.1  # one window
START_SECONDS = 120.0
JOB_SECONDS = 3600.0
SIZES = {256: (256, 256), 384: (384, 384), 512: (512, 512), 704: (768, 704)}  # of the portrait


def speech() -> bytes:
    """A WAV of noise."""
    samples = np.random.default_rng(0).normal(size=round(SPEECH_SECONDS * SAMPLE_RATE_HZ)) * 3000
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


def portrait(width: int, height: int) -> bytes:
    """A PNG of soft colours, with nobody in it."""
    colours = np.random.default_rng(1).integers(0, 255, (height // 16, width // 16, 3))
    content = io.BytesIO()
    soft = Image.fromarray(colours.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    soft.save(content, "PNG")
    return content.getvalue()


def request(resolution: int, preset: str, steps: int) -> dict[str, Any]:
    """A job whose face is told, since there is none."""
    width, height = SIZES[resolution]
    return {
        "image": base64.b64encode(portrait(width, height)).decode(),
        "audio": base64.b64encode(speech()).decode(),
        "face_box": [width * 0.3, height * 0.2, width * 0.4, height * 0.4],
        "resolution": resolution,
        "preset": preset,
        "num_inference_steps": steps,
        "seed": 1,
        "output": {"delivery": "inline"},
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def await_server(server: subprocess.Popen[bytes], url: str) -> None:
    """Returns once it answers.

    Raises:
        SystemExit: it ended, or is too late.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx.get(url, timeout=1)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("handler.py does not serve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--directory", type=Path, help="of the model")
    model.add_argument("--demo", action="store_true")
    parser.add_argument("--resolutions", nargs="*", type=int, choices=SIZES, default=[256])
    parser.add_argument("--presets", nargs="*", default=["quality"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()

    chosen = {"AVATAR_MODEL": "demo", "RUNPOD_SKIP_GPU_CHECK": "true"}
    if given.directory:
        chosen = {"MODEL_DIR": str(given.directory)}
    port = free_port()
    command = [sys.executable, "handler.py", "--rp_serve_api", "--rp_api_port", str(port)]
    started = time.perf_counter()
    environment = os.environ | chosen  # noqa: TID251 (for the process alone)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as server:  # noqa: S603  # ours
        try:
            url = f"http://127.0.0.1:{port}"
            await_server(server, url)
            report(served_after_seconds=round(time.perf_counter() - started, 1))
            for _ in range(given.repeat):
                for resolution in given.resolutions:
                    for preset in given.presets:
                        send(url, resolution, preset, given.steps)
        finally:
            server.terminate()


def send(url: str, resolution: int, preset: str, steps: int) -> None:
    """Reports what one job took."""
    body = {"input": request(resolution, preset, steps)}
    begun = time.perf_counter()
    reply = httpx.post(f"{url}/runsync", json=body, timeout=JOB_SECONDS).json()
    seconds = round(time.perf_counter() - begun, 2)
    output = reply.get("output") or {}
    report(
        resolution=resolution,
        preset=preset,
        seconds=seconds,
        error=reply.get("error"),
        size=f"{output.get('width')}x{output.get('height')}x{output.get('num_frames')}",
        metrics=output.get("metrics"),
    )


if __name__ == "__main__":
    main()
