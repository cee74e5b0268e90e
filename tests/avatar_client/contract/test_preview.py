"""The JPEG in a progress, which is read from whoever sent it."""

import base64
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_client.contract import preview
from tests.support.pictures import encoded, jpeg

PICTURE = jpeg()


def url(content: bytes) -> str:
    return preview.PREFIX + base64.b64encode(content).decode()


@pytest.mark.parametrize("options", [{}, {"quality": 20}, {"optimize": True}, {"comment": b"x"}])
def test_a_jpeg_comes_back_as_it_was(options: dict[str, Any]) -> None:
    picture = jpeg(**options)
    assert preview.read(preview.to_data_url(picture)) == picture


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8))
BOMB = jpeg(8, 8).replace(b"\x00\x08\x00\x08", b"\xff\xff\xff\xff")  # says 65535 x 65535
SCAN = PICTURE[PICTURE.index(b"\xff\xda") : -2]


@pytest.mark.parametrize(
    "odd",
    [
        None,
        7,
        b"data:image/jpeg;base64,",
        "",
        base64.b64encode(PICTURE).decode(),
        url(PICTURE).replace("jpeg", "svg+xml"),
        url(PICTURE) + '"><script>',
        url(PICTURE)[:-8],
        url(b""),
        url(b"<svg onload=alert(1)>"),
        url(b"\xff\xd8<script>\xff\xd9"),
        url(PICTURE + b"<script>"),
        url(PICTURE[:200] + b"\xff\xd9"),
        url(encoded(NOISE, "PNG")),
        url(encoded(NOISE, "JPEG", quality=95)),  # too many bytes
        url(jpeg(8, 2056)),
        url(BOMB),
        url(jpeg(progressive=True)),  # may be decoded in thousands of passes
        url(PICTURE[:-2] + 3 * SCAN + b"\xff\xd9"),
    ],
    ids=range(19),
)
def test_what_is_no_small_picture_is_refused(odd: object) -> None:
    with pytest.raises(ValueError, match="a preview"):
        preview.read(odd)
