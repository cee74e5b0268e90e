"""How fast the parts are, each beside what it is to be compared with."""

import worker  # noqa: F401  # arms the import guard, before a module here imports torch
