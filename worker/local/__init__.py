"""RunPod on this machine: the platform's side of the worker protocol, and a worker to run on it.

For tests and for trying the worker. Nothing here runs on the platform, and nothing here imports the
worker's own code: `handler.py` is started as it is, in a process of its own.
"""

from worker.local.control_plane import ControlPlane, Heartbeat, Job, Post, Status
from worker.local.worker_process import WorkerProcess

__all__ = ["ControlPlane", "Heartbeat", "Job", "Post", "Status", "WorkerProcess"]
