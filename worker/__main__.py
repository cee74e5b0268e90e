"""`python -m worker doctor [--json]`: what an operator runs by hand."""

import argparse
import sys

from worker import doctor


def main() -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    commands = parser.add_subparsers(required=True)
    examination = commands.add_parser(
        "doctor", help="name the broken link from torch to the handler"
    )
    examination.add_argument("--json", action="store_true", help="the same facts for a program")
    return doctor.main(as_json=parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
