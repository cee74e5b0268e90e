"""A video between two denoising steps, and the file that another worker goes on from.

Only steps that run all blocks begin from latents alone; a cached one needs the tokens of a computed
step too, which are gigabytes. So a state is taken where a computed step follows, or none.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
# What decides the latents. Of the rest of the worker a state knows the results: its inputs.
CODE = (
    "worker/generation",
    "worker/model",
    "worker/shapes.py",
    "avatar_client/contract/presets.py",
)
SUFFIXES = (".py", ".cu")
PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class DenoisingState:
    """What the steps that are left need beside the conditioning. Its tensors are never changed."""

    step: int  # finished ones
    latents: Tensor  # (1, C, T, h, w), circular, float32
    reference_latents: Tensor  # (1, C, 33, h, w) float32
    random_state: Tensor  # of the generator that drew the noise; uint8
    computed: torch.Event | None = None  # of a GPU: the latents are there

    @classmethod
    def of(
        cls, step: int, latents: Tensor, reference_latents: Tensor, generator: torch.Generator
    ) -> "DenoisingState":
        """The state after `step` steps, as far as the GPU's queue has them: waits for nothing."""
        computed = None
        if latents.device.type != "cpu":
            computed = torch.Event(latents.device)
            computed.record()
        return cls(
            step=step,
            latents=latents,
            reference_latents=reference_latents,
            random_state=generator.get_state(),
            computed=computed,
        )

    @property
    def num_bytes(self) -> int:
        """What it takes in a file, nearly."""
        return self.latents.nbytes + self.reference_latents.nbytes

    def restored(
        self, like: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents and reference latents where the drawn ones are, and the generator set on.

        Raises:
            ValueError: they are of another shape.
        """
        own = (self.latents, self.reference_latents)
        for name, tensor, drawn in zip(("latents", "reference latents"), own, like, strict=True):
            if tensor.shape != drawn.shape:
                raise ValueError(f"the state's {name} are {tuple(tensor.shape)}, not {drawn.shape}")
        generator.set_state(self.random_state)
        latents, reference_latents = (tensor.to(like[0]) for tensor in own)
        return latents, reference_latents

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        """Writes it as safetensors with these facts beside, once the GPU has computed it.

        For a thread beside the one that generates: the copy has a stream of its own, so that it
        passes by what the GPU computes.

        Raises:
            ValueError: it holds values that are no numbers.
        """
        latents = self._on_host(self.latents)
        if not latents.isfinite().all():
            raise ValueError("the model computed no numbers")
        tensors = {
            "latents": latents,
            "reference_latents": self._on_host(self.reference_latents),
            "random_state": self.random_state,
        }
        safetensors.torch.save_file(tensors, path, dict(facts))

    def _on_host(self, tensor: Tensor) -> Tensor:
        if self.computed is None:
            return tensor.contiguous()
        stream = torch.Stream(tensor.device)
        stream.wait_event(self.computed)
        with stream:
            copy = tensor.to("cpu").contiguous()
        stream.synchronize()
        return copy

    @classmethod
    def load(cls, content: bytes, step: int) -> "DenoisingState":
        """The state after so many steps, on the CPU, from what `save` wrote.

        Raises:
            safetensors.SafetensorError, KeyError: it did not write that.
        """
        tensors = safetensors.torch.load(content)
        return cls(
            step=step,
            latents=tensors["latents"],
            reference_latents=tensors["reference_latents"],
            random_state=tensors["random_state"],
        )


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What computes a video."""

    weights: str  # a fingerprint, as is `code`
    code: str
    arithmetic: str  # in words: the kind of device, number formats, what is left out
    gpu: str  # its name


@cache
def code_fingerprint() -> str:
    """Another one wherever another code might compute other latents: of ours, or of a package's."""
    digest = hashlib.sha256()
    for place in map(ROOT.joinpath, CODE):
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.suffix in SUFFIXES:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    for name in PACKAGES:
        digest.update(f"{name} {metadata.version(name)}\0".encode())
    return digest.hexdigest()
