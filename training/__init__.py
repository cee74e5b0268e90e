"""Makes the demo model: a drawn world of talking faces, and what learns to speak in it."""

import worker  # noqa: F401  # arms the import guard, before a module here imports torch
