"""Hours of jobs of all kinds while workers are killed and the world fails: what is lost?

    python -m benchmarks.soak --seconds 3600                    # the demo model, 2 workers
    python -m benchmarks.soak --seconds 60 --worker drawing     # a worker whose model draws at once

Workers run on the local endpoint. Jobs are good, bad, cancelled, handed out twice, and sent by
clients that vanish; workers are killed, posted results get lost, and the store fails now and then.
A table says what became of all: status 1 if anything was lost, answered twice in different ways,
or left behind.
"""

import argparse
import base64
import http.client
import io
import json
import random
import secrets
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.faulty_proxy import CUTS, Fault, FaultyProxy, Period
from local_endpoint import JobRecord, LocalEndpoint, WorkerProcess, job_queue
from worker.media.storage import Storage

ROOT = Path(__file__).parents[1]
SCRIPTS = {"demo": ROOT / "handler.py", "drawing": ROOT / "benchmarks" / "drawing_worker.py"}
KILL_SECONDS = {"demo": (60.0, 180.0), "drawing": (4.0, 12.0)}  # after a worker's start
CANCEL_SECONDS = {"demo": 10.0, "drawing": 2.0}  # at most, after a job was sent
NUM_WAITING = 4  # jobs in the queue beside those at work
MOST_WAITING = 8  # with those of clients that vanish, who else outrun the workers of a busy machine
LOST_AFTER_SECONDS = 6.0
START_SECONDS = 300.0
END_SECONDS = 900.0  # for the jobs that are left when the time is over
LOOK_SECONDS = 0.05
FAULT_SHARE = 0.1  # of the store's requests, in a bad time
BAD_SECONDS, GOOD_SECONDS = 5.0, 10.0
LOST_SHARE = 0.2  # of posted results, about
LOST_POST_STATUSES = (None, 413, 502)  # None: the connection is cut
TORCH_CACHE = "torchinductor_"  # a folder that torch makes where it is imported, one a user
# Of clients that vanished, and of a worker that was killed before its result was taken.
KEPT_OBJECTS = (".mp4", ".jpg", ".mp4.json")
STORE_FAULTS = {
    "/": (*CUTS, *(Fault(str(status), answer=(status, b"<Error/>")) for status in (500, 503)))
}


class Kind(NamedTuple):
    """Jobs of one sort: how often they come, what they ask for, and how they may end.

    Attributes:
        fates: `COMPLETED`, `CANCELLED`, or the code of a failure.
        is_seeded: so that whoever makes it makes the same.
    """

    name: str
    share: int
    changes: Mapping[str, Any]
    fates: tuple[str, ...] = ("COMPLETED",)
    is_seeded: bool = True
    is_cancelled: bool = False
    is_redelivered: bool = False


NO_MEDIA = base64.b64encode(b"neither a picture nor sound").decode()
KINDS = (
    Kind("to the bucket", 25, {}),
    Kind("without a seed", 10, {}, is_seeded=False),
    Kind("in the reply", 15, {"output": {"delivery": "inline"}}),
    Kind("handed out again", 10, {}, is_redelivered=True),
    Kind("with an id of its own", 10, {"request_id": ""}),
    Kind("dry run", 5, {"dry_run": True}),
    Kind("cancelled", 15, {}, ("CANCELLED", "COMPLETED"), is_cancelled=True),
    Kind("unknown field", 5, {"nonsense": 1}, ("INVALID_INPUT",)),
    Kind("private address", 3, {"image": "https://10.0.0.1/a.png"}, ("INPUT_URL_BLOCKED",)),
    Kind("no picture", 4, {"image": NO_MEDIA}, ("UNSUPPORTED_MEDIA",)),
    Kind("no sound", 4, {"audio": NO_MEDIA}, ("UNSUPPORTED_MEDIA",)),
    Kind("face outside", 4, {"face_box": [900, 900, 50, 50]}, ("INVALID_INPUT",)),
)
TO_BE_RETRIED = ("UPLOAD_FAILED", "WORKER_FAILED")  # a fault of the store or a machine, said so


@dataclass(slots=True)
class Sent:
    """A job that was sent, and is followed."""

    id: str
    kind: Kind
    cancel_at: float | None = None
    answers: list[str] = field(default_factory=list)  # sha256 of each video that was told


@dataclass(slots=True)
class Tally:
    """What became of the jobs."""

    sent: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # ends that should not be
    lost: int = 0
    vanished: int = 0  # sent by clients that did not stay
    differently: int = 0  # answered twice, in different ways
    kills: int = 0
    lost_posts: int = 0
    store_faults: int = 0  # requests of the store that failed
    left_files: list[str] = field(default_factory=list)
    left_objects: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)  # of the worker that is never killed
    open_files: list[int] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether all is as it should be."""
        return not (
            self.wrong or self.lost or self.differently or self.left_files or self.left_objects
        )


def portrait() -> str:
    image = Image.new("RGB", (320, 320), (120, 150, 180))
    draw = ImageDraw.Draw(image)
    draw.ellipse((90, 60, 230, 240), fill=(224, 180, 150))
    for x in (125, 185):
        draw.ellipse((x, 120, x + 15, 130), fill=(40, 30, 20))
    draw.ellipse((140, 185, 180, 195), fill=(170, 70, 70))
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def speech(seconds: float = 0.2) -> str:
    samples = np.sin(np.arange(round(seconds * 16_000)) / 20) * 9000
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return base64.b64encode(content.getvalue()).decode()


class Soak:
    """A run of so many seconds.

    Args:
        seconds: for which jobs are sent; those that are left are waited for.
        worker: of SCRIPTS.
        num_workers: the last one is killed now and then.
        seed: of what is drawn.
    """

    def __init__(self, seconds: float, worker: str, num_workers: int, seed: int) -> None:
        self.tally = Tally()
        self._seconds = seconds
        self._script = SCRIPTS[worker]
        self._kill_seconds = KILL_SECONDS[worker]
        self._cancel_seconds = CANCEL_SECONDS[worker]
        self._num_workers = num_workers
        self._dice = random.Random(seed)  # noqa: S311  # repeatable
        self._base = {
            "image": portrait(),
            "audio": speech(),
            "resolution": 256,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
        }
        self._open: list[Sent] = []
        self._started = 0

    def run(self) -> None:
        """Sends jobs, disturbs, and waits for the last one."""
        job_queue.MAX_CLAIMS = 1000  # how often a job is handed out is the platform's matter
        with ExitStack() as ending:
            self._directory = Path(ending.enter_context(tempfile.TemporaryDirectory()))
            self._endpoint = ending.enter_context(
                LocalEndpoint(
                    with_object_store=True, hold_seconds=1.0, lost_after_seconds=LOST_AFTER_SECONDS
                )
            )
            own_store = self._endpoint.object_store
            self._storage = Storage(own_store.bucket)
            store = ending.enter_context(
                FaultyProxy(own_store.endpoint_url, STORE_FAULTS, self._dice.randrange(2**31))
            )
            self._environment = {
                "AVATAR_MODEL": "demo",
                "PYTHONPATH": str(ROOT),
                "RESUME_INTERVAL_SECONDS": "0.5",
                **own_store.environment,
                "BUCKET_ENDPOINT_URL": store.origin,
            }
            self._ending = ending
            self._workers = [self._start(index) for index in range(self._num_workers)]
            for worker in self._workers:
                worker.wait_until_polling(START_SECONDS)
            store.begin(list(self._periods()))
            self._disturb_and_send()
            store.begin(())
            self.tally.store_faults = sum(store.faults_met.values())
            self._finish()
            self._end_workers()

    def _periods(self) -> Iterator[Period]:
        for _ in range(int(self._seconds / (BAD_SECONDS + GOOD_SECONDS)) + 1):
            yield Period(GOOD_SECONDS, 0.0)
            yield Period(BAD_SECONDS, FAULT_SHARE)

    def _start(self, index: int) -> WorkerProcess:
        """A worker in the temporary directory of those that had this index before."""
        self._started += 1
        temporary = self._directory / f"tmp-{index}"
        temporary.mkdir(exist_ok=True)
        worker = WorkerProcess(
            self._endpoint,
            self._directory / f"worker-{self._started}",
            script=self._script,
            environment={**self._environment, "TMPDIR": str(temporary)},
        )
        worker.temporary_directory = temporary
        return self._ending.enter_context(worker)

    def _disturb_and_send(self) -> None:
        begun = time.monotonic()
        kill_at: float | None = None  # None: the next victim is still starting
        vanish_at = measure_at = begun
        while (now := time.monotonic()) - begun < self._seconds:
            while len(self._open) < self._num_workers + NUM_WAITING:
                self._send()
            if kill_at is None:
                if self._endpoint.wait_for_worker(self._workers[-1].worker_id, 0.0):
                    kill_at = now + self._dice.uniform(*self._kill_seconds)
            elif now >= kill_at:
                self._kill()
                kill_at = None
            if now >= vanish_at:
                self._vanish()
                vanish_at = now + self._dice.uniform(4.0, 12.0)
            if now >= measure_at and sum(self.tally.fates.values()) > 2 * self._num_workers:
                self._measure()
                measure_at = now + self._seconds / 10
            self._look()
            time.sleep(LOOK_SECONDS)

    def _send(self) -> None:
        [kind] = self._dice.choices(KINDS, [each.share for each in KINDS])
        job_input = {**self._base, **kind.changes}
        if kind.is_seeded and "nonsense" not in job_input:
            job_input["seed"] = self._dice.randrange(2**31)
        if "request_id" in job_input:
            job_input["request_id"] = f"soak-{sum(self.tally.sent.values())}"
        if self._dice.random() < LOST_SHARE:
            self._endpoint.lose_results(status=self._dice.choice(LOST_POST_STATUSES))
            self.tally.lost_posts += 1
        job = Sent(self._endpoint.submit({"input": job_input}), kind)
        if kind.is_cancelled:
            job.cancel_at = time.monotonic() + self._dice.uniform(0.0, self._cancel_seconds)
        self._open.append(job)
        self.tally.sent[kind.name] += 1

    def _vanish(self) -> None:
        """A client that sends a job, waits for it, and is gone."""
        if self._waiting()["inQueue"] >= MOST_WAITING:
            return
        url = urlsplit(self._endpoint.url)
        body = json.dumps({"input": {**self._base, "seed": 1}})
        headers = {
            "Authorization": f"Bearer {self._endpoint.api_key}",
            "Content-Type": "application/json",
        }
        connection = http.client.HTTPConnection(url.netloc)
        connection.request("POST", f"{url.path}/runsync", body, headers)
        time.sleep(0.1)
        connection.close()
        self.tally.vanished += 1

    def _kill(self) -> None:
        """The last worker, as where a machine is taken away; another one takes its place."""
        self._workers[-1].kill()
        self._workers[-1] = self._start(self._num_workers - 1)
        self.tally.kills += 1

    def _measure(self) -> None:
        self.tally.rss_mib.append(round(self._workers[0].rss_bytes() / 2**20, 1))
        self.tally.open_files.append(self._workers[0].open_files())

    def _look(self) -> None:
        for job in list(self._open):
            if job.cancel_at is not None and time.monotonic() >= job.cancel_at:
                job.cancel_at = None
                self._endpoint.cancel(job.id)
            record = self._endpoint.state(job.id)
            if record.is_over:
                self._take(job, record)

    def _take(self, job: Sent, record: JobRecord) -> None:
        """Notes how a job ended; one that is to be handed out again is."""
        fate = record.status
        if record.status == "FAILED":
            fate = (record.error or "").partition(":")[0]  # type: ignore[assignment]
        if fate not in (*job.kind.fates, *TO_BE_RETRIED):
            self.tally.wrong.append(f"{job.kind.name}: {record.error or record.status}")
        job.answers += [
            post.body["output"]["sha256"]
            for post in record.results
            if isinstance(post.body.get("output"), dict) and "sha256" in post.body["output"]
        ]
        if job.kind.is_seeded and len(set(job.answers)) > 1:
            self.tally.differently += 1
        if job.kind.is_redelivered and fate == "COMPLETED" and len(job.answers) < 2:
            self._endpoint.requeue(job.id)
            return
        self.tally.fates[fate] += 1
        self._open.remove(job)
        if fate == "COMPLETED" and isinstance(key := record.output.get("key"), str):
            self._storage.delete(key)  # the store keeps all in memory

    def _finish(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._open and time.monotonic() < deadline:
            self._look()
            time.sleep(LOOK_SECONDS)
        self.tally.lost += len(self._open)
        while any(self._waiting().values()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        self.tally.lost += sum(self._waiting().values())
        self._measure()

    def _waiting(self) -> dict[str, int]:
        """Jobs that are not over, those of vanished clients among them."""
        url = urlsplit(self._endpoint.url)
        connection = http.client.HTTPConnection(url.netloc)
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"}
        connection.request("GET", f"{url.path}/health", headers=headers)
        jobs = json.loads(connection.getresponse().read())["jobs"]
        connection.close()
        return {name: jobs[name] for name in ("inQueue", "inProgress")}

    def _end_workers(self) -> None:
        for worker in self._workers:
            with suppress(RuntimeError):
                worker.wait_until_polling(START_SECONDS)
            worker.terminate()
        for index, worker in enumerate(self._workers):
            worker.wait(START_SECONDS)
            self.tally.left_files += [
                f"worker {index}: {path.name}"
                for path in worker.temporary_directory.iterdir()
                if not path.name.startswith(TORCH_CACHE)
            ]
        keys = self._storage.ages("")
        self.tally.left_objects = [key for key in keys if not key.endswith(KEPT_OBJECTS)]


def table(tally: Tally) -> str:
    """What became of all, in Markdown."""
    failed = {name: n for name, n in tally.fates.items() if name not in ("COMPLETED", "CANCELLED")}
    rows: list[tuple[str, object]] = [
        ("jobs sent", sum(tally.sent.values())),
        ("done", tally.fates["COMPLETED"]),
        ("cancelled", tally.fates["CANCELLED"]),
        ("failed as they should", sum(failed.values()) - len(tally.wrong)),
        ("ended as they should not", len(tally.wrong)),
        ("lost", tally.lost),
        ("answered twice in different ways", tally.differently),
        ("clients that vanished", tally.vanished),
        ("workers killed", tally.kills),
        ("posted results that got lost", tally.lost_posts),
        ("requests of the store that failed", tally.store_faults),
        ("memory of a worker, first to last, MiB", _first_to_last(tally.rss_mib)),
        ("open files of a worker, first to last", _first_to_last(tally.open_files)),
        ("temporary files left", len(tally.left_files)),
        ("states and claims left in the bucket", len(tally.left_objects)),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    details = [*tally.wrong, *tally.left_files, *tally.left_objects]
    return "\n".join(["| | |", "| --- | --- |", *lines, *details])


def _first_to_last(values: list[Any]) -> str:
    return f"{values[0]} to {values[-1]}, at most {max(values)}" if values else "not measured"


def main() -> int:
    """Runs it; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--worker", choices=SCRIPTS, default="demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()
    soak = Soak(arguments.seconds, arguments.worker, arguments.workers, arguments.seed)
    soak.run()
    sys.stdout.write(f"seed {arguments.seed}\n{table(soak.tally)}\n")
    return 0 if soak.tally.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
