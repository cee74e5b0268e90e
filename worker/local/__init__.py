"""RunPod on this machine: an endpoint, its workers and its object store.

`python -m worker.local` serves them; the demo and the tests use the same classes. Nothing here runs
on the platform, and `handler.py` is started as it is, in a process of its own.
"""

from worker.local.endpoint import LocalEndpoint
from worker.local.fleet import Fleet
from worker.local.job_queue import JobRecord, Post, Status
from worker.local.worker_api import Heartbeat
from worker.local.worker_process import WorkerProcess

__all__ = ["Fleet", "Heartbeat", "JobRecord", "LocalEndpoint", "Post", "Status", "WorkerProcess"]
