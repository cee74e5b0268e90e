"""A small picture of the portrait with a number at each face, for a client who has to choose."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from avatar_client.contract import preview
from worker.shapes import Box
from worker.small_jpeg import encoded

LONG_SIDE = 640  # px
LINE = 2  # px
COLOUR, PAPER = "#ffd400", "#000000"
NUMBER_HEIGHT = 22  # px


def numbered(portrait: Image.Image, faces: Sequence[Box]) -> str:
    """A JPEG as a `data:` URL, below 60 kB. Boxes are in pixels of the portrait."""
    picture = portrait.convert("RGB")
    picture.thumbnail((LONG_SIDE, LONG_SIDE), reducing_gap=2.0)
    across, down = picture.width / portrait.width, picture.height / portrait.height
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(NUMBER_HEIGHT)
    for index, (x, y, width, height) in enumerate(faces):
        left, top = x * across, y * down
        right, bottom = (x + width) * across, (y + height) * down
        draw.rectangle((left, top, right, bottom), outline=COLOUR, width=LINE)
        place = (max(left, 0) + 2 * LINE, max(top, 0) + 2 * LINE)
        draw.rectangle(draw.textbbox(place, str(index), font=font), fill=PAPER)
        draw.text(place, str(index), fill=COLOUR, font=font)
    return preview.to_data_url(encoded(picture))
