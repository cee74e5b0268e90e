"""What a long video takes: memory of GPU and host by its length, and what keeping states costs.

    python -m benchmarks.long_video --directory /tmp/model --seconds 15 30 60 --chunks 4
    python -m benchmarks.long_video --directory /tmp/model --states --no-mp4 --seconds 15 30 60
    python -m benchmarks.long_video --demo --seconds 60 300

Takes the model directory that `python -m benchmarks.loading` writes, or the demo model at a toy
size. Each length is measured in a process of its own: its speech is decoded as a job's, two steps
are taken, the second one cached, and the frames are decoded and written to an mp4. With `--no-mp4`
neither sound nor video touches a file, for a machine without PyAV.

With states, three computed steps of one window are taken with and without a state after each.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from avatar_client.contract.media_source import MediaSource
from avatar_client.contract.request import GenerationParams
from benchmarks.random_model import report, synchronize
from worker.generation.conditioning import Conditioning
from worker.generation.engine import Engine
from worker.generation.options import DenoiseOptions
from worker.generation.voices import Voice
from worker.generation.watch import Watch
from worker.media.state_store import DirectoryStore
from worker.service.resume import JobState, Resumption
from worker.settings import Settings
from worker.shapes import SAMPLE_RATE_HZ, FrameSize

if TYPE_CHECKING:
    from worker.media.inputs import Speech

GIB, MIB = 2**30, 2**20
T = TypeVar("T")

SAMPLE_SECONDS = 0.005  # between two looks at the process's memory
STATE_STEPS = 3


class Memory:
    """The peaks of this process's memory, stage by stage."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, float] = {}
        self._device = device
        self._process = psutil.Process()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what happens inside."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        highest, is_over = [0], threading.Event()

        def look() -> None:
            while not is_over.wait(SAMPLE_SECONDS):
                highest[0] = max(highest[0], self._process.memory_info().rss)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        started = time.perf_counter()
        yield
        synchronize(self._device)
        self.peaks[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
        is_over.set()
        thread.join()
        self.peaks[f"{name}_host_mib"] = round(highest[0] / MIB, 1)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peaks[f"{name}_gpu_gib"] = round(peak / GIB, 2)


def hum(seconds: float) -> NDArray[np.float32]:
    """A hum (samples,) that comes and goes each second."""
    times = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    second = np.sin(2 * np.pi * 120 * times) * np.sin(2 * np.pi * times) * 0.3
    return np.resize(second.astype(np.float32), round(seconds * SAMPLE_RATE_HZ))


def speech_of(directory: Path, seconds: float) -> "Speech":
    """As a job gets it."""
    from worker.media.inputs import load_speech  # imports PyAV

    path = directory / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes((hum(seconds) * 32767).astype("<i2").tobytes())
    settings = Settings(max_audio_seconds=seconds + 1)
    return load_speech(MediaSource(content=path.read_bytes()), directory, settings)


def encode(engine: Engine, waveform: np.ndarray, size: FrameSize) -> Conditioning:
    return engine.pipeline.encode(
        image=Image.new("RGB", (size.width, size.height), (200, 150, 120)),
        voices=[
            Voice(waveform, (size.width / 4, size.height / 4, size.width / 2, size.height / 2))
        ],
        prompt="A person is speaking.",
        height=size.height,
        width=size.width,
    )


def measure(
    engine: Engine, size: FrameSize, seconds: float, max_chunks: int | None, *, has_mp4: bool
) -> None:
    """Reports the memory of a video of so many seconds."""
    memory = Memory(engine.device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with memory.stage("speech"):
            speech = speech_of(directory, seconds) if has_mp4 else None
            waveform = hum(seconds) if speech is None else speech.waveform
        with memory.stage("encode"):
            conditioning = encode(engine, waveform, size)
        with memory.stage("denoise"):
            latents = engine.pipeline.denoise(
                conditioning,
                DenoiseOptions(num_inference_steps=2, computed_steps=[0]),
                generator=torch.Generator(engine.device).manual_seed(1),
            )
        num_frames = 0

        def frames() -> Iterator[NDArray[np.uint8]]:
            nonlocal num_frames
            for chunk in islice(engine.decode_frames(conditioning, latents), max_chunks):
                num_frames += len(chunk)
                yield chunk

        path = directory / "video.mp4"
        with memory.stage("decode"):
            if speech is None:
                for _ in frames():
                    pass
            else:
                write(path, frames(), size, speech)
        report(
            seconds=seconds,
            size=f"{size.height}x{size.width}",
            windows=conditioning.plan.num_windows,
            latents_mib=round(latents.nbytes / MIB, 1),
            frames=num_frames,
            video_bytes=path.stat().st_size if path.exists() else None,
            **memory.peaks,
        )


def write(
    path: Path, frames: Iterator[NDArray[np.uint8]], size: FrameSize, speech: "Speech"
) -> None:
    """Writes the mp4."""
    from worker.media.video import write_video  # imports PyAV

    write_video(
        path,
        frames,
        fps=25,
        height=size.height,
        width=size.width,
        recording=speech.recording,
        metadata={},
    )


class MeasuredStore(DirectoryStore):
    """Knows how large the last state was, and how long each took."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.num_bytes = 0
        self.seconds: list[float] = []

    def put(self, name: str, write: Callable[[Path], object], num_bytes: int) -> None:
        started = time.perf_counter()

        def written(path: Path) -> None:
            write(path)
            self.num_bytes = path.stat().st_size

        super().put(name, written, num_bytes)
        self.seconds.append(round(time.perf_counter() - started, 3))


def measure_states(engine: Engine, size: FrameSize, directory: Path) -> None:
    """Reports the seconds of a step with and without a state after each."""
    speech = np.zeros(SAMPLE_RATE_HZ, np.float32)
    conditioning = encode(engine, speech, size)
    params = GenerationParams(num_inference_steps=STATE_STEPS)
    store = MeasuredStore(directory)
    times: dict[str, list[float]] = {}
    for kind in ("warm", "without", "with"):
        resumption = Resumption(store, b"key", 1e-6) if kind == "with" else None
        state = JobState(resumption, STATE_STEPS)
        if resumption is not None:
            state.restore("0", engine.identity(params), _at_once, lambda: None)
        state.seed = 1
        ended = [time.perf_counter()]

        def on_step(step: int, num_steps: int, ended: list[float] = ended) -> None:
            synchronize(engine.device)
            ended.append(time.perf_counter())

        with state:
            state.begin_denoising()
            engine.denoise(conditioning, params, 1, Watch(on_step=on_step, on_state=state.offer))
        times[kind] = np.diff(ended).round(3).tolist()
    report(
        size=f"{size.height}x{size.width}",
        step_seconds_without=times["without"],
        step_seconds_with=times["with"],
        state_bytes=store.num_bytes,
        write_seconds=store.seconds,
    )


def _at_once(call: Callable[[], T], limit_seconds: float) -> T:
    return call()


def _size(text: str) -> FrameSize:
    return FrameSize(*map(int, text.split("x")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--directory", type=Path, help="of the model")
    model.add_argument("--demo", action="store_true", help="the demo model, at a toy size")
    parser.add_argument("--seconds", nargs="*", type=float, default=[])
    parser.add_argument("--size", type=_size, help="704x768, or 32x32 with --demo")
    parser.add_argument("--chunks", type=int, help="of 48 frames, to decode no more than these")
    parser.add_argument("--no-mp4", action="store_true", help="decodes the frames and no more")
    parser.add_argument("--states", action="store_true", help="what keeping states costs")
    parser.add_argument("--state-directory", type=Path, help="for them; a network volume, say")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures one length here, or each in a process of its own."""
    arguments = _arguments()
    if arguments.one is None:
        for seconds in arguments.seconds:
            command = [sys.executable, "-m", "benchmarks.long_video", *sys.argv[1:]]
            subprocess.run([*command, "--one", str(seconds)], check=True)  # noqa: S603  # ourselves
        if not arguments.states:
            return
    engine = Engine.load(
        Settings(avatar_model="demo")
        if arguments.demo
        else Settings(model_dir=str(arguments.directory))
    )
    size = arguments.size or FrameSize(*((32, 32) if arguments.demo else (704, 768)))
    if arguments.one is not None:
        has_mp4 = not arguments.no_mp4
        measure(engine, size, arguments.one, arguments.chunks, has_mp4=has_mp4)
        return
    with tempfile.TemporaryDirectory() as name:
        measure_states(engine, size, arguments.state_directory or Path(name))


if __name__ == "__main__":
    main()
