"""The picture of a running job, drawn anew: no byte that an endpoint has sent is shown."""

import io

from PIL import Image

from avatar_client.contract.preview import to_data_url

QUALITIES = (80, 50, 20)


def redrawn(jpeg: bytes) -> str | None:
    """A `data:` URL of the same picture; None if it cannot be read.

    Args:
        jpeg: as `avatar_client` has checked it: small, and decoded in one pass.
    """
    for quality in QUALITIES:
        content = io.BytesIO()
        try:
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as sent:
                pixels = sent.convert("RGB")
            # a new image, since a converted one keeps comments
            picture = Image.frombytes("RGB", pixels.size, pixels.tobytes())
            picture.save(content, "JPEG", quality=quality)
            return to_data_url(content.getvalue())
        except (OSError, ValueError, SyntaxError):
            continue
    return None
