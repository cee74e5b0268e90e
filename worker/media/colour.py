"""Pixels as sRGB, whatever colours a picture says that it means.

A picture may say so by an ICC profile, by code points of ITU-T H.273 (cICP in PNG, nclx in AVIF),
or by a gamma and primaries of its own (gAMA and cHRM in PNG). What is sRGB already, by what it does
and not by its name, stays as it is.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Floats = NDArray[np.float64]

SAME_LEVELS = 2  # of 255: a conversion that changes no colour by more is left out
ROWS = 512  # that are converted at once
D65 = (0.3127, 0.3290)
SDR_WHITE_NITS = 203.0  # ITU-R BT.2408: the white of a page beside HDR

# Chromaticities x, y of red, green, blue and white, by code point. ITU-T H.273, table 2.
PRIMARIES: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    4: ((0.670, 0.330), (0.210, 0.710), (0.140, 0.080), (0.310, 0.316)),
    5: ((0.640, 0.330), (0.290, 0.600), (0.150, 0.060), D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}
SRGB_PRIMARIES = PRIMARIES[1]


def _srgb_to_linear(value: Floats) -> Floats:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _linear_to_srgb(value: Floats) -> Floats:
    value = value.clip(0, 1)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def _pq_to_linear(value: Floats) -> Floats:
    """SMPTE ST 2084, with SDR's white as 1."""
    power = value ** (1 / 78.84375)
    ratio = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return np.asarray(10_000 / SDR_WHITE_NITS * ratio ** (1 / 0.1593017578125))


def _hlg_to_linear(value: Floats) -> Floats:
    """ARIB STD-B67 on a screen of 1,000 nits, with SDR's white as 1."""
    scene = np.where(value <= 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277)
                                                  + 0.28466892) / 12)  # fmt: skip
    return np.asarray(1000 / SDR_WHITE_NITS * scene**1.2)


# From a stored value in [0, 1] to light, by code point. ITU-T H.273, table 3. The curve of BT.709
# and its relatives (1, 6, 14, 15) is shown as sRGB's by everything that shows pictures.
TRANSFERS: dict[int, Callable[[Floats], Floats]] = {
    1: _srgb_to_linear,
    4: lambda value: value**2.2,
    5: lambda value: value**2.8,
    6: _srgb_to_linear,
    8: lambda value: value,
    13: _srgb_to_linear,
    14: _srgb_to_linear,
    15: _srgb_to_linear,
    16: _pq_to_linear,
    18: _hlg_to_linear,
}


@dataclass(frozen=True, slots=True)
class ColourSpace:
    """What the numbers of an RGB picture mean."""

    primaries: tuple[tuple[float, float], ...]
    to_linear: Callable[[Floats], Floats]


def from_code_points(primaries: int, transfer: int) -> ColourSpace | None:
    """The space of code points of ITU-T H.273; None where they say nothing that is known."""
    if transfer not in TRANSFERS and primaries not in PRIMARIES:
        return None
    return ColourSpace(
        PRIMARIES.get(primaries, SRGB_PRIMARIES), TRANSFERS.get(transfer, _srgb_to_linear)
    )


def from_gamma(gamma: float | None, chromaticity: tuple[float, ...] | None) -> ColourSpace | None:
    """The space of a PNG's gAMA (value = light ** gamma) and cHRM (white, red, green, blue)."""
    if gamma is not None and not 0.05 < gamma < 5:
        gamma = None
    if chromaticity is not None and not all(0 < value < 1 for value in chromaticity):
        chromaticity = None
    if gamma is None and chromaticity is None:
        return None
    primaries = SRGB_PRIMARIES
    if chromaticity is not None:
        white, *colours = zip(chromaticity[::2], chromaticity[1::2], strict=True)
        primaries = (*colours, white)
    if gamma is None or abs(gamma - 1 / 2.2) < 0.01:  # as editors without profiles write sRGB
        return ColourSpace(primaries, _srgb_to_linear)
    exponent = 1 / gamma
    return ColourSpace(primaries, lambda value: value**exponent)


def from_space(image: Image.Image, space: ColourSpace) -> Image.Image:
    """An RGB picture of that space in sRGB; the picture itself if it is sRGB already."""
    chart = _chart()
    return image if _changes_nothing(chart, _convert(chart, space)) else _convert(image, space)


def from_profile(image: Image.Image, content: bytes) -> Image.Image:
    """A picture of any mode in sRGB by its ICC profile; the picture itself if that is sRGB.

    A profile that cannot be read, or that is for pictures of another kind, says nothing.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(
            profile.profile.xcolor_space.strip()
        )
        if mode is None or (mode in ("CMYK", "LAB") and image.mode != mode):
            return image
        if mode == "RGB" and image.mode in ("CMYK", "LAB"):
            return image
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        chart = _chart().convert(mode) if mode in ("RGB", "L") else None
        if chart is not None:
            shown = ImageCms.applyTransform(chart, transform)
            if shown is not None and _changes_nothing(chart.convert("RGB"), shown):
                return image
        return ImageCms.applyTransform(image.convert(mode), transform) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _chart() -> Image.Image:
    """Colours from everywhere in the cube, (512, 1) pixels."""
    levels = np.linspace(0, 255, 8).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(cube.reshape(1, -1, 3))


def _changes_nothing(before: Image.Image, after: Image.Image) -> bool:
    difference = np.asarray(before).astype(int) - np.asarray(after.convert("RGB"))
    return bool(np.abs(difference).max() <= SAME_LEVELS)


def _convert(image: Image.Image, space: ColourSpace) -> Image.Image:
    pixels = np.asarray(image)  # (height, width, 3) uint8
    light = space.to_linear(np.arange(256) / 255)
    matrix = (np.linalg.inv(_to_xyz(SRGB_PRIMARIES)) @ _to_xyz(space.primaries)).T
    converted = np.empty_like(pixels)
    for start in range(0, len(pixels), ROWS):
        rows = slice(start, start + ROWS)
        converted[rows] = np.rint(255 * _linear_to_srgb(light[pixels[rows]] @ matrix))
    return Image.fromarray(converted)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> Floats:
    """The matrix from linear RGB to XYZ, its white moved to D65 (von Kries, in XYZ)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T  # (3, 4)
    rgb, white = columns[:, :3], columns[:, 3]
    x, y = D65
    adaptation = np.array([x / y, 1, (1 - x - y) / y]) / white
    return np.asarray(adaptation[:, None] * rgb * np.linalg.solve(rgb, white))
