"""The version of everything in this repository; pyproject.toml reads it here."""

__version__ = "0.1.0"
