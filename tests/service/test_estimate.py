"""What a job will cost, before it runs."""

import pytest

from avatar_client.contract.presets import PRESETS, REFERENCE_SCHEDULE
from worker.service.estimate import Speedometer, job_flops, work_share
from worker.shapes import FrameSize, VideoPlan

ONE_WINDOW, TWO_WINDOWS = VideoPlan(129), VideoPlan(150)


def test_a_computed_step_costs_what_was_counted_on_the_published_model():
    # 704 x 768 with 831 text tokens: 9.75 PFLOP, counted layer by layer
    per_step = job_flops(ONE_WINDOW, FrameSize(704, 768), 50, REFERENCE_SCHEDULE) / (30 + 20 / 60)
    assert per_step == pytest.approx(9.75e15, rel=0.03)


def test_a_second_window_doubles_the_cost():
    size = FrameSize(256, 256)
    assert job_flops(TWO_WINDOWS, size, 50, REFERENCE_SCHEDULE) == 2 * job_flops(
        ONE_WINDOW, size, 50, REFERENCE_SCHEDULE
    )


def test_presets_cost_less_in_their_order():
    costs = [
        job_flops(ONE_WINDOW, FrameSize(256, 256), 50, preset.step_cache_schedule)
        for preset in PRESETS.values()
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2


def test_the_share_of_the_work_follows_the_computed_steps():
    shares = [work_share(step, 50, REFERENCE_SCHEDULE) for step in range(51)]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert shares[15] - shares[14] == pytest.approx(60 * (shares[17] - shares[16]))


def test_a_worker_learns_its_rate_from_the_job_it_has_finished():
    speed = Speedometer("NVIDIA H200")
    before = speed.estimate_seconds(1e18)
    speed.record(1e18, 7.0)
    assert before is not None
    assert before != speed.estimate_seconds(1e18) == 7.0


def test_two_gpus_are_taken_for_twice_as_fast_until_a_job_shows_it():
    alone, together = (Speedometer("NVIDIA H200", num_gpus=number) for number in (1, 2))
    assert together.estimate_seconds(1e18) == pytest.approx(alone.estimate_seconds(1e18) / 2)


def test_nobody_guesses_for_a_gpu_that_is_not_known():
    assert Speedometer("Voodoo 2").estimate_seconds(1e18) is None
    assert Speedometer(None).estimate_seconds(1e18) is None
