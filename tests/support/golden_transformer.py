"""The transformer's reference cases as arguments of our model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.convert import load_official_transformer
from tests.support.golden_weights import make_weights

ARGUMENTS = {
    "x": "hidden_states",
    "t": "timestep",
    "text_states": "encoder_hidden_states",
    "text_mask": "encoder_attention_mask",
    "text_states_2": "pooled_projections",
    "ref_latents": "reference_latents",
    "audio_prompts": "audio_embeds",
    "face_mask": "face_mask",
    "motion_exp": "motion_expression",
    "motion_pose": "motion_pose",
    "fps": "fps",
}


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()


def make_transformer(described: Mapping[str, Any], directory: Path) -> torch.nn.Module:
    """The transformer of a golden, by way of the published format."""
    weights = directory / "mp_rank_00_model_states.pt"
    torch.save({"module": make_weights(**described["weights"])}, weights)
    (directory / "config.json").write_text(json.dumps(described["config"]))
    model = load_official_transformer(directory)
    weights.unlink()  # at the published widths it takes 5 GB
    return model


def arguments(
    inputs: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    audio_scale: float,
    audio_rows: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The inputs under our names; one that the case does not have is None."""
    given = {
        ours: tensors[inputs[theirs]] if theirs in inputs else None
        for theirs, ours in ARGUMENTS.items()
    }
    audio = given["audio_embeds"]
    if audio is None:
        return given
    if audio.dtype == torch.int8:
        given["audio_embeds"] = audio.float() * audio_scale
    else:
        assert audio_rows is not None
        windows = audio.double() @ audio_rows.double()  # (B, frames, 10 * 5 * 384)
        given["audio_embeds"] = windows.float().unflatten(2, (10, 5, 384))
    return given
