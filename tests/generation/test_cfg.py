import pytest
import torch

from worker.generation.cfg import apply_cfg, guidance_weight


def test_guidance_falls_and_after_ten_steps_is_the_audio_s_own() -> None:
    weights = [guidance_weight(step, 50, 7.5) for step in range(50)]
    assert weights[0] == 7.5
    assert weights[9] == pytest.approx(6.51)
    assert weights[10] == pytest.approx(5.9)
    assert weights[49] == pytest.approx(3.56)
    assert [guidance_weight(step, 50, 3.0) for step in range(10, 50)] == weights[10:]


def test_guidance_goes_from_the_unconditional_velocity_past_the_conditional() -> None:
    uncond, cond = torch.tensor([1.0]), torch.tensor([2.0])
    assert apply_cfg([uncond, cond], 3.0).item() == 4.0
    assert apply_cfg([cond], 3.0) is cond
