from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.golden_transformer import relative_difference
from tests.support.golden_weights import load_case
from worker.generation.image import face_mask, resize, scale_box, to_llava_pixels, to_pixels
from worker.shapes import FrameSize, fit_size

DESCRIBED, TENSORS = load_case("image")
FACES = DESCRIBED["faces"]
FACE_FRAME = FrameSize(FACES["height"], FACES["width"])


def picture(name: str) -> Image.Image:
    return Image.fromarray(TENSORS[f"{name}.input"].numpy())


def resized(name: str) -> Image.Image:
    image = picture(name)
    return resize(image, fit_size(image.height, image.width, 64))


@pytest.mark.parametrize("name", ["pixels0", "portrait"])
def test_a_resized_picture_is_the_reference_s_to_the_bit(name: str) -> None:
    ours = torch.from_numpy(np.array(resized(name))).permute(2, 0, 1)
    assert torch.equal(ours, TENSORS[f"{name}.resized"])


def test_the_text_encoder_s_pixels_are_the_reference_s() -> None:
    _, text = load_case("text")
    ours = to_llava_pixels(resized("portrait"))
    assert ours.dtype == torch.float16
    # One of the 256 blues lies between two float16s, and CPUs round it either way.
    assert relative_difference(ours, text["pixel_values"]) < 1e-6
    assert (ours != text["pixel_values"]).float().mean() < 2e-3


def test_any_kind_of_picture_becomes_rgb() -> None:
    grey = resize(Image.new("LA", (20, 10), (128, 255)), FrameSize(64, 128))
    assert grey.mode == "RGB"
    assert to_pixels(grey).shape == (1, 3, 1, 64, 128)


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (16, 16), (0, 255, 51))
    assert to_pixels(image)[0, :, 0, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("row", FACES["rows"], ids=lambda row: str(row["box"]))
def test_a_face_mask_is_the_reference_s_to_the_bit(row: dict[str, Any]) -> None:
    box = row["box"] and tuple(row["box"])
    assert torch.equal(face_mask(box, FACE_FRAME), TENSORS[row["latent"]])


def test_a_box_keeps_its_place_when_the_picture_is_resized() -> None:
    box = (10.0, 20.0, 30.0, 40.0)
    scaled = scale_box(box, FrameSize(height=100, width=200), FrameSize(height=50, width=400))
    assert scaled == (20.0, 10.0, 60.0, 20.0)
