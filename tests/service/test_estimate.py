"""What a job will cost, before it runs."""

from dataclasses import replace

import pytest

from avatar_client.contract.presets import PRESETS, REFERENCE_SCHEDULE
from worker.service.estimate import JobPlan, ThroughputEstimator
from worker.shapes import FrameSize, VideoPlan

PLAN = JobPlan(FrameSize(256, 256), VideoPlan(129), 50, REFERENCE_SCHEDULE)


def test_a_computed_step_costs_what_was_counted_on_the_published_model() -> None:
    # 704 x 768 with 831 text tokens: 9.75 PFLOP, counted layer by layer
    per_step = replace(PLAN, size=FrameSize(704, 768)).flops / (30 + 20 / 60)
    assert per_step == pytest.approx(9.75e15, rel=0.03)


def test_a_second_window_doubles_the_cost() -> None:
    assert replace(PLAN, video=VideoPlan(150)).flops == 2 * PLAN.flops


def test_presets_cost_less_in_their_order() -> None:
    plans = [
        replace(PLAN, step_cache_schedule=preset.step_cache_schedule) for preset in PRESETS.values()
    ]
    costs = [plan.flops for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2
    assert [plan.num_computed_steps for plan in plans] == [30, 19, 12]


def test_the_share_of_the_work_follows_the_computed_steps() -> None:
    shares = [PLAN.share_done(step) for step in range(51)]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert shares[15] - shares[14] == pytest.approx(60 * (shares[17] - shares[16]))


def test_a_worker_learns_its_rate_from_the_job_it_has_finished() -> None:
    throughput = ThroughputEstimator("NVIDIA H200")
    before = throughput.estimate_seconds(1e18)
    throughput.record(1e18, 7.0)
    assert before is not None
    assert before != throughput.estimate_seconds(1e18) == 7.0


def test_two_gpus_are_taken_for_twice_as_fast_until_a_job_shows_it() -> None:
    alone, together = (ThroughputEstimator("NVIDIA H200", num_gpus=number) for number in (1, 2))
    alone_seconds = alone.estimate_seconds(1e18)
    assert alone_seconds is not None
    assert together.estimate_seconds(1e18) == pytest.approx(alone_seconds / 2)


def test_nobody_guesses_for_a_gpu_that_is_not_known() -> None:
    assert ThroughputEstimator("Voodoo 2").estimate_seconds(1e18) is None
    assert ThroughputEstimator(None).estimate_seconds(1e18) is None
