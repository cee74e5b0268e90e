"""The toy checkpoint as the hub publishes it, and the process that bakes it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.builder.hub_server import COMMIT, HubServer
from tests.support.golden_weights import build_toy_checkpoint

ROOT = Path(__file__).parents[2]
AGREEMENT = b"TENCENT HUNYUAN COMMUNITY LICENSE AGREEMENT\n"
BAKE = "from builder import bake; bake.main()"


class OneFace(torch.nn.Module):
    """A detector that is called as the published one is, and sees a face in every picture."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.nn.Parameter(torch.tensor([208.0, 208.0]))

    def forward(self, pixels: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
        face = torch.zeros(1, 1, 16)
        face[0, 0, :2] = self.centre
        face[0, 0, 2:4] = 200.0
        face[0, 0, 4] = 0.9
        face[0, 0, 15] = 1.0
        return face


def toy_repository(root: Path) -> dict[str, bytes]:
    """The published files by path, with the plain and the 8-bit transformer; `root` is scratch."""
    ckpts = build_toy_checkpoint(root, float8=True)
    _spread_over_four_shards(ckpts / "llava_llama_image")
    (ckpts / "det_align").mkdir()
    with warnings.catch_warnings():  # TorchScript is what is published
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(OneFace()).save(str(ckpts / "det_align" / "detface.pt"))
    (ckpts / "stable_syncnet.pt").write_bytes(b"nothing that the worker uses")
    (root / "LICENSE").write_bytes(AGREEMENT)
    paths = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def _spread_over_four_shards(directory: Path) -> None:
    """The toy has two shards and the published model four."""
    old = sorted(directory.glob("model-*.safetensors"))
    tensors = {name: tensor for path in old for name, tensor in load_file(path).items()}
    for path in old:
        path.unlink()
    weight_map: dict[str, str] = {}
    for number in range(1, 5):
        shard = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 4]}
        name = f"model-{number:05}-of-00004.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def arguments(variant: str, target: Path, code: str = BAKE) -> list[str]:
    """The command that bakes; `code` may spoil something first."""
    command = [sys.executable, "-c", code, "--variant", variant, "--revision", COMMIT]
    return [*command, "--target", str(target)]


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """This process's environment, with the hub in the place of the real one."""
    return {**os.environ, "HF_HOME": str(home / "home"), **hub.environment}


def start_bake(
    hub: HubServer, variant: str, target: Path, code: str = BAKE
) -> subprocess.Popen[str]:
    """A bake that runs; its log is its standard error."""
    return subprocess.Popen(
        arguments(variant, target, code),
        cwd=ROOT,
        env=environment(hub, target.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
