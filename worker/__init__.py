"""The avatar worker: one portrait and one speech recording in, a talking-avatar video out."""

__version__ = "0.1.0"
