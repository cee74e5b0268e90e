"""`python -m worker doctor` and `python -m worker drift`: what an operator runs by hand."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    examination = commands.add_parser("doctor", help="say what keeps the worker from starting")
    examination.add_argument("--json", action="store_true", help="the same facts for a program")
    examination.add_argument(
        "--imports", action="store_true", help="the imports only: for the build of an image"
    )
    drift = commands.add_parser("drift", help="say how far a video leaves its portrait in time")
    drift.add_argument("video", type=Path, help="an mp4 of a worker")
    drift.add_argument(
        "--portrait", type=Path, help="all of which the video shows; default: its first frame"
    )
    drift.add_argument(
        "--face-box",
        type=float,
        nargs=4,
        metavar="NUMBER",
        help="x, y, width, height in the portrait; default: its largest face",
    )
    drift.add_argument("--json", action="store_true", help="start, end and worst for a program")
    arguments = parser.parse_args()
    if arguments.command == "drift":
        from worker import drift as command

        return command.main(
            arguments.video, arguments.portrait, arguments.face_box, as_json=arguments.json
        )
    from worker import doctor

    return doctor.main(as_json=arguments.json, imports_only=arguments.imports)


if __name__ == "__main__":
    sys.exit(main())
