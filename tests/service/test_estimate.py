"""What a job will cost, before it runs."""

from dataclasses import replace

import pytest

from avatar_client.contract.presets import PRESETS
from worker.service.estimate import JobPlan, ThroughputEstimator, cost_usd
from worker.shapes import FrameSize, VideoPlan

PLAN = JobPlan(FrameSize(256, 256), VideoPlan(129), "quality", 50, 2)


def test_a_computed_step_costs_what_was_counted_on_the_published_model() -> None:
    # 704 x 768 with 831 text tokens: 9.75 PFLOP, counted layer by layer
    per_step = replace(PLAN, size=FrameSize(704, 768)).flops / (30 + 20 / 60)
    assert per_step == pytest.approx(9.75e15, rel=0.03)


def test_a_second_window_doubles_the_cost() -> None:
    assert replace(PLAN, video=VideoPlan(150)).flops == 2 * PLAN.flops


def test_presets_cost_less_in_their_order() -> None:
    plans = [replace(PLAN, preset=preset) for preset in PRESETS]
    costs = [plan.flops for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2
    assert [plan.num_computed_steps for plan in plans] == [30, 17, 12]


def test_the_share_of_the_work_follows_the_computed_steps() -> None:
    shares = [PLAN.share_done(step) for step in range(51)]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert shares[15] - shares[14] == pytest.approx(60 * (shares[17] - shares[16]))


def test_without_guidance_it_costs_half() -> None:
    assert replace(PLAN, num_cfg_branches=1).flops == PLAN.flops / 2


def test_a_worker_learns_from_the_job_it_has_finished_what_another_size_takes() -> None:
    throughput = ThroughputEstimator("NVIDIA H200")
    before = throughput.estimate_seconds(PLAN)
    throughput.record(PLAN, denoise_seconds=7.0, total_seconds=10.0)
    assert before != throughput.estimate_seconds(PLAN) == 10.0
    longer = replace(PLAN, video=VideoPlan(150))  # two windows, and some frames more
    assert throughput.estimate_seconds(longer) == round(14 + 3 * 150 / 129, 1)


def test_each_preset_is_learned_for_itself() -> None:
    throughput = ThroughputEstimator("NVIDIA H200")
    draft = replace(PLAN, preset="draft")
    before = throughput.estimate_seconds(draft)
    throughput.record(PLAN, denoise_seconds=70.0, total_seconds=100.0)
    assert throughput.estimate_seconds(draft) == before
    throughput.record(draft, denoise_seconds=1.0, total_seconds=2.0)
    assert throughput.estimate_seconds(PLAN) == 100.0
    assert throughput.estimate_seconds(draft) == 2.0


def test_on_a_gpu_that_is_not_known_another_presets_rate_has_to_do() -> None:
    throughput = ThroughputEstimator("Voodoo 2")
    throughput.record(PLAN, denoise_seconds=7.0, total_seconds=10.0)
    assert throughput.estimate_seconds(replace(PLAN, num_inference_steps=25)) is not None
    estimate = throughput.estimate_seconds(replace(PLAN, preset="balanced"))
    assert estimate is not None
    assert estimate < 10


def test_two_gpus_denoise_twice_as_fast_until_a_job_shows_otherwise() -> None:
    long = replace(PLAN, size=FrameSize(704, 768), video=VideoPlan(1500))
    alone, two, four = (
        ThroughputEstimator("NVIDIA H200", num_gpus=number).estimate_seconds(long)
        for number in (1, 2, 4)
    )
    assert alone is not None
    assert two is not None
    assert four is not None
    assert alone - two == pytest.approx(2 * (two - four), abs=0.2)


def test_nobody_guesses_for_a_gpu_that_is_not_known() -> None:
    assert ThroughputEstimator("Voodoo 2").estimate_seconds(PLAN) is None
    assert ThroughputEstimator(None).estimate_seconds(PLAN) is None


def test_the_cost_is_the_time_at_the_operators_price() -> None:
    assert cost_usd(452.0, 0.00155) == 0.7006
    assert cost_usd(452.0, 0.0) == 0
    assert cost_usd(452.0, None) is None
    assert cost_usd(None, 0.00155) is None
