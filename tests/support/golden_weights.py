"""The weights behind the reference tensors, made again instead of stored.

A value depends only on a seed and on the parameter's published name and shape, so the reference
and our tests have the same ones. `build_toy_checkpoint` writes a complete small checkpoint in the
published layout.
"""

import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
FLOAT8_BLOCKS = ("double_blocks.", "single_blocks.")


def weight(name: str, shape: Sequence[int], seed: int, gain: float) -> Tensor:
    """The float32 value of the parameter with this published name."""
    name_seed = (zlib.crc32(name.encode()) ^ (seed * 2654435761)) & 0x7FFFFFFF
    generator = torch.Generator("cpu").manual_seed(name_seed)
    normal = torch.randn(tuple(shape), generator=generator)
    if len(shape) >= 2:
        return normal * gain / math.sqrt(math.prod(shape[1:]))
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * normal
    return 0.05 * normal


def make_weights(
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    gain: float,
    checksums: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Tensor]:
    """All parameters, after a look at the sums of some: a CPU may draw other last bits."""
    weights = {name: weight(name, shape, seed, gain) for name, shape in shapes.items()}
    for name, expected in (checksums or {}).items():
        found = weights[name].double()
        assert math.isclose(found.sum().item(), expected["sum"], rel_tol=1e-9, abs_tol=1e-9), name
        assert math.isclose(found.abs().sum().item(), expected["abs_sum"], rel_tol=1e-9), name
    return weights


def load_case(golden: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `GOLDEN.json` says, and the tensors that it speaks of."""
    described = json.loads((GOLDENS / f"{golden}.json").read_text())
    return described, load_file(GOLDENS / f"{golden}.safetensors")


def build_toy_checkpoint(directory: Path, *, plain: bool = True, float8: bool = False) -> Path:
    """The `ckpts` directory of a small checkpoint, with the asked for weights of the transformer.

    Has no face detector, as that is not a network of weights alone.
    """
    described = json.loads((GOLDENS / "toy_checkpoint.json").read_text())
    ckpts = directory / "ckpts"
    shutil.copytree(GOLDENS / "toy_checkpoint" / "ckpts", ckpts)
    for path, part in described["parts"].items():
        weights = make_weights(part["shapes"], part["seed"], part["gain"], part.get("checksums"))
        weights = {
            name: tensor.to(getattr(torch, part["dtype"])) for name, tensor in weights.items()
        }
        if path.endswith(".safetensors"):
            save_file(weights, ckpts / path, metadata={"format": "pt"})
        elif path.endswith("vae/pytorch_model.pt"):
            torch.save(weights, ckpts / path)
        else:
            _save_transformer(ckpts / path, weights, plain, float8)
    return ckpts


def _save_transformer(path: Path, weights: Mapping[str, Tensor], plain: bool, float8: bool) -> None:
    if plain:
        torch.save({"module": dict(weights)}, path)
    if float8:
        values, scales = to_float8(weights)
        torch.save({"module": values}, path.with_name(f"{path.stem}_fp8.pt"))
        torch.save({"module": scales}, path.with_name(f"{path.stem}_fp8_map.pt"))


def to_float8(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published 8-bit form: the linear layers of the blocks hold e4m3 values, here in
    bfloat16, and each of these layers has a scale."""
    values, scales = dict(weights), {}
    for name, tensor in weights.items():
        if name.startswith(FLOAT8_BLOCKS) and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            scales[name.removesuffix(".weight")] = scale
            values[name] = (tensor / scale).to(torch.float8_e4m3fn).to(torch.bfloat16)
    return values, scales
