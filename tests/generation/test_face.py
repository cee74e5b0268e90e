from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from training import world
from worker.generation.face import (
    TorchScriptFaceDetector,
    detect_by_dlib,
    largest_face,
    non_maximum_suppression,
)
from worker.shapes import Box

# The published detector is TorchScript, which torch no longer recommends.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PHOTO = (
    Path(__file__).parents[1] / "data" / "astronaut.jpg"
)  # Eileen Collins, by NASA; public domain


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB")


class RedSquares(torch.nn.Module):
    """A detector as the published one is called: it finds red 32 px cells, in BGR pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels, 32)  # (1, 3, rows, columns)
        red = cells[:, 2] - cells[:, 0] - cells[:, 1]  # BGR
        corner = grids[2][:, 0] * 32  # (1, rows, columns, 2)
        size = torch.full_like(corner, 32.0)
        score = (red * self.sharpness).unsqueeze(3)
        landmarks = torch.zeros(1, corner.shape[1], corner.shape[2], 10)
        cells = torch.cat([corner + 16, size, score, landmarks, torch.ones_like(score)], dim=3)
        return cells.flatten(1, 2)


@pytest.fixture(scope="module")
def detector() -> TorchScriptFaceDetector:
    return TorchScriptFaceDetector(torch.jit.script(RedSquares()))


def picture_with_a_red_square(width: int, height: int, box: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGB", (width, height), (0, 60, 0))
    x, y, box_width, box_height = box
    image.paste((255, 0, 0), (x, y, x + box_width, y + box_height))
    return image


FACE = (69.0, 42.0, 56.0, 72.0)  # in the photo, from the hairline to the chin, by eye


def require_found(image: Image.Image, face: Box) -> None:
    """The largest box of the fallback is that of the face."""
    box = largest_face(image, None)
    assert box is not None
    for found, right, length in zip(box, face, face[2:] * 2, strict=True):
        assert found == pytest.approx(right, abs=0.25 * length)


@pytest.mark.parametrize("side", [140, 200, 1600])
def test_the_fallback_finds_the_face_in_a_photo_of_any_size(photo: Image.Image, side: int) -> None:
    scale = side / photo.width
    x, y, width, height = (scale * value for value in FACE)
    require_found(photo.resize((side, side)), (x, y, width, height))


@pytest.mark.parametrize("share", [0.15, 0.3, 0.45])
def test_the_fallback_finds_a_face_that_the_border_cuts(photo: Image.Image, share: float) -> None:
    x, y, width, height = FACE
    left, top = round(x + share * width), round(y + 0.5 * share * height)
    require_found(photo.crop((left, 0, 200, 200)), (x - left, y, width, height))
    require_found(photo.crop((0, 0, round(x + (1 - share) * width), 200)), FACE)
    require_found(photo.crop((0, top, 200, 200)), (x, y - top, width, height))


def test_the_fallback_finds_a_face_that_is_dark_grey_turned_or_one_of_two(
    photo: Image.Image,
) -> None:
    x, y, width, height = FACE
    require_found(ImageEnhance.Brightness(photo).enhance(0.25), FACE)
    require_found(photo.convert("L").convert("RGB"), FACE)
    require_found(ImageOps.mirror(photo), (200 - x - width, y, width, height))
    middle = (x + width / 2, y + height / 2)
    for degrees in (-20, 20):
        require_found(photo.rotate(degrees, Image.Resampling.BICUBIC, center=middle), FACE)
    both = Image.new("RGB", (350, 200))
    both.paste(photo.resize((150, 150)))
    both.paste(photo, (150, 0))
    assert len(detect_by_dlib(both)) == 2
    require_found(both, (x + 150, y, width, height))


def test_the_fallback_finds_most_drawn_faces_where_they_are() -> None:
    num_found = 0
    for seed in range(900, 908):
        face = world.random_face(np.random.default_rng(seed))
        pixels = (world.portrait(face, 256, 256) * 255).byte().permute(1, 2, 0).numpy()
        if detect_by_dlib(Image.fromarray(pixels)):
            require_found(Image.fromarray(pixels), face.box(256, 256))
            num_found += 1
    assert num_found >= 5


def test_the_fallback_finds_no_face_where_there_is_none(photo: Image.Image) -> None:
    assert detect_by_dlib(photo.rotate(180)) == []
    assert largest_face(Image.new("RGB", (300, 200), (90, 120, 60)), None) is None
    assert detect_by_dlib(Image.new("RGB", (3000, 2))) == []
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    assert detect_by_dlib(Image.fromarray(noise).resize((600, 600))) == []


def test_the_checkpoint_s_detector_gives_boxes_in_the_picture_s_pixels(
    detector: TorchScriptFaceDetector,
) -> None:
    image = picture_with_a_red_square(832, 416, (64, 128, 32, 32))
    assert detector.detect(image) == [(64.0, 128.0, 32.0, 32.0)]


def test_pictures_of_any_size_are_scaled_for_the_detector_and_boxes_back(
    detector: TorchScriptFaceDetector,
) -> None:
    image = picture_with_a_red_square(200, 100, (50, 25, 50, 50))  # scaled to 832 x 416
    boxes = detector.detect(image)
    assert len(boxes) > 20  # cells of 32 px in a square of 208
    assert min(x for x, _, _, _ in boxes) == pytest.approx(50, abs=8)
    assert max(y + height for _, y, _, height in boxes) == pytest.approx(75, abs=8)


class ThreeFaces(torch.nn.Module):
    """A detector without grids, which always finds two faces and an unlikely third."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor([0.9, 0.6, 0.4]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        faces = torch.zeros(1, 3, 16)
        faces[0, :, 4] = self.scores
        faces[0, :, 15] = 1.0
        faces[0, 0, :4] = torch.tensor([100.0, 100.0, 40.0, 40.0])
        faces[0, 1, :4] = torch.tensor([300.0, 200.0, 80.0, 60.0])
        faces[0, 2, :4] = torch.tensor([200.0, 200.0, 400.0, 400.0])
        return faces


def test_the_largest_likely_face_is_taken() -> None:
    detector = TorchScriptFaceDetector(torch.jit.script(ThreeFaces()))
    image = Image.new("RGB", (416, 416))
    assert largest_face(image, detector) == (260.0, 170.0, 80.0, 60.0)


def test_overlapping_boxes_are_one_face() -> None:
    corners = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [20, 0, 30, 10], [0, 6, 10, 16.0]])
    kept = non_maximum_suppression(corners, torch.tensor([0.8, 0.9, 0.7, 0.6]), 0.45)
    assert kept.tolist() == [1, 2, 3]
    none = non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), 0.45)
    assert none.tolist() == []


def test_the_detector_survives_saving_and_stays_float32(
    detector: TorchScriptFaceDetector, tmp_path: Path
) -> None:
    detector.save_pretrained(tmp_path)
    again = TorchScriptFaceDetector.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert again.dtype == torch.float32
    image = picture_with_a_red_square(416, 416, (96, 64, 32, 32))
    assert again.detect(image) == detector.detect(image) == [(96.0, 64.0, 32.0, 32.0)]
