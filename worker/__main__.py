"""`python -m worker doctor`: what an operator runs by hand."""

import argparse
import sys

from worker import doctor


def main() -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    commands = parser.add_subparsers(required=True)
    examination = commands.add_parser("doctor", help="say what keeps the worker from starting")
    examination.add_argument("--json", action="store_true", help="the same facts for a program")
    examination.add_argument(
        "--imports", action="store_true", help="the imports only: for the build of an image"
    )
    arguments = parser.parse_args()
    return doctor.main(as_json=arguments.json, imports_only=arguments.imports)


if __name__ == "__main__":
    sys.exit(main())
