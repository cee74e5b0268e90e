"""RunPod on this machine: an endpoint, its workers and its object store.

`python -m local_endpoint` serves them; the demo and the tests use the same classes. Nothing
here runs on the platform, and `handler.py` is started as it is, in a process of its own.
"""

from local_endpoint.endpoint import LocalEndpoint
from local_endpoint.fleet import Fleet
from local_endpoint.job_queue import JobRecord, Post, Status
from local_endpoint.worker_api import Heartbeat
from local_endpoint.worker_process import WorkerProcess

__all__ = ["Fleet", "Heartbeat", "JobRecord", "LocalEndpoint", "Post", "Status", "WorkerProcess"]
