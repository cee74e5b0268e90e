"""Makes the demo model: a drawn world of talking faces, and the model that is trained on it."""

import worker  # noqa: F401  # arms the import guard, before a module here imports torch
