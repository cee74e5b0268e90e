"""A look at a video in the making: one of its frames, from the clean latents that a step predicts.

The autoencoder, which may not be on the GPU while the transformer is, is not asked. One frame's
latents leave the GPU, a tenth of the way at a time, and nothing waits for them.
"""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from avatar_client.contract import preview
from worker.model.latent_to_rgb import LatentToRGB
from worker.small_jpeg import encoded

logger = logging.getLogger(__name__)

TENTHS = 10
PIXELS_PER_LATENT = 8  # across: the picture has the size of the video


class FramePreview:
    """Follows one frame of one video while it is denoised, and draws it now and then.

    Args:
        latent_to_rgb: of the model's autoencoder.
        frame: which latent frame is followed.
    """

    def __init__(self, latent_to_rgb: LatentToRGB, frame: int) -> None:
        self._latent_to_rgb = latent_to_rgb
        self._frame = frame
        self._clean: Tensor | None = None  # (C, h, w), as the last step predicts it
        self._coming: Tensor | None = None  # the same on its way to the CPU ...
        self._arrived: torch.Event | None = None  # ... from a GPU
        self._tenths = 0  # of the way, up to where it was drawn
        self._has_failed = False

    def see(self, window: Tensor, velocity: Tensor, sigma: float, frames: Sequence[int]) -> None:
        """Takes the frame from a window of a step, if it is there.

        Args:
            window: the noisy latents (1, C, T, h, w) before the step.
            velocity: what is predicted for them.
            sigma: how noisy they are.
            frames: which latent frame of the video each of them is.
        """
        if self._frame in frames:
            index = frames.index(self._frame)
            self._clean = window[0, :, index] - sigma * velocity[0, :, index]

    def data_url(self, share: float) -> str | None:
        """A new picture for the progress, once for each tenth of the way; None: not now.

        On a GPU it comes one step late, since nothing waits for its copy. No job fails by it: after
        a failure there is none any more.
        """
        if self._has_failed:
            return None
        try:
            tenths = int(TENTHS * share + 1e-6)
            if tenths > self._tenths and self._clean is not None:
                self._tenths = tenths
                self._send(self._clean)
            if self._coming is not None and (self._arrived is None or self._arrived.query()):
                latents, self._coming = self._coming, None
                return preview.to_data_url(self._draw(latents))
        except Exception as error:
            logger.warning("there is no preview any more: %s", error)
            self._has_failed = True
        return None

    def _send(self, clean: Tensor) -> None:
        if clean.device.type != "cuda":
            self._coming = clean
            return
        self._coming = torch.empty(clean.shape, dtype=clean.dtype, pin_memory=True)
        self._coming.copy_(clean, non_blocking=True)
        self._arrived = torch.Event(clean.device)
        self._arrived.record()

    def _draw(self, latents: Tensor) -> bytes:
        pixels = self._latent_to_rgb(latents).permute(1, 2, 0).mul(255).round().byte()
        height, width = (PIXELS_PER_LATENT * side for side in latents.shape[1:])
        picture = Image.fromarray(pixels.numpy())
        return encoded(picture.resize((width, height), Image.Resampling.BICUBIC))
