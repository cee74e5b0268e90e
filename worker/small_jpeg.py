"""A picture as a JPEG that is small enough to travel in a progress or a reply."""

import io

from PIL import Image

from avatar_client.contract import preview

QUALITIES = (80, 60, 40, 20)  # the first that makes it small enough
SMALLER = 2  # times, where none does


def encoded(picture: Image.Image) -> bytes:
    """A JPEG that fits into a `data:` URL of the contract."""
    while True:
        for quality in QUALITIES:
            content = io.BytesIO()
            picture.save(content, "JPEG", quality=quality, optimize=True)
            if preview.fits(content.tell(), *picture.size):
                return content.getvalue()
        picture = picture.reduce(SMALLER)
