"""The jobs of one endpoint and what becomes of them, in a SQLite file that outlives the process.

Every change of a job's state is one method here, and one transaction. Nothing here waits, knows
HTTP or starts a process. One thread uses a queue: the server's event loop. Times are Unix seconds.

    IN_QUEUE -> IN_PROGRESS -> COMPLETED | FAILED | TIMED_OUT
        ^            |   `--> CANCELLED
        `------------'  its worker is gone, or has lost it
"""

import json
import sqlite3
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from local_endpoint import private_files

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
FINAL: tuple[Status, ...] = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

# The platform's own figures.
KEPT_SECONDS = {"run": 30 * 60.0, "runsync": 60.0}  # how long a result can be fetched
EXECUTION_TIMEOUT_SECONDS = 600.0
TTL_SECONDS = 24 * 3600.0
WEBHOOK_ATTEMPTS = 3

MAX_CLAIMS = 3  # a job that three workers in a row did not bring back is given up
STOP_AGAIN_SECONDS = 2.0  # a worker that still names an ended job after this has missed its stop

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    position INTEGER PRIMARY KEY,  -- the order of arrival; kept when a job goes back to the queue
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    worker_id TEXT,
    num_claims INTEGER NOT NULL DEFAULT 0,
    stop_pod INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    post INTEGER,  -- the newest progress, then the result
    created_at REAL NOT NULL,
    claimed_at REAL,
    ended_at REAL,
    deadline_at REAL,
    delete_at REAL NOT NULL,
    stream_read INTEGER NOT NULL DEFAULT 0,
    webhook TEXT,
    request TEXT NOT NULL  -- last: it may be large, and is seldom read
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, position);
CREATE TABLE IF NOT EXISTS posts (
    number INTEGER PRIMARY KEY,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    at REAL NOT NULL,
    accepted INTEGER NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS posts_by_job ON posts (job);
CREATE TABLE IF NOT EXISTS stream (
    number INTEGER PRIMARY KEY,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    item TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS stream_by_job ON stream (job);
CREATE TABLE IF NOT EXISTS webhooks (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    url TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Post:
    """One body that a worker sent for a job."""

    at_seconds: float
    body: dict[str, Any]
    accepted: bool  # False: answered with an error, or came when the job was not the worker's

    @property
    def is_progress(self) -> bool:
        return self.body.get("status") == "IN_PROGRESS"


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it is now. `output` is the newest progress while it is in progress."""

    id: str
    status: Status
    worker_id: str | None
    output: Any
    error: str | None
    stop_pod: bool  # the worker asked to be replaced
    num_claims: int  # how often it was handed to a worker
    created_at_seconds: float
    claimed_at_seconds: float | None  # the last time
    ended_at_seconds: float | None

    @property
    def is_over(self) -> bool:
        return self.status in FINAL

    def state(self) -> dict[str, Any]:
        """What the platform tells a client of it; times in milliseconds."""
        state: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.claimed_at_seconds is not None:
            state["delayTime"] = _milliseconds(self.claimed_at_seconds - self.created_at_seconds)
            state["workerId"] = self.worker_id
            if self.ended_at_seconds is not None:
                run_seconds = self.ended_at_seconds - self.claimed_at_seconds
                state["executionTime"] = _milliseconds(run_seconds)
        if self.error is not None:
            state["error"] = self.error
        if self.output is not None:
            state["output"] = self.output
        return state


@dataclass(frozen=True, slots=True)
class JobRecord(Job):
    """A job with all that happened to it."""

    posts: tuple[Post, ...]  # oldest first
    stream: tuple[Any, ...]  # what a generating handler has yielded

    @property
    def progress(self) -> list[Any]:
        """The accepted progress payloads, oldest first."""
        return [post.body["output"] for post in self.posts if post.is_progress and post.accepted]

    @property
    def results(self) -> list[Post]:
        """Every result that was posted, accepted or not."""
        return [post for post in self.posts if not post.is_progress]


@dataclass(frozen=True, slots=True)
class Webhook:
    """A call that is due: the address, and the body with the job's state and its request."""

    job_id: str
    url: str
    body: dict[str, Any]


class JobQueue:
    """The queue in the file at `path`, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        private_files.make_file(path)  # SQLite gives its other files the same rights
        # autocommit: `with self._database` below opens and ends each transaction by name
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        # a killed process loses nothing; a machine that loses power may lose the last moments
        self._database.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;"
            "PRAGMA secure_delete = ON;" + SCHEMA
        )
        self._stops: defaultdict[str, set[str]] = defaultdict(set)  # job ids by worker
        self._has_forgotten = False  # something that is still in SQLite's log

    def close(self) -> None:
        self._database.close()

    # What clients do

    def add(
        self, request: dict[str, Any], *, job_id: str | None = None, is_sync: bool = False
    ) -> str:
        """The id of a new job, which waits for a worker.

        `request` is what the worker is handed: `input` and, if given, `policy`, `webhook` and more.
        """
        job_id = job_id or f"{'sync-' if is_sync else ''}{uuid.uuid4()}-e1"
        now = time.time()
        ttl = _policy_seconds(request, "ttl", TTL_SECONDS)
        with self._transaction():
            # an id of the caller's own may have been used before: then it is a new job
            self._execute("DELETE FROM jobs WHERE id = ?", job_id)
            self._execute(
                "INSERT INTO jobs (id, status, created_at, delete_at, webhook, request)"
                " VALUES (?, 'IN_QUEUE', ?, ?, ?, ?)",
                *(job_id, now, now + ttl, request.get("webhook"), json.dumps(request)),
            )
        return job_id

    def get(self, job_id: str) -> Job | None:
        """The job; None if there is none, or no longer."""
        row = self._one(
            "SELECT jobs.*, posts.body FROM jobs LEFT JOIN posts ON number = post WHERE id = ?",
            job_id,
        )
        if row is None:
            return None
        return Job(
            id=row["id"],
            status=row["status"],
            worker_id=row["worker_id"],
            output=json.loads(row["body"]).get("output") if row["body"] else None,
            error=row["error"],
            stop_pod=bool(row["stop_pod"]),
            num_claims=row["num_claims"],
            created_at_seconds=row["created_at"],
            claimed_at_seconds=row["claimed_at"],
            ended_at_seconds=row["ended_at"],
        )

    def cancel(self, job_id: str) -> None:
        """Ends a job that waits or runs; the worker of a running one will be told to stop."""
        with self._transaction():
            self._end(job_id, "CANCELLED")

    def retry(self, job_id: str) -> bool:
        """Puts a failed or timed out job back into the queue; False if it is neither."""
        with self._transaction():
            changed = self._execute(
                "UPDATE jobs SET status = 'IN_QUEUE', error = NULL, post = NULL, num_claims = 0,"
                " worker_id = NULL, claimed_at = NULL, ended_at = NULL, stop_pod = 0,"
                " delete_at = MAX(delete_at, ?)"
                " WHERE id = ? AND status IN ('FAILED', 'TIMED_OUT')",
                *(time.time() + TTL_SECONDS, job_id),
            )
            if changed:
                self._execute("DELETE FROM webhooks WHERE job = ?", job_id)
                self._count("retried")
        return bool(changed)

    def purge(self) -> int:
        """How many waiting jobs were removed: all."""
        self._has_forgotten = True
        with self._transaction():
            return self._execute("DELETE FROM jobs WHERE status = 'IN_QUEUE'")

    def has_unread(self, job_id: str) -> bool:
        """Whether a generating handler has yielded something since `read_stream`."""
        return bool(
            self._all(
                "SELECT 1 FROM stream WHERE job = ?1"
                " AND number > (SELECT stream_read FROM jobs WHERE id = ?1) LIMIT 1",
                job_id,
            )
        )

    def read_stream(self, job_id: str, max_bytes: int) -> list[Any]:
        """What a generating handler has yielded since the last call, up to `max_bytes` of JSON."""
        rows = self._all(
            "SELECT number, item FROM stream WHERE job = ?1"
            " AND number > (SELECT stream_read FROM jobs WHERE id = ?1) ORDER BY number",
            job_id,
        )
        items: list[Any] = []
        size = 0
        for row in rows:
            size += len(row["item"])
            if items and size > max_bytes:
                break
            items.append(json.loads(row["item"]))
            self._execute("UPDATE jobs SET stream_read = ? WHERE id = ?", row["number"], job_id)
        return items

    def counts(self) -> dict[str, int]:
        """Jobs by what became of them, under the platform's names; ended ones since the start."""
        waiting = {row["status"]: row["n"] for row in self._all(
            "SELECT status, COUNT(*) AS n FROM jobs WHERE status LIKE 'IN_%' GROUP BY status"
        )}  # fmt: skip
        ended = {row["name"]: row["value"] for row in self._all("SELECT * FROM counters")}
        return {
            "completed": ended.get("COMPLETED", 0),
            "failed": ended.get("FAILED", 0) + ended.get("TIMED_OUT", 0),
            "inProgress": waiting.get("IN_PROGRESS", 0),
            "inQueue": waiting.get("IN_QUEUE", 0),
            "retried": ended.get("retried", 0),
        }

    # What workers do

    def claim(self, worker_id: str) -> dict[str, Any] | None:
        """The oldest waiting job, which is now this worker's: what the worker is handed."""
        row = self._one(
            "SELECT id, request FROM jobs WHERE status = 'IN_QUEUE' ORDER BY position LIMIT 1"
        )
        if row is None:
            return None
        request: dict[str, Any] = json.loads(row["request"])
        now = time.time()
        timeout = _policy_seconds(request, "executionTimeout", EXECUTION_TIMEOUT_SECONDS)
        with self._transaction():
            self._execute(
                "UPDATE jobs SET status = 'IN_PROGRESS', num_claims = num_claims + 1,"
                " worker_id = ?, claimed_at = ?, deadline_at = ?, ended_at = NULL, post = NULL"
                " WHERE id = ?",
                *(worker_id, now, now + timeout, row["id"]),
            )
        self._stops[worker_id].discard(row["id"])  # of an earlier run of the same job
        return {"id": row["id"], **request}

    def pop_stops(self, worker_id: str) -> list[str]:
        """The jobs that this worker is to stop, once."""
        return sorted(self._stops.pop(worker_id, ()))

    def post(self, job_id: str, worker_id: str, body: dict[str, Any], *, lost: bool) -> None:
        """Records what a worker sent; it counts while the job is that worker's.

        Args:
            job_id: an existing job.
            worker_id: who sent it.
            body: progress or a result.
            lost: the worker is answered with an error, as if this had never arrived.
        """
        post = Post(time.time(), body, accepted=not lost and self._is_held(job_id, worker_id))
        with self._transaction():
            number = self._record(job_id, post)
            if not post.accepted:
                return
            self._execute("UPDATE jobs SET post = ? WHERE id = ?", number, job_id)
            if post.is_progress:
                return
            self._execute(
                "UPDATE jobs SET stop_pod = ? WHERE id = ?", bool(body.get("stopPod")), job_id
            )
            error = body.get("error")
            self._end(job_id, "FAILED" if error else "COMPLETED", error and _text(error))

    def refuse(self, job_id: str, worker_id: str, reason: str) -> None:
        """Fails a job whose result cannot be kept."""
        if self._is_held(job_id, worker_id):
            with self._transaction():
                self._end(job_id, "FAILED", reason)

    def add_stream_item(self, job_id: str, worker_id: str, item: Any) -> None:
        """Keeps what a generating handler has yielded, if the job is still the worker's."""
        if self._is_held(job_id, worker_id):
            self._execute("INSERT INTO stream (job, item) VALUES (?, ?)", job_id, json.dumps(item))

    def record_heartbeat(self, worker_id: str, job_ids: Iterable[str]) -> None:
        """Tells a worker to stop what it says it works on, if that is no longer its job.

        A stop that comes before the worker has begun the job is dropped by the SDK, and one that
        was due when this process was killed is forgotten: this makes up for both.
        """
        for job_id in job_ids:
            job = self.get(job_id)
            if job is None:
                self._stops[worker_id].add(job_id)
            elif not self._is_held(job_id, worker_id):
                ended_at = job.ended_at_seconds or job.claimed_at_seconds or 0.0
                if time.time() > ended_at + STOP_AGAIN_SECONDS:
                    self._stops[worker_id].add(job_id)

    # What time and accidents do

    def held_by(self, worker_id: str) -> list[str]:
        """The jobs that this worker works on."""
        query = "SELECT id FROM jobs WHERE worker_id = ? AND status = 'IN_PROGRESS'"
        return [row["id"] for row in self._all(query, worker_id)]

    def forget(self, worker_id: str) -> None:
        """Drops what a worker that is gone was to be told."""
        self._stops.pop(worker_id, None)

    def holders(self) -> set[str]:
        """The workers that work on a job."""
        query = "SELECT DISTINCT worker_id FROM jobs WHERE status = 'IN_PROGRESS'"
        return {row["worker_id"] for row in self._all(query)}

    def requeue(self, job_id: str, *, stop: bool) -> None:
        """Puts a job that has been lost back into its place in the queue, or gives it up.

        `stop`: should its worker be heard of again, it is told to stop the job.
        """
        job = self.get(job_id)
        assert job is not None
        with self._transaction():
            if stop and job.worker_id is not None:
                self._stops[job.worker_id].add(job_id)
            if job.num_claims >= MAX_CLAIMS:
                self._end(job_id, "FAILED", f"lost by {job.num_claims} workers in a row")
                return
            self._execute(
                "UPDATE jobs SET status = 'IN_QUEUE', worker_id = NULL, post = NULL, error = NULL,"
                " ended_at = NULL, deadline_at = NULL WHERE id = ?",
                job_id,
            )

    def sweep(self) -> bool:
        """Ends what is over its time and deletes what nobody may fetch any more; True if any."""
        now = time.time()
        late = self._all(
            "SELECT id FROM jobs WHERE status = 'IN_PROGRESS' AND deadline_at < ?", now
        )
        old = self._all("SELECT id, worker_id, status FROM jobs WHERE delete_at < ?", now)
        with self._transaction():
            for row in late:
                self._end(row["id"], "TIMED_OUT", "the job was over its execution timeout")
            for row in old:
                if row["status"] == "IN_PROGRESS":
                    self._stops[row["worker_id"]].add(row["id"])
                self._execute("DELETE FROM jobs WHERE id = ?", row["id"])
        if self._has_forgotten or old:  # the log that SQLite writes first keeps earlier content
            self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._has_forgotten = False
        return bool(late or old)

    # Webhooks

    def claim_webhooks(self, max_calls: int, under_way: Collection[str]) -> list[Webhook]:
        """Calls to make now, so many that `max_calls` are under way then; each is an attempt.

        One counts from its beginning, so that it is not made for ever where it ends this process.
        """
        due = self._all(
            "SELECT job, url FROM webhooks WHERE due_at <= ? AND attempts < ?"
            " ORDER BY due_at LIMIT ?",
            *(time.time(), WEBHOOK_ATTEMPTS, max_calls),
        )
        room = max_calls - len(under_way)
        chosen = [row for row in due if row["job"] not in under_way][:room]
        for row in chosen:
            self._execute("UPDATE webhooks SET attempts = attempts + 1 WHERE job = ?", row["job"])
        return [Webhook(row["job"], row["url"], self._webhook_body(row["job"])) for row in chosen]

    def webhook_answered(self, job_id: str, *, taken: bool, retry_seconds: float) -> None:
        """Forgets a call that was taken, and one that never will be; puts off the others."""
        with self._transaction():
            self._execute(
                "UPDATE webhooks SET due_at = ? WHERE job = ?",
                *(time.time() + retry_seconds, job_id),
            )
            self._execute(
                "DELETE FROM webhooks WHERE job = ? AND (? OR attempts >= ?)",
                *(job_id, taken, WEBHOOK_ATTEMPTS),
            )

    # What a person or a test looks at

    def record(self, job_id: str) -> JobRecord | None:
        """The job with all that happened to it; None if there is none, or no longer."""
        job = self.get(job_id)
        if job is None:
            return None
        posts = self._all("SELECT * FROM posts WHERE job = ? ORDER BY number", job_id)
        stream = self._all("SELECT item FROM stream WHERE job = ? ORDER BY number", job_id)
        return JobRecord(
            **{field.name: getattr(job, field.name) for field in fields(job)},
            posts=tuple(
                Post(row["at"], json.loads(row["body"]), bool(row["accepted"])) for row in posts
            ),
            stream=tuple(json.loads(row["item"]) for row in stream),
        )

    # One step of a transaction

    def _end(self, job_id: str, status: Status, error: str | None = None) -> None:
        """Ends a job that is not over yet; its webhook is due now."""
        row = self._one("SELECT status, worker_id FROM jobs WHERE id = ?", job_id)
        if row is None or row["status"] in FINAL:
            return
        if row["status"] == "IN_PROGRESS" and status in ("CANCELLED", "TIMED_OUT"):
            self._stops[row["worker_id"]].add(job_id)
        now = time.time()
        kept = KEPT_SECONDS["runsync" if job_id.startswith("sync-") else "run"]
        self._execute(
            "UPDATE jobs SET status = ?, error = ?, ended_at = ?, delete_at = MIN(delete_at, ?)"
            " WHERE id = ?",
            *(status, error, now, now + kept, job_id),
        )
        self._execute(
            "INSERT OR REPLACE INTO webhooks (job, url, due_at)"
            " SELECT id, webhook, ? FROM jobs WHERE id = ? AND webhook IS NOT NULL",
            *(now, job_id),
        )
        if status in ("COMPLETED", "CANCELLED"):  # the others may be tried again
            self._forget_secrets(job_id)
        self._count(status)

    def _forget_secrets(self, job_id: str) -> None:
        row = self._one("SELECT request FROM jobs WHERE id = ?", job_id)
        assert row is not None
        request = json.loads(row["request"])
        if (kept := _without_secrets(request)) != request:
            self._execute("UPDATE jobs SET request = ? WHERE id = ?", json.dumps(kept), job_id)
            self._has_forgotten = True

    def _record(self, job_id: str, post: Post) -> int:
        cursor = self._database.execute(
            "INSERT INTO posts (job, at, accepted, body) VALUES (?, ?, ?, ?)",
            (job_id, post.at_seconds, post.accepted, json.dumps(post.body)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _count(self, name: str) -> None:
        self._execute(
            "INSERT INTO counters VALUES (?, 1) ON CONFLICT DO UPDATE SET value = value + 1", name
        )

    # Reading

    def _is_held(self, job_id: str, worker_id: str) -> bool:
        query = "SELECT 1 FROM jobs WHERE id = ? AND worker_id = ? AND status = 'IN_PROGRESS'"
        return self._one(query, job_id, worker_id) is not None

    def _webhook_body(self, job_id: str) -> dict[str, Any]:
        job, row = self.get(job_id), self._one("SELECT request FROM jobs WHERE id = ?", job_id)
        assert job is not None
        assert row is not None
        request = _without_secrets(json.loads(row["request"]))
        return {**job.state(), "input": request["input"], "webhook": request["webhook"]}

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._database.execute(query, values).fetchone()
        return row

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._database.execute(query, values).fetchall()

    def _execute(self, statement: str, *values: Any) -> int:
        """How many rows it changed."""
        return self._database.execute(statement, values).rowcount

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._database)


class _Transaction:
    """All or nothing of what is executed inside."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")


def _milliseconds(seconds: float) -> int:
    return max(0, round(1000 * seconds))


def _text(error: Any) -> str:
    return error if isinstance(error, str) else json.dumps(error)


def _without_secrets(request: dict[str, Any]) -> dict[str, Any]:
    """The request without a bucket of the client's own, however that is spelled."""
    kept = {name: value for name, value in request.items() if not _names_bucket(name)}
    given = kept.get("input")
    if isinstance(given, dict):
        kept["input"] = {name: value for name, value in given.items() if not _names_bucket(name)}
    return kept


def _names_bucket(name: str) -> bool:
    return "s3" in name.lower() or "bucket" in name.lower()


def _policy_seconds(request: dict[str, Any], name: str, default: float) -> float:
    policy = request.get("policy")
    value = policy.get(name) if isinstance(policy, dict) else None
    return value / 1000 if isinstance(value, (int, float)) and value > 0 else default
