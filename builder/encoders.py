"""The published VAE and encoders, each to a folder that diffusers or transformers loads.

The encoders keep the names of their weights, which every version of transformers reads; but not
LLaVA in 8 bits, which is a class of ours. The parts of them that nothing uses are left out.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors import safe_open
from torch import Size, Tensor
from transformers import (
    AutoConfig,
    CLIPTextModel,
    LlavaModel,
    PretrainedConfig,
    PreTrainedModel,
    WhisperModel,
)

from builder.checks import require_shapes
from builder.shards import PlannedTensors, copy_file, write_json, write_shards
from worker.model.encoders import Float8LlavaModel, canonical_name
from worker.model.linear import quantize

VAE_SETTINGS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "act_fn": "act_fn",
    "norm_num_groups": "norm_num_groups",
    "scaling_factor": "scaling_factor",
    "spatial_compression_ratio": "spatial_compression_ratio",
    "time_compression_ratio": "temporal_compression_ratio",
    "mid_block_add_attention": "mid_block_add_attention",
}
UNUSED_LLAVA_LAYERS = 2  # the transformer gets the states before the last two, hidden_states[-3]
BUFFERS = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$")  # saved by older versions
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def convert_vae(source: Path, target: Path) -> None:
    """Writes `vae/`; its weights have the same names.

    Raises:
        ValueError: a weight that is unknown, missing or of the wrong shape, by name; a VAE whose
            middle block is not causal, as diffusers' always is.
    """
    settings = json.loads((source / "config.json").read_text())
    if settings.get("mid_block_causal_attn") is not True:
        raise ValueError(f"{source / 'config.json'} must say mid_block_causal_attn: true")
    config = {VAE_SETTINGS[name]: settings[name] for name in VAE_SETTINGS.keys() & settings.keys()}
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo(**config)
    weights = torch.load(
        source / "pytorch_model.pt", map_location="cpu", mmap=True, weights_only=True
    )
    weights = weights.get("state_dict", weights)
    if any(name.startswith("vae.") for name in weights):
        weights = {
            name.removeprefix("vae."): weight
            for name, weight in weights.items()
            if name.startswith("vae.")
        }
    require_shapes(f"the VAE in {source}", _shapes(model.state_dict()), _shapes(weights))
    planned = [
        PlannedTensors({name: (weight.shape, weight.dtype)}, partial(_clone, name, weight))
        for name, weight in weights.items()
    ]
    write_shards(target / "vae", "diffusion_pytorch_model", planned)
    model.save_config(target / "vae")


def convert_llava(
    source: Path, target: Path, dtype: torch.dtype | None, *, float8: bool = False
) -> None:
    """Writes `text_encoder/`, without the layers behind the states in use, and `tokenizer/`.

    Args:
        dtype: what its weights are cast to; None keeps each one's.
        float8: keeps the linear layers of its decoder in 8 bits.
    """
    config = AutoConfig.from_pretrained(source)
    config.text_config.num_hidden_layers -= UNUSED_LLAVA_LAYERS
    kept = config.text_config.num_hidden_layers
    unused_layers = "|".join(str(kept + i) for i in range(UNUSED_LLAVA_LAYERS))
    unused = re.compile(rf"language_model\.(lm_head\.|model\.layers\.({unused_layers})\.)")
    model_class = Float8LlavaModel if float8 else LlavaModel
    _convert_encoder(source, target / "text_encoder", model_class, config, unused, dtype)

    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    # The Llama class of transformers 5 would rebuild the tokenizer, and differently.
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(target / "tokenizer" / "tokenizer_config.json", tokenizer_config)
    _copy_present(source, target / "tokenizer", ["tokenizer.json", "special_tokens_map.json"])


def convert_clip(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Writes `text_encoder_2/`, the text half of CLIP, and `tokenizer_2/`."""
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "text_config", config)
    unused = re.compile(r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$")
    _convert_encoder(source, target / "text_encoder_2", CLIPTextModel, config, unused, dtype)
    files = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
    _copy_present(source, target / "tokenizer_2", [*files, "tokenizer.json"])


def convert_whisper(source: Path, target: Path) -> None:
    """Writes `audio_encoder/`, a Whisper without decoder layers, and `feature_extractor/`."""
    config = AutoConfig.from_pretrained(source)
    config.decoder_layers = 0
    unused = re.compile(r"(model\.)?decoder\.layers\.|proj_out\.")
    _convert_encoder(source, target / "audio_encoder", WhisperModel, config, unused, None)
    copy_file(source / "preprocessor_config.json", target / "feature_extractor")


def _convert_encoder(
    source: Path,
    target: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    unused: re.Pattern[str],
    dtype: torch.dtype | None,
) -> None:
    """Writes the weights that the model has, and the config; a dtype of None keeps each one's.

    A weight for which the model has a scale is written in 8 bits, the scale beside it.
    """
    with torch.device("meta"):
        model = model_class(config)
    shapes = _shapes(model.state_dict())
    names = {canonical_name(name): name for name in shapes}
    found: dict[str, Size] = {}
    planned = []
    for path in _weight_files(source):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if unused.match(name) or BUFFERS.search(name):
                    continue
                stored = file.get_slice(name)
                shape = Size(stored.get_shape())
                found[canonical_name(name)] = shape
                ours = names.get(canonical_name(name), name)
                scale_name = f"{ours}_scale"
                if scale_name in shapes:
                    scale_shape = found[canonical_name(scale_name)] = Size([shape[0], 1])
                    specs = {ours: (shape, torch.uint8), scale_name: (scale_shape, torch.bfloat16)}
                    make = partial(_read_float8, path, name, ours)
                else:
                    new_dtype = dtype or DTYPES[stored.get_dtype()]
                    new_name = ours if issubclass(model_class, Float8LlavaModel) else name
                    specs = {new_name: (shape, new_dtype)}
                    make = partial(_read, path, name, new_name, new_dtype)
                planned.append(PlannedTensors(specs, make))
    expected = {canonical_name(name): shape for name, shape in shapes.items()}
    require_shapes(f"the encoder in {source}", expected, found)
    write_shards(target, "model", planned)
    if dtype is not None:
        config.dtype = dtype
    config.architectures = [model_class.__name__]
    config.save_pretrained(target)


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if not index.is_file():
        return [source / "model.safetensors"]
    content = json.loads(index.read_text())
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise ValueError(f"{index} names something else than files beside it")
    paths = [source / name for name in sorted(set(names))]
    if any(path.resolve().parent != source.resolve() for path in paths):
        raise ValueError(f"{index} names a link that leads out of {source}: put the file there")
    return paths


def _read(path: Path, name: str, new_name: str, dtype: torch.dtype) -> Mapping[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {new_name: file.get_tensor(name).to(dtype)}


def _read_float8(path: Path, name: str, new_name: str) -> Mapping[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        bits, scale = quantize(file.get_tensor(name))
    return {new_name: bits, f"{new_name}_scale": scale}


def _clone(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    return {name: weight.clone()}


def _shapes(weights: Mapping[str, Any]) -> dict[str, Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _copy_present(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        if (source / name).is_file():
            copy_file(source / name, target)
