"""`python -m local_endpoint`: an endpoint with workers on this machine."""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from avatar_client.environment import BucketVariables
from local_endpoint.endpoint import LocalEndpoint
from local_endpoint.fleet import Fleet
from local_endpoint.settings import LocalSettings, worker_environment

logger = logging.getLogger("local_endpoint")


def main() -> int:
    """Serves until it is told to stop."""
    os.umask(0o077)  # what it and its workers write is this user's alone
    settings = LocalSettings.from_env()
    arguments = _arguments(settings.fastapi_port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses
    given_key = settings.runpod_api_key
    environment = worker_environment()
    variables = BucketVariables.from_env(environment)
    with_object_store = variables.bucket is None and not variables.missing_bucket_variables
    endpoint = LocalEndpoint(
        arguments.state.absolute(),
        port=arguments.port,
        api_key=given_key.get_secret_value() if given_key else None,
        with_object_store=with_object_store,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        endpoint.start()
    except (OSError, ModuleNotFoundError) as error:
        print(f"the endpoint cannot start: {error}", file=sys.stderr)  # noqa: T201
        return 1
    try:
        if with_object_store:
            environment |= endpoint.object_store.environment
        environment.setdefault("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")  # of its own store
        with Fleet(endpoint, arguments.workers, environment=environment):
            where = "RUNPOD_API_KEY" if given_key else endpoint.directory / "api-key"
            logger.info("endpoint %s, its key in %s", endpoint.url, where)
            stop.wait()
            logger.info("stopping; jobs that are not done are done after the next start")
    finally:
        endpoint.stop()
    return 0


def _arguments(port: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m local_endpoint", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=port, help="on 127.0.0.1; default: FASTAPI_PORT or 8000"
    )
    parser.add_argument("--workers", type=int, default=1, help="how many; default: 1")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".cache/endpoint"),
        help="directory of jobs, results and keys; default: .cache/endpoint",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
