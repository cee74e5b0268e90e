from typing import Any

import pytest

from avatar_client.contract.presets import PRESETS
from avatar_client.contract.request import GenerationParams
from worker.generation.options import DenoiseOptions


def test_a_request_decides_how_its_video_is_computed() -> None:
    params = GenerationParams(num_inference_steps=20, guidance_scale=3.0, flow_shift=4.0)

    options = DenoiseOptions.from_params(params, has_float8=True)

    assert (options.num_inference_steps, options.guidance_scale, options.flow_shift) == (
        20,
        3.0,
        4.0,
    )
    assert options.latents_dtype is None  # the reference's rounding


@pytest.mark.parametrize("has_float8", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_eight_bits_are_used_where_preset_and_device_have_them(
    preset: Any, has_float8: Any
) -> None:
    options = DenoiseOptions.from_params(GenerationParams(preset=preset), has_float8=has_float8)

    assert options.float8 == (has_float8 and preset != "quality")


def test_a_quicker_preset_computes_fewer_steps() -> None:
    counts = []
    for preset in PRESETS:
        params = GenerationParams.model_validate({"preset": preset})
        steps = DenoiseOptions.from_params(params, has_float8=False).computed_steps
        assert steps is not None
        counts.append(len(steps))

    assert counts == [30, 17, 12]


@pytest.mark.parametrize(
    ("guidance_scale", "uses_cfg"), [(7.5, True), (1.01, True), (1.0, False), (0.0, False)]
)
def test_a_guidance_scale_of_one_or_less_has_no_unconditional_branch(
    guidance_scale: float, uses_cfg: bool
) -> None:
    assert DenoiseOptions(guidance_scale=guidance_scale).uses_cfg is uses_cfg
