"""The published encoders' weights: what their names have in common."""

import re

# Prefixes that a module has in the published files or in some versions of transformers only.
OPTIONAL_PREFIXES = re.compile(r"^(text_model|model)\.|(?<=language_model\.)model\.|vision_model\.")


def canonical_name(name: str) -> str:
    """The name of an encoder's weight without what files and versions differ in."""
    return OPTIONAL_PREFIXES.sub("", name)
