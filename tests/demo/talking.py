"""Whether a drawn face in a video talks: figures read from its frames."""

from dataclasses import dataclass

import numpy as np

from training.world import FPS, Face
from worker.generation import sampling
from worker.shapes import VideoPlan

SAMPLES = 640  # a frame
DARK = 0.2  # luminance below which a pixel is the inside of a mouth; no lip or skin is so dark
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Sync:
    """How a mouth follows a sound."""

    correlation: float  # Pearson's, at the best lag
    lag_seconds: float  # of the mouth behind the sound


def envelope(waveform: np.ndarray) -> np.ndarray:
    """The sound's level (F,), as slow as lips: root mean squares of 80 ms, smoothed over 200 ms."""
    num_frames = len(waveform) // SAMPLES
    padded = np.pad(waveform.astype(np.float64), SAMPLES // 2)
    windows = [padded[SAMPLES * i : SAMPLES * i + 2 * SAMPLES] for i in range(num_frames)]
    levels = np.sqrt(np.square(windows).mean(axis=1))
    kernel = np.hanning(7)[1:-1]
    return np.convolve(np.pad(levels, 2, mode="edge"), kernel / kernel.sum(), mode="valid")


def mouth_opening(frames: np.ndarray, face: Face) -> np.ndarray:
    """Dark pixels inside the region of the mouth (F,), as a share of it.

    Args:
        frames: (F, H, W, 3) uint8.
        face: who is drawn there.
    """
    region = _patch(frames, face, face.mouth_width * 1.2, -0.2, 0.45)
    return (region @ LUMINANCE / 255 < DARK).mean(axis=(1, 2))


def eye_opening(frames: np.ndarray, face: Face) -> np.ndarray:
    """How much light there is in the eyes (F,), 1 as in the brightest frame."""
    away, height = face.eye_place
    offset = height - face.mouth_place
    region = _patch(frames, face, away + 0.2, offset - 0.1, offset + 0.1)
    bright = np.sort((region @ LUMINANCE).reshape(len(frames), -1), axis=1)[:, -40:].mean(axis=1)
    return bright / bright.max()


def sync(opening: np.ndarray, sound: np.ndarray, most_lag: int = 6) -> Sync:
    """The best correlation of the two over lags of a few frames."""
    num_frames = min(len(opening), len(sound))
    opening, sound = opening[:num_frames], sound[:num_frames]
    best = Sync(-1.0, 0.0)
    for lag in range(-most_lag, most_lag + 1):
        mouth = opening[max(lag, 0) : num_frames + min(lag, 0)]
        level = sound[max(-lag, 0) : num_frames - max(lag, 0)]
        if mouth.std() > 0 and level.std() > 0:
            correlation = float(np.corrcoef(mouth, level)[0, 1])
            if correlation > best.correlation:
                best = Sync(correlation, lag / FPS)
    return best


def likeness(frames: np.ndarray, portrait: np.ndarray, face: Face) -> np.ndarray:
    """PSNR (F,) in dB of each frame to the portrait, outside of the mouth and the eyes."""
    same = outside(face, *portrait.shape[:2])
    errors = (frames[:, same].astype(np.float32) - portrait[same].astype(np.float32)) / 255
    return -10 * np.log10(np.maximum(np.square(errors).mean(axis=(1, 2)), 1e-10))


def outside(face: Face, height: int, width: int) -> np.ndarray:
    """Where neither the mouth nor the eyes are, (H, W)."""
    short = min(height, width)
    x = ((np.arange(width) + 0.5 - width / 2) / short - face.centre[0]) / face.size
    y = ((np.arange(height) + 0.5 - height / 2) / short - face.centre[1]) / face.size
    mouth = (abs(x)[None] < face.mouth_width * 1.4) & (abs(y - face.mouth_place) < 0.4)[:, None]
    away, place = face.eye_place
    # with the brows, which rise
    eyes = (abs(abs(x) - away)[None] < 0.28) & (abs(y - place + 0.1) < 0.32)[:, None]
    return ~(mouth | eyes)


def seam(pixels: np.ndarray, num_steps: int) -> float:
    """The largest change where windows meet, as a share of the largest anywhere else.

    Args:
        pixels: (F, N, 3) uint8, those that should stay as they are; of several windows.
        num_steps: of the denoising.
    """
    changes = abs(np.diff(pixels.astype(np.float32), axis=0)).mean(axis=(1, 2))
    borders = window_borders(num_steps, len(pixels))  # change i is that of frame i + 1 to frame i
    return float(changes[borders - 1].max() / np.delete(changes, borders - 1).max())


def window_borders(num_steps: int, num_frames: int) -> np.ndarray:
    """The first frames of the windows of the last steps, which leave their mark the most."""
    plan = VideoPlan(num_frames)
    latents = {
        start % plan.sampled_latents
        for step in range(num_steps - 3, num_steps)
        for start in sampling.window_starts(plan, step)
    }
    frames = [4 * latent - 3 for latent in sorted(latents) if latent > 0]
    return np.array([frame for frame in frames if frame < num_frames])


def sway(frames: np.ndarray, face: Face) -> float:
    """How far the head moves, in pixels: the spread of its place over the video.

    Measured along the sides of the face, where the skin ends, as the shift that explains the change
    of each frame to the mean of all.
    """
    region = _patch(frames, face, 1.25, -1.2, 0.1) @ LUMINANCE
    mean = region.mean(axis=0)
    slope = np.gradient(mean, axis=1)
    shifts = -((region - mean) * slope).sum(axis=(1, 2)) / np.square(slope).sum()
    return float(shifts.std())


def _patch(
    frames: np.ndarray, face: Face, half_width: float, above: float, below: float
) -> np.ndarray:
    """The pixels around the mouth's middle; the bounds in the head's units."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    x = width / 2 + face.centre[0] * short
    y = height / 2 + (face.centre[1] + face.mouth_place * face.size) * short
    unit = face.size * short
    rows = slice(max(round(y + above * unit), 0), round(y + below * unit))
    columns = slice(max(round(x - half_width * unit), 0), round(x + half_width * unit))
    return frames[:, rows, columns].astype(np.float32)
