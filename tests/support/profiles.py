"""ICC profiles and the colours that they mean, by arithmetic that knows nothing of littlecms."""

import struct

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
D50 = np.array([0.9642, 1.0, 0.8249])
D65 = np.array([0.95047, 1.0, 1.08883])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
PRIMARIES = {  # x, y of red, green, blue; their white is D65
    "srgb": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "adobe": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
}


def to_xyz(space: str) -> Floats:
    """The matrix from linear RGB to XYZ under D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[space]]).T
    return np.asarray(columns * np.linalg.solve(columns, D65))


def encode_srgb(light: Floats) -> Floats:
    """Light in [0, 1] as values of sRGB, 0 to 255."""
    light = light.clip(0, 1)
    low = light <= 0.0031308
    return np.where(low, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055) * 255


def shown(pixels: NDArray[np.uint8], space: str, gamma: float) -> Floats:
    """What pixels (..., 3) of a space with a power curve look like in sRGB, 0 to 255."""
    light = (pixels / 255.0) ** gamma
    return encode_srgb(light @ (np.linalg.inv(to_xyz("srgb")) @ to_xyz(space)).T)


def rgb_profile(space: str, gamma: float, description: str = "made by a test") -> bytes:
    """A matrix profile."""
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD
    columns = (adapt @ to_xyz(space)).T
    tags = {b"wtpt": _xyz(D50)}
    tags |= {
        name: _xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"RGB ", tags, description)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey pictures."""
    return _profile(b"GRAY", {b"wtpt": _xyz(D50), b"kTRC": _curve(gamma)}, "grey by a test")


def _xyz(value: Floats) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(part * 65536)) for part in value)


def _curve(gamma: float) -> bytes:
    return b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", round(gamma * 65536))


def _profile(kind: bytes, tags: dict[bytes, bytes], description: str) -> bytes:
    text = description.encode("utf-16-be")
    head = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS"
    tags = {b"desc": head + struct.pack(">II", len(text), 28) + text, **tags}
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4s4s4s4s4s12s4s4sI4s4sQI12s4s44s",
        offset + len(body), b"test", b"\x04\x20\0\0", b"mntr", kind, b"XYZ ",
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp", b"APPL", 0, b"\0" * 4, b"\0" * 4, 0, 0,
        b"".join(struct.pack(">i", round(part * 65536)) for part in D50), b"\0" * 4, b"\0" * 44,
    )  # fmt: skip
    return header + table + body
