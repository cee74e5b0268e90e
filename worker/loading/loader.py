"""A model directory into components whose weights are on their device.

Owns what is loaded, and in what order. Networks are made without storage, and then filled with what
their files hold (`worker.loading.transfer`).
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlavaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.initialization import no_init_weights

from worker.loading import disk
from worker.loading.index import stored_tensors, weight_files
from worker.loading.layout import aligned, dtype_in_memory
from worker.loading.offload import NetworkSize
from worker.loading.report import ComponentLoad, LoadReport
from worker.loading.transfer import Place, Reading, Transfer
from worker.model.encoders import Float8LlavaModel
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

NetworkClass = type[PreTrainedModel] | type[ModelMixin]

NETWORKS: dict[str, NetworkClass] = {  # the longest to read first: others are prepared meanwhile
    "transformer": HunyuanVideoAvatarTransformer3DModel,
    "text_encoder": LlavaModel,
    "audio_encoder": WhisperModel,
    "text_encoder_2": CLIPTextModel,
    "vae": AutoencoderKLHunyuanVideo,
}
OTHERS: dict[str, Any] = {
    "feature_extractor": WhisperFeatureExtractor,
    "tokenizer": PreTrainedTokenizerFast,
    "tokenizer_2": CLIPTokenizer,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
DISK_SECONDS = 0.3  # for how long the disk's speed is measured
PROBE_BLOCK_BYTES = 2**23  # and in what pieces: a slow disk has to end those that it has begun

_IN_A_BLOCK = re.compile(r"(.*?\.\d+)\.")  # the key of a tensor that belongs to a block


def load(
    model_dir: Path,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    placement: Mapping[str, Place] | None = None,
    reading: Reading | None = None,
    load_others: Callable[[], Mapping[str, Any]] = dict,
) -> tuple[dict[str, Any], LoadReport]:
    """The pipeline's components by name, their weights bit for bit as by `from_pretrained`.

    All parameters and buffers of a block (see `layout.blocks`) are in one storage of the block's
    own, each at a multiple of 256 bytes; what a network has outside its blocks is in one more. On
    the host the storages are pinned if the device is a GPU and the system allows it.

    Args:
        device: where the weights go. The CPU is right for components that take turns on the GPU;
            their memory is not pinned.
        dtypes: what floating-point weights are cast to, by component, and "default".
        placement: which components stay on the host, by component, and "default". None: all go to
            the device.
        load_others: gives components that neither transformers nor diffusers loads. It is called
            while the weights are being read.

    Raises:
        OSError: a file is missing, or ends before its last tensor does.
        ValueError: a tensor that is unknown, missing or of another shape or kind, by file and key.
    """
    reading = reading or Reading()
    placement = placement or {"default": "device"}
    with _disk_probe(model_dir, reading) as disk_speed:
        # Both hold the interpreter, the tokenizer alone for 0.26 s; that must stop no reading.
        others = {name: each.from_pretrained(model_dir / name) for name, each in OTHERS.items()}
        networks = {
            name: _without_storage(network_class, model_dir / name, _dtype(dtypes, name))
            for name, network_class in NETWORKS.items()
        }
        disk_bytes_per_second = disk_speed()
    started = time.monotonic()
    with Transfer(device, reading) as transfer:
        for name, network in networks.items():
            place = placement.get(name, placement["default"])
            transfer.fill(network, model_dir / name, _dtype(dtypes, name), place)
        others |= load_others()
        blocks = transfer.finish()
    components = tuple(
        ComponentLoad(
            name,
            num_bytes=sum(block.num_bytes for block in own),
            ready_seconds=max(block.finished_at for block in own) - started,
        )
        for name, own in zip(networks, blocks, strict=True)
    )
    return networks | others, LoadReport(
        components=components,
        num_bytes=sum(component.num_bytes for component in components),
        cached_bytes=sum(block.num_bytes for own in blocks for block in own if block.was_cached),
        seconds=time.monotonic() - started,
        disk_bytes_per_second=disk_bytes_per_second,
    )


def component_dtypes(device: torch.device, model_dir: Path) -> dict[str, torch.dtype]:
    """The dtypes in which the components run there, by component, and "default".

    An autoencoder whose configuration says `force_upcast`, as diffusers' do, overflows in float16.

    Raises:
        OSError, ValueError: its configuration cannot be read.
    """
    if device.type == "cpu":
        return {"default": torch.float32}
    # as the reference runs: the audio encoder in float32, the denoiser in bfloat16
    dtypes = {
        "transformer": torch.bfloat16,
        "audio_encoder": torch.float32,
        "default": torch.float16,
    }
    if json.loads((model_dir / "vae" / "config.json").read_text()).get("force_upcast"):
        dtypes["vae"] = torch.float32
    return dtypes


def network_sizes(model_dir: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, NetworkSize]:
    """What each network will take in memory.

    Raises:
        OSError, ValueError: a file of weights cannot be read.
    """
    sizes = {}
    for name in NETWORKS:
        num_bytes: dict[str | None, int] = {}
        for path in weight_files(model_dir / name):
            for tensor in stored_tensors(path):
                block = _IN_A_BLOCK.match(tensor.key)
                key = block and block[1]
                dtype = dtype_in_memory(tensor, _dtype(dtypes, name))
                own = aligned(tensor.num_values * dtype.itemsize)
                num_bytes[key] = num_bytes.get(key, 0) + own
        outside = num_bytes.pop(None, 0)
        sizes[name] = NetworkSize(tuple(num_bytes.values()), outside)
    return sizes


def _dtype(dtypes: Mapping[str, torch.dtype], name: str) -> torch.dtype:
    return dtypes.get(name, dtypes["default"])


def _disk_probe(
    model_dir: Path, reading: Reading
) -> AbstractContextManager[Callable[[], float | None]]:
    """Measures the disk in the model's largest file; None where there is too little to read."""
    paths = (path for name in NETWORKS for path in weight_files(model_dir / name))
    path = max(paths, key=lambda path: path.stat().st_size)
    if path.stat().st_size < reading.num_threads * PROBE_BLOCK_BYTES:
        return nullcontext(lambda: None)
    return disk.probe(path, reading.num_threads, PROBE_BLOCK_BYTES, DISK_SECONDS)


def _without_storage(network_class: NetworkClass, directory: Path, dtype: torch.dtype) -> nn.Module:
    """The network as its config describes it; its parameters are on the meta device."""
    if issubclass(network_class, PreTrainedModel):
        config = network_class.config_class.from_pretrained(directory)
        if config.architectures == [Float8LlavaModel.__name__]:
            network_class = Float8LlavaModel
        # Its buffers are in no file: they are made here, for real.
        with init_empty_weights(), no_init_weights():
            return network_class._from_config(config, dtype=dtype).eval()
    with torch.device("meta"), no_init_weights():  # it has no buffers
        config = network_class.load_config(directory)
        config.pop("force_upcast", None)  # a word to `component_dtypes`, no class's parameter
        return network_class.from_config(config).eval()
