"""Gives a model directory what its worker draws previews with: a map fitted to its autoencoder.

    python -m builder.preview MODEL_DIR [--pictures DIR]

builder.bake does so too. The pictures are drawn: discs that hide one another, at all sizes, which
have edges and planes as photographs do; or those of a directory. On two CPU cores the published
autoencoder takes minutes.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d

from worker.loading import manifest, preview
from worker.model.latent_to_rgb import LatentToRGB, still_latents

logger = logging.getLogger("builder.preview")

SIDE = 128  # px of a picture
NUM_PICTURES = 32
NUM_MEASURED = 4  # further pictures, which say how good the map is
NUM_DISCS = 60
LARGEST, SMALLEST = 0.5, 0.08  # radius of a disc, of the side


def add_preview(model_dir: Path, pictures: Iterable[Image.Image] | None = None) -> None:
    """Writes the map, and enters it into the manifest where there is one.

    Raises:
        OSError, ValueError: there is no autoencoder, or the directory cannot be written.
    """
    vae = AutoencoderKLHunyuanVideo.from_pretrained(model_dir / "vae").eval()
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    tensors = list(map(_to_tensor, drawn_pictures() if pictures is None else pictures))
    measured, fitted = tensors[:NUM_MEASURED], tensors[NUM_MEASURED:]
    if not fitted:
        raise ValueError(f"there must be more than {NUM_MEASURED} pictures")
    latent_to_rgb = LatentToRGB.fit(vae, fitted)
    drawn = torch.stack([latent_to_rgb(still_latents(vae, picture)) for picture in measured])
    meant = avg_pool2d(torch.stack(measured), SIDE // drawn.shape[-1])
    path = preview.save(latent_to_rgb, model_dir)
    content = manifest.read(model_dir)
    if content is not None:
        content["files"][path.name] = manifest.describe(path)
        manifest.write(model_dir, content)
    logger.info("%s: %.1f dB", path, -10 * (drawn - meant).square().mean().log10().item())


def drawn_pictures(
    count: int = NUM_MEASURED + NUM_PICTURES, seed: int = 1
) -> Iterator[Image.Image]:
    """Discs of many colours that hide one another, on all scales, some of them out of focus.

    Source: Lee, Mumford and Huang, Occlusion models for natural images, IJCV 2001.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        image = Image.new("RGB", (SIDE, SIDE), _colour(rng))
        draw = ImageDraw.Draw(image)
        for _ in range(NUM_DISCS):
            # radii with a density of their inverse cube look alike at all scales
            share = rng.uniform(LARGEST**-2, SMALLEST**-2) ** -0.5
            x, y = rng.uniform(0, SIDE, 2)
            across, down = SIDE * share, SIDE * share * rng.uniform(0.5, 1)
            draw.ellipse((x - across, y - down, x + across, y + down), fill=_colour(rng))
        yield image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """As pale as most of what photographs show: pure colours alone make a map worse by 4 dB."""
    values = rng.integers(0, 256) + rng.integers(-64, 65, 3)
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue


def _to_tensor(picture: Image.Image) -> Tensor:  # (3, 128, 128)
    square = ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m builder.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="of photographs, say")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    pictures = None
    if arguments.pictures is not None:
        pictures = map(Image.open, sorted(arguments.pictures.iterdir()))
    try:
        add_preview(arguments.model_dir, pictures)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
