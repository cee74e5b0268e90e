"""Makes `out/demo.mp4`: one real job, through the real worker, on this machine.

Starts the local endpoint with one worker, sends it the sample portrait and speech with the client,
and fetches the video from the URL that comes back. With `--duet` two people of one picture speak in
turn, into `out/demo-duet.mp4`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from avatar_client import AvatarEndpoint, AvatarJob, JobFailedError, progress_bar
from avatar_client.contract.presets import PRESETS
from local_endpoint import LocalEndpoint, WorkerProcess

HERE = Path(__file__).parent
DUET: dict[str, Any] = {
    "image": HERE / "duet.png",
    "speakers": [{"audio": HERE / f"duet-{face}.ogg", "face": face} for face in ("left", "right")],
    "order": "in_turn",
    "prompt": "Two people talk to each other.",
}
START_SECONDS = 120
JOB_SECONDS = 600


def main() -> int:
    """Runs the demo; 0 if the video was made and fetched."""
    arguments = _arguments()
    name = "demo-duet" if arguments.duet else "demo"
    output_path = Path(arguments.output or f"out/{name}.mp4")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="avatar-demo-") as scratch,
        LocalEndpoint(with_object_store=True) as local,
    ):
        environment = {"AVATAR_MODEL": "demo", **local.object_store.environment}
        with (
            WorkerProcess(local, Path(scratch, "worker"), environment=environment) as worker,
            AvatarEndpoint(local.url, local.api_key) as endpoint,
        ):
            print("Starting the worker ...")  # noqa: T201
            worker.wait_until_polling(START_SECONDS)
            job = _submit(endpoint, arguments)
            try:
                with progress_bar() as show:
                    done = job.wait(on_status=show)
            except JobFailedError as failure:
                print(f"{failure}\n\n{worker.log}", file=sys.stderr)  # noqa: T201
                return 1
            job.download(output_path)
        assert done.output is not None
        _summarize(done.output, output_path)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--duet", action="store_true", help="two people who speak in turn")
    parser.add_argument("--image", type=Path, default=HERE / "portrait.png")
    parser.add_argument("--audio", type=Path, default=HERE / "speech.wav")
    parser.add_argument("--output")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="number of denoising steps")
    parser.add_argument("--preset", choices=PRESETS, default="draft", help="draft is the quickest")
    return parser.parse_args()


def _submit(endpoint: AvatarEndpoint, arguments: argparse.Namespace) -> AvatarJob:
    alone = {
        "image": arguments.image,
        "audio": arguments.audio,
        "prompt": "A woman speaks to the camera.",
    }
    return endpoint.submit(
        **(DUET if arguments.duet else alone),
        execution_timeout_seconds=JOB_SECONDS,
        resolution=arguments.resolution,
        num_inference_steps=arguments.steps,
        preset=arguments.preset,
        seed=128,
    )


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
