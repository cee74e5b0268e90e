"""`python -m avatar_client`: the command `avatar`."""

import sys

from avatar_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
