"""Published weights to the directory that the worker loads; the Hub listing."""

import worker  # noqa: F401  # arms the import guard, before a module here imports torch
