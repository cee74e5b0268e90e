"""How many faces the fallback detector finds, and where: docs/decisions/faces.md has its table.

    python -m benchmarks.faces

The pictures are those that face_recognition, scikit-image and this repository are tested with; pip
fetches the first two. Each is changed in the ways in which portraits differ. A face counts as found
if the largest box lies on it and is neither half nor twice as wide.
"""

import io
import math
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from training import world
from worker.generation.face import detect_by_dlib, largest_face
from worker.shapes import Box

ROOT = Path(__file__).parents[1]
SOURCES = ["face_recognition==1.3.0", "scikit-image==0.26.0"]
# By an MTCNN that was trained, as the published detector was, on WIDER FACE; looked over by eye.
FACES: dict[str, Box] = {
    "obama.jpg": (369, 82, 243, 334),
    "obama2.jpg": (193, 214, 280, 424),
    "obama3.jpg": (641, 252, 267, 357),
    "biden.jpg": (427, 168, 288, 399),
    "astronaut.png": (180, 65, 86, 108),
    "portrait.png": (149, 88, 265, 316),
}
CUT = {
    "obama_partial_face.jpg": (-96, 74, 275, 347),
    "obama_partial_face2.jpg": (392, 58, 363, 412),
}
NO_FACES = [
    *("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "retina.jpg"),
    *("hubble_deep_field.jpg", "grass.png", "gravel.png", "brick.png", "coins.png", "page.png"),
    *("horse.png", "cell.png", "moon.png"),
]
DRAWN_SEEDS = range(900, 930)

Case = tuple[str, Image.Image, Box]


def fetch(directory: Path) -> dict[str, Image.Image]:
    """All pictures, by file name."""
    sources = ["--no-binary=face_recognition", *SOURCES]  # its wheel has no pictures
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *sources]
    subprocess.run(command, cwd=directory, check=True)  # noqa: S603  # the list above
    contents = {"portrait.png": (ROOT / "demo/portrait.png").read_bytes()}
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            contents |= {Path(name).name: archive.read(name) for name in archive.namelist()}
    for source in directory.glob("*.tar.gz"):
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                if file := archive.extractfile(member):
                    contents[Path(member.name).name] = file.read()
    names = [*FACES, *CUT, *NO_FACES]
    return {name: Image.open(io.BytesIO(contents[name])).convert("RGB") for name in names}


def cut(image: Image.Image, face: Box) -> Iterator[Case]:
    """The face at the picture's border."""
    x, y, width, height = face
    for share in (0.15, 0.3, 0.45):
        left, right = round(x + share * width), round(x + (1 - share) * width)
        side = image.crop((left, 0, image.width, image.height))
        yield "cut at a side", side, (x - left, y, width, height)
        yield "cut at a side", image.crop((0, 0, right, image.height)), face
        top, bottom = round(y + 0.8 * share * height), round(y + (1 - 0.6 * share) * height)
        below = image.crop((0, top, image.width, image.height))
        yield "forehead cut", below, (x, y - top, width, height)
        yield "chin cut", image.crop((0, 0, image.width, bottom)), face
    tight = image.crop((round(x), round(y), round(x + width), round(y + height)))
    yield "the face alone", tight, (0, 0, width, height)


def placed(image: Image.Image, face: Box) -> Iterator[Case]:
    """The face turned, small, narrow."""
    x, y, width, height = face
    yield "mirrored", ImageOps.mirror(image), (image.width - x - width, y, width, height)
    for degrees in (-30, -20, -10, 10, 20, 30):
        turned = image.rotate(degrees, Image.Resampling.BICUBIC)
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        right, down = x + (width - image.width) / 2, y + (height - image.height) / 2
        left = right * cosine + down * sine + (image.width - width) / 2
        top = down * cosine - right * sine + (image.height - height) / 2
        yield f"turned by {abs(degrees)} degrees", turned, (left, top, width, height)
    larger = max(width / image.width / 0.12, 1)
    wide = Image.new("RGB", (round(image.width * larger), round(image.height * larger)), "grey")
    right, down = wide.width // 3, wide.height // 3
    wide.paste(image, (right, down))
    yield "an eighth as wide as the picture", wide, (x + right, y + down, width, height)
    narrow = image.resize((round(0.7 * image.width), image.height))
    yield "narrowed to 0.7", narrow, (0.7 * x, y, 0.7 * width, height)
    scale = 160 / min(image.size)
    tiny = image.resize((round(scale * image.width), round(scale * image.height)))
    yield "160 px", tiny, (scale * x, scale * y, scale * width, scale * height)


def changed(image: Image.Image, face: Box) -> Iterator[Case]:
    """Other pixels for the same face."""
    x, y, width, height = face
    pixels = np.asarray(image).astype(np.float64)
    yield "dark", ImageEnhance.Brightness(image).enhance(0.25), face
    yield "pale", ImageEnhance.Contrast(image).enhance(0.25), face
    yield "grey", image.convert("L").convert("RGB"), face
    yield "four levels", ImageOps.posterize(image, 2), face
    noise = np.random.default_rng(0).normal(0, 30, pixels.shape)
    yield "noisy", Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)), face
    smooth = image.filter(ImageFilter.GaussianBlur(max(image.size) / 400))
    slopes = np.hypot(*np.gradient(np.asarray(smooth).astype(np.float64).mean(axis=2)))
    lines = Image.fromarray(np.clip(255 - 4 * slopes, 0, 255).astype(np.uint8))
    yield "drawn in lines", lines.convert("RGB"), face
    glasses, mask = image.copy(), image.copy()
    draw = ImageDraw.Draw(glasses)
    for eye in (0.27, 0.73):
        left, right = x + (eye - 0.2) * width, x + (eye + 0.2) * width
        draw.ellipse((left, y + 0.28 * height, right, y + 0.5 * height), fill=(15, 15, 15))
    yield "dark glasses", glasses, face
    left, right = x + 0.1 * width, x + 0.9 * width
    ImageDraw.Draw(mask).rectangle((left, y + 0.6 * height, right, y + height), fill="silver")
    yield "mouth covered", mask, face


def cases(pictures: dict[str, Image.Image]) -> Iterator[Case]:
    """All of them."""
    for name, face in FACES.items():
        image = pictures[name]
        yield "as it is", image, face
        for each in (cut, placed, changed):
            yield from each(image, face)
    for name, face in CUT.items():
        yield "cut at a side", pictures[name], face
    for seed in DRAWN_SEEDS:
        person = world.random_face(np.random.default_rng(seed))
        pixels = (world.portrait(person, 256, 256) * 255).byte().permute(1, 2, 0).numpy()
        yield "drawn as for the demo", Image.fromarray(pixels), person.box(256, 256)


def is_found(box: Box | None, face: Box) -> bool:
    """Whether it is that face."""
    if box is None:
        return False
    x, y = box[0] + box[2] / 2 - face[0], box[1] + box[3] / 2 - face[1]
    return 0 < x < face[2] and 0 < y < face[3] and 0.5 < box[2] / face[2] < 2


def main() -> None:
    """Prints the table."""
    write = sys.stdout.write
    found: dict[str, list[bool]] = defaultdict(list)
    differences, wrong, seconds = [], 0, []
    with tempfile.TemporaryDirectory() as directory:
        pictures = fetch(Path(directory))
    for kind, image, face in cases(pictures):
        begun = time.perf_counter()
        box = largest_face(image, None)
        seconds.append(time.perf_counter() - begun)
        found[kind].append(is_found(box, face))
        if box is not None and found[kind][-1]:
            above, below = box[1] - face[1], box[1] + box[3] - face[1] - face[3]
            differences.append((above / face[3], below / face[3], box[2] / face[2]))
        wrong += box is not None and not found[kind][-1]
    for kind, each in found.items():
        write(f"{kind:34}{sum(each):4} of {len(each)}\n")
    write(f"{sum(map(sum, found.values()))} of {len(seconds)}; {wrong} elsewhere\n")
    top, bottom, width = map(median, zip(*differences, strict=True))
    write(f"medians: top {top:+.2f}, bottom {bottom:+.2f} of the height, {width:.2f} as wide; ")
    write(f"{1000 * median(seconds):.0f} ms\n")
    seen = [name for name in NO_FACES if detect_by_dlib(pictures[name])]
    write(f"found in {len(seen)} of {len(NO_FACES)} pictures without a face {seen}\n")


if __name__ == "__main__":
    main()
