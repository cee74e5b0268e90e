"""The map of latents to a rough picture, as it lies in a model directory."""

import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from worker.atomic_file import READABLE, atomic_write
from worker.model.latent_to_rgb import LatentToRGB

logger = logging.getLogger(__name__)

NAME = "preview.safetensors"


def save(latent_to_rgb: LatentToRGB, model_dir: Path) -> Path:
    """Writes the map, and says where."""
    path = model_dir / NAME
    with atomic_write(path, mode=READABLE) as part:
        save_file({"weight": latent_to_rgb.weight, "bias": latent_to_rgb.bias}, part)
    return path


def load(model_dir: Path, num_channels: int) -> LatentToRGB | None:
    """The map; None if there is none, or one that is of no use, which the log tells.

    Args:
        num_channels: of the autoencoder's latents.
    """
    path = model_dir / NAME
    if not path.is_file():
        logger.info("no previews: %s has no %s, which builder.preview makes", model_dir, NAME)
        return None
    try:
        tensors = load_file(path)
        latent_to_rgb = LatentToRGB(tensors["weight"].float(), tensors["bias"].float())
        if latent_to_rgb.weight.shape[1] != num_channels:
            raise ValueError(f"not of {num_channels} channels")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("no previews: %s is of no use: %s", path, error)
        return None
    return latent_to_rgb
