"""The faces of a portrait, of which one speaks or several: their boxes, by one of two detectors.

The published checkpoint comes with a detector in TorchScript. Without it dlib's answers, whose
weights are in its package. Both give boxes (x, y, width, height) in pixels, from the hairline to
the chin. docs/decisions/faces.md says what each was measured with.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from worker.generation import torchscript
from worker.shapes import Box, holds_centre

SHORT_SIDE = 416  # px, of the picture that the TorchScript detector gets
STRIDES = (8, 16, 32)  # px a cell of its three grids
MIN_SCORE = 0.5
MAX_OVERLAP = 0.45  # intersection over union above which two boxes are the same face

LONG_SIDE = 1000  # px, of the picture that dlib gets: its faces have at least 80
MAX_ENLARGEMENT = 2.0
MIRRORED_BORDER = 0.2  # of the short side, around the picture: completes a face that is cut
MIN_INSIDE = 0.4  # of a face's area, that lies in the picture and not in its mirror image
# What dlib's square leaves out above and below, of its height: medians over 54 faces, against boxes
# as the published detector's training data (WIDER FACE) has them.
FOREHEAD, CHIN = 0.18, 0.04


class TorchScriptFaceDetector(ModelMixin):
    """The checkpoint's own detector, `detface.pt`, a YOLOv5 for faces.

    It is a diffusers model only for `save_pretrained` and `from_pretrained` of the pipeline.
    """

    FILE_NAME = "detface.pt"

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script

    @classmethod
    def from_pretrained(cls, directory: str | Path, **_: Any) -> Self:
        """The detector in the directory; it stays float32, whatever the others are loaded as.

        Raises:
            NoArithmeticError: the file is a program that does more than a detector has to.
        """
        path = Path(directory) / cls.FILE_NAME
        with warnings.catch_warnings():  # TorchScript is old, but it is what was published
            warnings.simplefilter("ignore", DeprecationWarning)
            return cls(torchscript.load(path)).eval()

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Writes the TorchScript file."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.script.save(str(path / self.FILE_NAME))

    def forward(
        self,
        pixels: Tensor,  # (1, 3, H, W), BGR in [0, 1], sides multiples of 32
    ) -> Tensor:  # (N, 16): centre x, y, width, height, score, five landmarks, class score
        """Candidates, in pixels of the input."""
        grids = [_grid(pixels, stride) for stride in STRIDES]
        takes_grids = len(self.script.forward.schema.arguments) > 2  # beside self and the picture
        forward = self.script.forward  # what was examined; a call would run hooks as well
        candidates = forward(pixels, grids) if takes_grids else forward(pixels)
        return candidates[0]

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Box]:
        """Boxes of all faces in the picture."""
        scale = SHORT_SIDE / min(image.size)
        width, height = (-(-int(side * scale) // 32) * 32 for side in image.size)
        bgr = torch.from_numpy(np.array(image)).flip(2).permute(2, 0, 1)[None]  # (1, 3, h, w)
        pixels = interpolate(bgr / 255, size=(height, width), mode="bilinear")
        candidates = self(pixels.to(self.device, self.dtype)).float().cpu()

        scores = candidates[:, 4] * candidates[:, 15]
        likely = (candidates[:, 4] > MIN_SCORE) & (scores > MIN_SCORE)
        corners = _to_corners(candidates[likely, :4])
        kept = corners[non_maximum_suppression(corners, scores[likely], MAX_OVERLAP)]
        across, down = image.width / width, image.height / height
        kept = kept * torch.tensor([across, down, across, down])
        return [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in kept.tolist()]


def _grid(pixels: Tensor, stride: int) -> Tensor:  # (1, 1, H/stride, W/stride, 2)
    """Column and row of each cell."""
    rows, columns = (torch.arange(side // stride) for side in pixels.shape[2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=2)[None, None].to(pixels)


def _to_corners(boxes: Tensor) -> Tensor:
    """(N, 4) centre and size to left, top, right, bottom."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def non_maximum_suppression(
    corners: Tensor,  # (N, 4)
    scores: Tensor,  # (N,)
    max_overlap: float,
) -> Tensor:  # (kept,) indices, best first
    """Boxes that overlap no better one by more than `max_overlap` of their union."""
    left_top = torch.maximum(corners[:, None, :2], corners[:, :2])
    right_bottom = torch.minimum(corners[:, None, 2:], corners[:, 2:])
    shared = (right_bottom - left_top).clamp(min=0).prod(dim=2)  # (N, N)
    areas = (corners[:, 2:] - corners[:, :2]).prod(dim=1)
    overlaps = shared / (areas[:, None] + areas - shared)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(overlaps[index, better] <= max_overlap for better in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long)


def detect_by_dlib(image: Image.Image) -> list[Box]:
    """Boxes of all faces, by dlib's detector, whose weights come in its package.

    Source: Dalal and Triggs, Histograms of oriented gradients for human detection, CVPR 2005; dlib
    slides five of them over the picture, for faces that look ahead, to a side, or lean over.
    """
    scale = min(LONG_SIDE / max(image.size), MAX_ENLARGEMENT)
    width, height = (max(round(side * scale), 1) for side in image.size)
    pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    border = round(MIRRORED_BORDER * min(width, height))
    pixels = np.pad(pixels, ((border, border), (border, border), (0, 0)), mode="symmetric")
    boxes = []
    for found in _dlib_detector()(pixels, 0):
        left, right = found.left() - border, found.right() + 1 - border
        top, bottom = found.top() - border, found.bottom() + 1 - border
        inside = _shared(left, right, width) * _shared(top, bottom, height)
        if inside >= MIN_INSIDE * found.area():
            top -= round(FOREHEAD * found.height())
            bottom += round(CHIN * found.height())
            boxes.append(tuple(v / scale for v in (left, top, right - left, bottom - top)))
    return boxes


@functools.cache  # making it takes several times as long as looking for faces
def _dlib_detector() -> Any:
    from dlib import get_frontal_face_detector  # 11 MB, needed only without the checkpoint's

    return get_frontal_face_detector()


def _shared(start: float, end: float, limit: float) -> float:
    """How much of the stretch lies between 0 and the limit."""
    return max(min(end, limit) - max(start, 0), 0)


def find_faces(image: Image.Image, detector: TorchScriptFaceDetector | None) -> list[Box]:
    """The boxes of all faces in the picture (RGB), from left to right."""
    boxes = detector.detect(image) if detector else detect_by_dlib(image)
    return sorted(boxes, key=lambda box: (box[0] + box[2] / 2, box))


def faces_of_others(faces: Sequence[Box], speaking: Sequence[Box]) -> list[Box]:
    """Those of the faces that are none of the speaking ones: no centre of two lies in the other."""
    return [
        face
        for face in faces
        if not any(holds_centre(face, own) or holds_centre(own, face) for own in speaking)
    ]


def largest(faces: Sequence[Box]) -> Box | None:
    """The largest of the faces, None if there is none."""
    return max(faces, key=lambda box: box[2] * box[3], default=None)


def largest_face(image: Image.Image, detector: TorchScriptFaceDetector | None) -> Box | None:
    """The box of the largest face in the picture (RGB), None if there is none."""
    return largest(find_faces(image, detector))
