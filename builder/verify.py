"""Says whether a model directory is whole, by its manifest, and names each file that is not.

    python -m builder.verify MODEL_DIR [--hashes]

Sizes are always compared; with --hashes every file is read through. The exit code is 1 if something
is wrong.
"""

import argparse
import sys
from pathlib import Path

from worker.loading.model_directory import require_whole


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m builder.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--hashes", action="store_true", help="read every file through")
    arguments = parser.parse_args()
    try:
        require_whole(arguments.model_dir, hashes=arguments.hashes)
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    sys.stdout.write(f"{arguments.model_dir} is whole\n")


if __name__ == "__main__":
    main()
