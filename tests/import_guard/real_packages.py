"""Real releases from PyPI, unpacked into directories to put on a child's PYTHONPATH, and children.

PyPI's torchvision, torchaudio and xformers are CUDA builds, so beside a CPU build of torch they
are really broken; a working torchvision is made here from one of them.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "packages"

# In place of the compiled library: its operators' names, and a real nms in Python.
_EXTENSION = """
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
for name in (
    "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
    "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align",
    "deform_conv2d", "_deform_conv2d_backward", "box_iou_rotated",
):
    library.define(f"{name}(Tensor input) -> Tensor")  # registered against, never called


def _nms(dets, scores, iou_threshold):
    from torchvision.ops import box_iou

    overlaps = box_iou(dets, dets)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if all(overlaps[index, other] <= iou_threshold for other in kept):
            kept.append(index)
    return torch.tensor(kept)


library.impl("nms", _nms, "CPU")


def _has_ops():
    return True


def _assert_has_ops():
    pass


def _check_cuda_version():
    return -1  # built without CUDA


def _load_library(name):
    return True  # torchvision.io asks for its own, and warns without it
"""


def release(name: str, version: str) -> Path:
    """The directory with that release alone, downloaded once, whoever of the processes is first."""
    folder = CACHE / f"{name}-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        if not folder.is_dir():
            _download(name, version, folder)
    return folder


def _download(name: str, version: str, folder: Path) -> None:
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(wheels)]
    if (name, version) == ("torchvision", "0.16.2"):
        command += ["--python-version", "3.11"]  # the last it was built for; its Python runs on
    subprocess.run([*command, f"{name}=={version}"], check=True)
    (wheel,) = wheels.glob(f"{name}-{version}-*.whl")
    unfinished = CACHE / f"{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unfinished)
    unfinished.rename(folder)
    wheel.unlink()


def healthy_torchvision(directory: Path) -> Path:
    """The directory, with a torchvision 0.28.0 that works without CUDA."""
    shutil.copytree(release("torchvision", "0.28.0"), directory, dirs_exist_ok=True)
    (directory / "torchvision" / "_C.so").unlink()
    (directory / "torchvision" / "extension.py").write_text(_EXTENSION)
    return directory


def healthy_torchaudio(directory: Path) -> Path:
    """The directory, with a torchaudio 2.11.0 that works: without libraries it runs on torch's."""
    shutil.copytree(release("torchaudio", "2.11.0"), directory, dirs_exist_ok=True)
    for library in (directory / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    return directory


def replace_in(path: Path, old: str, new: str) -> None:
    """Changes one place in one file."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class Child:
    """A finished Python process."""

    returncode: int
    stdout: str
    stderr: str

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """What it printed, one JSON object a line."""
        assert self.returncode == 0, self.stderr
        return [json.loads(line) for line in self.stdout.splitlines()]


def environment(*packages: Path, **settings: str) -> dict[str, str]:
    """This process's environment with the packages in front of what is installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "IMPORT_GUARD"}
    python_path = os.pathsep.join(map(str, [*packages, REPOSITORY]))
    return {**inherited, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **settings}


def run_python(*arguments: str, packages: tuple[Path, ...] = (), **settings: str) -> Child:
    """What became of `python <arguments>` with these packages and settings."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(*packages, **settings),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Child(done.returncode, done.stdout, done.stderr)
