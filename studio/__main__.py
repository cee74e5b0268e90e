"""`python -m studio`: a page in the browser for making talking-avatar videos."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

from avatar_client.environment import ClientSettings
from studio.connection import Connection
from studio.endpoint_process import WORKER_PYTHON, LocalEndpointError, LocalEndpointProcess
from studio.history import History
from studio.tracker import JobTracker


def main() -> int:
    """Serves the page until it is told to stop."""
    arguments = _arguments()
    os.umask(0o077)  # what it keeps of people is its user's alone
    directory = arguments.directory.absolute()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # so that the endpoint ends as well
    # gradio's own, which it reads as it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # noqa: TID251
    os.environ["GRADIO_TEMP_DIR"] = str(directory / "uploads")  # noqa: TID251
    from studio.page import Page
    from studio.server import serve

    with contextlib.ExitStack() as stack:
        settings = ClientSettings.from_env()
        connection, uploads = None, settings.bucket
        endpoint = arguments.endpoint
        if endpoint is None:
            print("Starting an endpoint on this machine ...", flush=True)  # noqa: T201
            local = LocalEndpointProcess(
                directory / "local", arguments.worker_python, arguments.model_dir
            )
            try:
                stack.enter_context(local)
            except LocalEndpointError as error:
                print(f"The local endpoint: {error}", file=sys.stderr)  # noqa: T201
                return 1
            connection = local.connection()
            endpoint = connection.name
        elif key := settings.runpod_api_key:
            connection = Connection(name=endpoint, url=endpoint, api_key=key, uploads=uploads)
        tracker = JobTracker(History(directory / "jobs"))
        page = Page(tracker, connection, endpoint=endpoint, uploads=uploads)
        try:
            serve(page, tracker, connection, host=arguments.host, port=arguments.port)
        except OSError as error:
            print(f"The studio: {error.strerror}", file=sys.stderr)  # noqa: T201
            return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studio", description=__doc__)
    parser.add_argument(
        "--endpoint",
        help="id of an endpoint on RunPod, or a URL; its key is RUNPOD_API_KEY, or typed into the "
        "page; default: an endpoint with the demo model, on this machine",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("out/studio"),
        help="keeps the last jobs; default: out/studio",
    )
    parser.add_argument(
        "--worker-python",
        type=Path,
        default=WORKER_PYTHON,
        help="of the environment that the worker is installed in; default: .venv/bin/python",
    )
    parser.add_argument(
        "--model-dir", type=Path, help="of the endpoint on this machine; default: the demo model"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
