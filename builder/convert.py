"""Turns the published checkpoint into a directory that `HunyuanVideoAvatarPipeline` loads.

    python -m builder.convert --source CKPTS_DIR --target MODEL_DIR [--dtype keep|bf16|fp8]

The one place that knows the upstream names, of the files and of the transformer's weights. Every
weight found must be known and every weight needed must be there, in its shape; what does not fit
is named in the error. An interrupted run is finished by the same command.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Size, Tensor

from builder.checks import require_names, require_shapes
from builder.encoders import convert_clip, convert_llava, convert_vae, convert_whisper
from builder.shards import PlannedTensors, copy_file, write_json, write_shards
from worker.model.kernels import FLOAT8
from worker.model.linear import dequantize, quantize
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

logger = logging.getLogger(__name__)


# Groups of modules: the published prefix, our prefix, and published name: our name. A tuple says
# that the rows are split among several modules of ours, in this order. {i} counts from 0.
TRANSFORMER_TABLE: tuple[tuple[str, str, dict[str, str | tuple[str, ...]]], ...] = (
    (
        "",
        "",
        {
            "img_in.proj": "x_embedder.proj",
            "ref_in.proj": "ref_embedder.proj",
            "before_proj": "ref_proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "motion_exp.mlp.0": "motion_exp_embedder.linear_1",
            "motion_exp.mlp.2": "motion_exp_embedder.linear_2",
            "motion_pose.mlp.0": "motion_pose_embedder.linear_1",
            "motion_pose.mlp.2": "motion_pose_embedder.linear_2",
            "fps_proj.mlp.0": "fps_embedder.linear_1",
            "fps_proj.mlp.2": "fps_embedder.linear_2",
            "audio_proj.proj1": "audio_proj.proj1",
            "audio_proj.proj2": "audio_proj.proj2",
            "audio_proj.proj3": "audio_proj.proj3",
            "audio_proj.norm": "audio_proj.norm",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
    ),
    (
        "txt_in.",
        "context_embedder.",
        {
            "input_embedder": "proj_in",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "c_embedder.linear_1": "time_text_embed.text_embedder.linear_1",
            "c_embedder.linear_2": "time_text_embed.text_embedder.linear_2",
        },
    ),
    (
        "txt_in.individual_token_refiner.blocks.{i}.",
        "context_embedder.token_refiner.refiner_blocks.{i}.",
        {
            "norm1": "norm1",
            "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "self_attn_proj": "attn.to_out.0",
            "norm2": "norm2",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
    (
        "double_blocks.{i}.",
        "transformer_blocks.{i}.",
        {
            "img_mod.linear": "norm1.linear",
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "img_attn_proj": "attn.to_out.0",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mod.linear": "norm1_context.linear",
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
        },
    ),
    (
        "single_blocks.{i}.",
        "single_transformer_blocks.{i}.",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": "proj_out",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
            "modulation.linear": "norm.linear",
        },
    ),
    (
        "audio_adapter_blocks.{i}.",
        "transformer_blocks.{odd}.audio_adapter.",  # odd = 2i + 1: every second block has one
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "to_q": "to_q",
            "to_kv": "to_kv",
            "to_out": "to_out",
        },
    ),
)
SWAPPED = ("final_layer.adaLN_modulation.1",)  # published as [shift; scale], ours [scale; shift]
FLOAT8_BLOCKS = ("double_blocks.", "single_blocks.")  # where the 8-bit checkpoint has 8 bits
STORED_ADAPTERS = 10  # the published format has ten, and a smaller transformer uses the first few

# The settings that `config.json` beside the weights may hold, and ours; the published transformer
# comes without that file and has our defaults.
TRANSFORMER_SETTINGS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_heads": "num_attention_heads",
    "depth_double_blocks": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "refiner_depth": "num_refiner_layers",
    "mlp_width_ratio": "mlp_ratio",
    "text_states_dim": "text_embed_dim",
    "text_states_dim_2": "pooled_projection_dim",
    "rope_theta": "rope_theta",
    "rope_dim_list": "rope_axes_dim",
    "audio_intermediate_dim": "audio_intermediate_dim",
    "audio_dim_head": "audio_attention_dim",
}

TRANSFORMER = "hunyuan-video-t2v-720p/transformers"
VAE = "hunyuan-video-t2v-720p/vae"
LLAVA = "llava_llama_image"
CLIP = "text_encoder_2"
WHISPER = "whisper-tiny"
DETECTOR = "det_align"

Dtype = Literal["keep", "bf16", "fp8"]

MODEL_INDEX = {
    "_class_name": "HunyuanVideoAvatarPipeline",
    "_diffusers_version": diffusers.__version__,
    "transformer": ["worker.model.transformer", "HunyuanVideoAvatarTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlavaModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "audio_encoder": ["transformers", "WhisperModel"],
    "feature_extractor": ["transformers", "WhisperFeatureExtractor"],
    "face_detector": [None, None],  # may be left out
}
FLOAT8_LLAVA = ["worker.model.encoders", "Float8LlavaModel"]
FACE_DETECTOR = ["worker.generation.face", "TorchScriptFaceDetector"]


def convert(source: Path, target: Path, dtype: Dtype = "keep") -> None:
    """Writes the model directory; what an interrupted run has finished is kept.

    "keep" stores every tensor as it is found. "bf16" casts the transformer and the text encoders.
    "fp8" keeps the linear layers of the transformer's blocks and of LLaVA's decoder in 8 bits, with
    a scale for each output channel, and casts the rest of the transformer to bfloat16.

    Raises:
        ValueError: a weight or setting that is unknown, missing or of the wrong shape, by name;
            a target that holds something else.
        FileNotFoundError: a file of the published checkpoint is not there.
    """
    source = source / "ckpts" if (source / "ckpts").is_dir() else source
    for path in (source / folder / "config.json" for folder in (VAE, WHISPER, CLIP, LLAVA)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
    _claim(target, source, dtype)
    for step in conversions(source, target, dtype).values():
        step()
    finish(target)


def conversions(source: Path, target: Path, dtype: Dtype) -> dict[str, Callable[[], None]]:
    """For each folder of the checkpoint, what writes its part of the model directory."""
    encoder_dtype = torch.bfloat16 if dtype == "bf16" else None
    float8 = dtype == "fp8"
    return {
        VAE: partial(convert_vae, source / VAE, target),
        WHISPER: partial(convert_whisper, source / WHISPER, target),
        CLIP: partial(convert_clip, source / CLIP, target, encoder_dtype),
        TRANSFORMER: partial(convert_transformer, source / TRANSFORMER, target, dtype),
        LLAVA: partial(convert_llava, source / LLAVA, target, encoder_dtype, float8=float8),
        DETECTOR: partial(_copy_detector, source / DETECTOR, target),
    }


def finish(target: Path) -> None:
    """Makes the directory a model, once every folder is converted."""
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(target / "scheduler")
    index = dict(MODEL_INDEX)
    if (target / "face_detector").is_dir():
        index["face_detector"] = FACE_DETECTOR
    encoder_config = json.loads((target / "text_encoder" / "config.json").read_text())
    if encoder_config["architectures"] == FLOAT8_LLAVA[1:]:
        index["text_encoder"] = FLOAT8_LLAVA
    write_json(target / "model_index.json", index)


def _copy_detector(source: Path, target: Path) -> None:
    if (source / "detface.pt").is_file():
        copy_file(source / "detface.pt", target / "face_detector")


def convert_transformer(source: Path, target: Path, dtype: Dtype) -> None:
    """Writes `transformer/` from the published directory."""
    published = _open_transformer(source)
    float8 = dtype == "fp8" or (dtype == "keep" and bool(published.scales))
    with torch.device("meta"):
        model = HunyuanVideoAvatarTransformer3DModel(**published.config, float8_blocks=float8)
    planned = list(_plan_transformer(published, model.state_dict(), dtype))
    write_shards(target / "transformer", "diffusion_pytorch_model", planned)
    model.save_config(target / "transformer")


def load_official_transformer(
    transformers_dir: str | Path, dtype: torch.dtype = torch.float32
) -> HunyuanVideoAvatarTransformer3DModel:
    """The transformer, straight from the published directory.

    Its weights are the plain ones, or the 8-bit ones with their scales applied where only these
    are there.

    Raises:
        ValueError: a weight or setting that is unknown, missing or of the wrong shape, by name.
    """
    published = _open_transformer(Path(transformers_dir))
    with torch.device("meta"):
        model = HunyuanVideoAvatarTransformer3DModel(**published.config)
    weights = {name: published.read(name).to(dtype, copy=True) for name in published.pieces}
    model.load_state_dict(weights, assign=True)
    return model.eval()


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours lies: rows of a published tensor."""

    name: str
    start: int
    shape: Size
    swapped: bool

    def cut(self, tensor: Tensor) -> Tensor:
        rows = tensor[self.start : self.start + self.shape[0]]
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows


@dataclass(frozen=True)
class PublishedTransformer:
    """The published weights, mapped from the disk, and where ours lie in them."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]  # published layer: scale of its 8-bit weight; empty if not 8-bit
    pieces: Mapping[str, Piece]  # by our name

    def is_float8(self, name: str) -> bool:
        """Whether our tensor of this name is stored in 8 bits."""
        return self._layer(name) in self.scales

    def read(self, name: str) -> Tensor:
        """Our tensor of this name; an 8-bit weight as bfloat16, its scale applied."""
        if self.is_float8(name):
            return dequantize(*self.read_float8(name))
        piece = self.pieces[name]
        return piece.cut(self.tensors[piece.name])

    def read_float8(self, name: str) -> tuple[Tensor, Tensor]:
        """Our 8-bit weight: its bits (uint8) and a bfloat16 scale for each output channel."""
        piece = self.pieces[name]
        values = piece.cut(self.tensors[piece.name]).to(FLOAT8)  # the file's dtype may be wider
        scale = torch.as_tensor(self.scales[self._layer(name)]).to(torch.bfloat16)
        return values.view(torch.uint8), scale.reshape(1, 1).expand(piece.shape[0], 1)

    def _layer(self, name: str) -> str:
        """The published layer whose weight has our tensor of this name."""
        piece = self.pieces[name]
        return piece.name.removesuffix(".weight")


def _open_transformer(directory: Path) -> PublishedTransformer:
    config = _read_config(directory / "config.json")
    plain = directory / "mp_rank_00_model_states.pt"
    scales: Mapping[str, Tensor] = {}
    if plain.is_file():
        tensors = _load(plain)
    else:
        tensors = _load(directory / "mp_rank_00_model_states_fp8.pt")
        scales = _load(directory / "mp_rank_00_model_states_fp8_map.pt")
    with torch.device("meta"):
        weights = HunyuanVideoAvatarTransformer3DModel(**config).state_dict()
    pieces = dict(find_pieces({name: weight.shape for name, weight in weights.items()}))
    _require_published(directory, tensors, scales, pieces)
    return PublishedTransformer(config, tensors, scales, pieces)


def _load(path: Path) -> Mapping[str, Tensor]:
    """Tensors that are read from the disk when they are used."""
    content: dict[str, Mapping[str, Tensor]] = torch.load(
        path, map_location="cpu", mmap=True, weights_only=True
    )
    return content["module"]


def _read_config(path: Path) -> dict[str, Any]:
    """Our configuration; full size where the file or a setting is absent."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    settings.pop("audio_adapters_stored", None)  # always STORED_ADAPTERS
    patch_size = settings.pop("patch_size", [1, 2, 2])
    hidden_size = settings.pop("hidden_size", 3072)
    require_names(str(path), TRANSFORMER_SETTINGS, settings)
    return {TRANSFORMER_SETTINGS[name]: value for name, value in settings.items()} | {
        "attention_head_dim": hidden_size // settings.get("num_heads", 24),
        "patch_size": patch_size[-1],
    }


def find_pieces(shapes: Mapping[str, Size]) -> Iterator[tuple[str, Piece]]:
    """Our names, each with its piece, by `TRANSFORMER_TABLE`."""
    for their_prefix, our_prefix, modules in TRANSFORMER_TABLE:
        for i in _indices(our_prefix, shapes):
            for theirs, ours in modules.items():
                for kind in ("weight", "bias"):
                    their_name = f"{their_prefix.format(i=i)}{theirs}.{kind}"
                    start = 0
                    for module in (ours,) if isinstance(ours, str) else ours:
                        our_name = f"{our_prefix.format(i=i, odd=2 * i + 1)}{module}.{kind}"
                        if our_name in shapes:  # not every layer has a bias
                            shape = shapes[our_name]
                            yield our_name, Piece(their_name, start, shape, theirs in SWAPPED)
                            start += shape[0]


def _indices(prefix: str, shapes: Mapping[str, Size]) -> Iterator[int]:
    """The numbers for which the model has modules with this prefix."""
    if "{" not in prefix:
        yield 0
        return
    for i in itertools.count():
        if not any(name.startswith(prefix.format(i=i, odd=2 * i + 1)) for name in shapes):
            return
        yield i


def _require_published(
    directory: Path,
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    pieces: Mapping[str, Piece],
) -> None:
    """Raises ValueError unless the published weights are exactly those that ours are made of."""
    expected: dict[str, tuple[int, ...]] = {}
    for piece in pieces.values():  # in the order of the rows
        expected[piece.name] = (piece.start + piece.shape[0], *piece.shape[1:])
    num_adapters = sum(name.endswith(".audio_adapter.to_q.weight") for name in pieces)
    unused = tuple(f"audio_adapter_blocks.{i}." for i in range(num_adapters, STORED_ADAPTERS))
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(unused)}
    require_shapes(f"the transformer in {directory}", expected, found)
    if scales:
        layers = {
            name.removesuffix(".weight"): ()
            for name, shape in expected.items()
            if name.startswith(FLOAT8_BLOCKS) and name.endswith(".weight") and len(shape) == 2
        }
        require_shapes(f"the scales in {directory}", layers, dict.fromkeys(scales, ()))


def _plan_transformer(
    published: PublishedTransformer, weights: Mapping[str, Tensor], dtype: Dtype
) -> Iterator[PlannedTensors]:
    """Every tensor of the model to be written; `weights` are its names and shapes."""
    for name, piece in published.pieces.items():
        scale_name = f"{name}_scale"
        if scale_name in weights:
            specs = {
                name: (piece.shape, torch.uint8),
                scale_name: (weights[scale_name].shape, torch.bfloat16),
            }
            yield PlannedTensors(specs, partial(_read_float8, published, name))
        else:
            stored_dtype = published.tensors[piece.name].dtype
            new_dtype = stored_dtype if dtype == "keep" else torch.bfloat16
            specs = {name: (piece.shape, new_dtype)}
            yield PlannedTensors(specs, partial(_read, published, name, new_dtype))


def _read(published: PublishedTransformer, name: str, dtype: torch.dtype) -> Mapping[str, Tensor]:
    return {name: published.read(name).to(dtype, copy=True).contiguous()}


def _read_float8(published: PublishedTransformer, name: str) -> Mapping[str, Tensor]:
    if published.is_float8(name):
        bits, scale = published.read_float8(name)
    else:
        bits, scale = quantize(published.read(name))
    return {name: bits.contiguous(), f"{name}_scale": scale.contiguous()}


def _claim(target: Path, source: Path, dtype: Dtype) -> None:
    """Makes the target this conversion's own, so that no two can mix in it."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    claim = {
        "dtype": dtype,
        "source": {
            str(path.relative_to(source)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        },
    }
    path = target / "conversion.json"
    if path.is_file():
        if json.loads(path.read_text()) != claim:
            raise ValueError(f"{target} holds a conversion of other files or to another dtype")
    elif target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty, and holds no conversion to go on with")
    else:
        write_json(path, claim)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m builder.convert", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the published ckpts directory")
    parser.add_argument("--target", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--dtype", choices=["keep", "bf16", "fp8"], default="keep")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        convert(arguments.source, arguments.target, arguments.dtype)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
