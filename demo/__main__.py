"""Makes `out/demo.mp4`: one real job, through the real worker, on this machine.

Starts a control plane that speaks RunPod's worker protocol and an S3 server, runs `handler.py` as
the platform would, sends it the sample portrait and speech, and fetches the video from the URL
that comes back.
"""

import argparse
import base64
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from tqdm import tqdm

from worker.local import ControlPlane, Job, WorkerProcess

HERE = Path(__file__).parent
START_SECONDS = 120
JOB_SECONDS = 600
KEYS = {"aws_access_key_id": "demo", "aws_secret_access_key": "demo-secret"}  # of the local server


def main() -> int:
    """Runs the demo; 0 if the video was made and fetched."""
    arguments = _arguments()
    output_path = Path(arguments.output)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server's requests
    scratch = Path(tempfile.mkdtemp(prefix="avatar-demo-"))
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        environment = _make_bucket(store)
        with (
            ControlPlane() as control_plane,
            WorkerProcess(control_plane, scratch, environment=environment) as worker,
        ):
            print("Starting the worker ...")  # noqa: T201
            worker.wait_until_polling(START_SECONDS)
            job = _run(control_plane, _request(arguments))
        if job.status != "COMPLETED":
            print(f"{job.status}: {job.error}\n\n{worker.log}", file=sys.stderr)  # noqa: T201
            return 1
        with urllib.request.urlopen(job.output["video_url"]) as answer:  # noqa: S310
            content = answer.read()
        assert hashlib.sha256(content).hexdigest() == job.output["sha256"]
        output_path.write_bytes(content)
        _summarize(job.output, output_path)
        return 0
    finally:
        store.stop()
        shutil.rmtree(scratch)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--image", default=str(HERE / "portrait.png"))
    parser.add_argument("--audio", default=str(HERE / "speech.wav"))
    parser.add_argument("--output", default="out/demo.mp4")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50, help="number of denoising steps")
    return parser.parse_args()


def _make_bucket(store: ThreadedMotoServer) -> dict[str, str]:
    """The worker's settings for a new bucket of the local server."""
    host, port = store.get_host_and_port()
    endpoint_url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint_url, region_name="us-east-1", **KEYS).create_bucket(
        Bucket="avatars"
    )
    return {
        "AVATAR_MODEL": "demo",
        "BUCKET_ENDPOINT_URL": endpoint_url,
        "BUCKET_NAME": "avatars",
        "BUCKET_ACCESS_KEY_ID": KEYS["aws_access_key_id"],
        "BUCKET_SECRET_ACCESS_KEY": KEYS["aws_secret_access_key"],
    }


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    def encoded(path: str) -> str:
        return base64.b64encode(Path(path).read_bytes()).decode()

    return {
        "input": {
            "image": encoded(arguments.image),
            "audio": encoded(arguments.audio),
            "prompt": "A woman speaks to the camera.",
            "resolution": arguments.resolution,
            "num_inference_steps": arguments.steps,
            "seed": 128,
        },
        "policy": {"executionTimeout": JOB_SECONDS * 1000},
    }


def _run(control_plane: ControlPlane, request: dict[str, Any]) -> Job:
    """The finished job, with a bar that follows its progress."""
    job_id = control_plane.submit(request)
    form = "{desc:<48}|{bar}| {percentage:3.0f} %  {elapsed}"
    with tqdm(total=100, bar_format=form, ascii=" #") as bar:
        while True:
            try:
                job = control_plane.wait(job_id, 0.5)
            except TimeoutError:
                job = control_plane.state(job_id)
            if job.is_over:
                bar.update(100 - bar.n)
                return job
            if job.output:
                bar.set_description_str(job.output["message"])
                bar.update(100 * job.output["progress"] - bar.n)


def _summarize(output: dict[str, Any], path: Path) -> None:
    seconds = {name: value for name, value in output["metrics"].items() if "_seconds" in name}
    rows = {
        "video": f"{path} ({output['size_bytes'] / 1e3:.0f} kB)",
        "picture": f"{output['width']} x {output['height']}, {output['num_frames']} frames, "
        f"{output['fps']:g} a second, {output['duration_seconds']:.2f} s",
        "seed": output["seed"],
        "time": ", ".join(f"{n.removesuffix('_seconds')} {v:.1f} s" for n, v in seconds.items()),
        "fetched from": output["video_url"].partition("?")[0] + "?... (presigned)",
        "expires": output["expires_at"],
        "warnings": "; ".join(output["warnings"]) or "none",
        "imports": json.dumps(output["worker"]["imports"]),
    }
    for name, value in rows.items():
        print(f"{name:>14}  {value}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
