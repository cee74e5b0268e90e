"""The plan for the GPU's memory, and models that are offloaded to the host."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from avatar_client.contract.job_errors import InputTooLargeError
from worker.generation.engine import Engine
from worker.generation.pipeline_loading import load_pipeline
from worker.loading.offload import (
    DECODER_BYTES,
    GIB,
    NUM_PREFETCH_BUFFERS,
    MemoryPlan,
    NetworkSize,
    OffloadedModel,
    activation_bytes,
    make_plan,
    offload_models,
)
from worker.loading.transfer import Place

CPU = torch.device("cpu")
FLOAT32 = {"default": torch.float32}

# The published model in 16 bits.
PUBLISHED = {
    "audio_encoder": NetworkSize((4 * 7_100_000,), 5_000_000),
    "text_encoder": NetworkSize((*[436_000_000] * 30, *[25_000_000] * 24), 1_100_000_000),
    "text_encoder_2": NetworkSize((14_000_000,) * 12, 77_000_000),
    "vae": NetworkSize((30_000_000,) * 8, 260_000_000),
    "transformer": NetworkSize((*[310_000_000], *[690_000_000] * 20, *[283_000_000] * 40), 10**9),
}


# The plan


def test_where_everything_fits_everything_is_resident() -> None:
    plan = make_plan(79 * GIB, PUBLISHED)
    assert plan.all_resident
    assert plan.resolutions() == [256, 384, 512, 704]


@pytest.mark.parametrize(
    ("gib", "resolutions"),
    [
        (40, [256, 384, 512, 704]),
        (24, [256, 384, 512, 704]),
        (16, [256, 384, 512, 704]),
        (12, [256, 384, 512]),
        (8, [256, 384, 512]),
    ],
)
def test_smaller_gpus_make_large_videos_with_fewer_resident_blocks(
    gib: int, resolutions: list[int]
) -> None:
    plan = make_plan((gib - 1) * GIB, PUBLISHED)
    assert not plan.all_resident
    assert plan.resolutions() == resolutions
    smaller = make_plan((gib - 2) * GIB, PUBLISHED)
    assert smaller.resident_blocks <= plan.resident_blocks <= plan.num_blocks


def test_what_is_too_small_for_anything_says_how_much_is_missing() -> None:
    with pytest.raises(ValueError, match=r"^\d\.\d GiB more of GPU memory are needed$"):
        make_plan(2 * GIB, PUBLISHED)


@given(st.integers(39 * GIB // 10, 100 * GIB))
def test_no_plan_takes_more_than_there_is(budget: Any) -> None:
    plan = make_plan(budget, PUBLISHED)
    transformer = PUBLISHED["transformer"]
    if plan.all_resident:
        weights = sum(size.total_bytes for size in PUBLISHED.values())
        beside = 0
    else:
        *others, last = sorted(transformer.block_bytes, reverse=True)
        stay = sum(others[: plan.resident_blocks - 1]) + last
        weights = stay + transformer.streamed_bytes
        beside = stay - last + PUBLISHED["vae"].total_bytes + DECODER_BYTES
    assert weights + activation_bytes(plan.max_tokens) <= budget
    assert beside <= budget
    assert 1 <= plan.resident_blocks <= plan.num_blocks


# Offloaded models


class Counted(torch.nn.Module):
    """Blocks in a row, each with its weights in one storage."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([2.0]))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 3, bias=False) for _ in range(count))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, which: range) -> torch.Tensor:
        for index in which:
            x = self.blocks[index](x) + self.scale
        return x


def host_addresses(network: torch.nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in network.named_parameters()}


@pytest.mark.parametrize("resident", [0, 1, 3, 6, 7])
def test_a_model_that_is_onloaded_block_by_block_computes_the_same(resident: int) -> None:
    network, x = Counted(7), torch.randn(2, 3)
    orders = [range(7), range(6, 7), range(7), range(3, 5), range(7)]  # some skip, some go back
    expected = [network(x, order) for order in orders]
    on_host = host_addresses(network)
    offloaded = OffloadedModel(network, list(network.blocks), CPU, resident)
    away = []
    for block in network.blocks:
        block.register_forward_hook(
            lambda *_: away.append(sum(host_addresses(network)[n] != on_host[n] for n in on_host))
        )

    for _ in range(2):
        with offloaded.in_use():
            for order, result in zip(orders, expected, strict=True):
                assert torch.equal(network(x, order), result)

    assert max(away) <= 7 + 1
    kept = {name for name in on_host if host_addresses(network)[name] != on_host[name]}
    assert len(kept) == resident  # all else is on the host again
    assert "blocks.6.weight" in kept or not resident


def test_blocks_that_are_not_resident_share_two_buffers() -> None:
    network = Counted(9)
    offloaded = OffloadedModel(network, list(network.blocks), CPU, resident=2)
    addresses = []
    for block in network.blocks:
        block.register_forward_hook(lambda block, *_: addresses.append(block.weight.data_ptr()))

    with offloaded.in_use():
        network(torch.zeros(1, 3), range(9))
        network(torch.zeros(1, 3), range(9))

    assert len(set(addresses)) == NUM_PREFETCH_BUFFERS + 2


def test_a_model_that_is_onloaded_whole_is_offloaded_whole_even_after_a_failure() -> None:
    network, x = Counted(3), torch.randn(2, 3)
    expected, on_host = network(x, range(3)), host_addresses(network)
    offloaded = OffloadedModel(network, list(network.blocks), CPU, resident=None)

    def fail() -> None:
        with offloaded.in_use():
            assert torch.equal(network(x, range(3)), expected)
            away = host_addresses(network)
            assert all(away[name] != on_host[name] for name in on_host)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert host_addresses(network) == on_host


def test_weights_in_several_storages_are_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one storage"):
        OffloadedModel(network, [network[0]], CPU, resident=0)


# The whole model


@pytest.mark.parametrize("resident_blocks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_video_of_offloaded_models_is_the_same(toy_model: Path, resident_blocks: int) -> None:
    plan = MemoryPlan(0, False, resident_blocks, 8, 10**6)
    frames = []
    placements: tuple[dict[str, Place], ...] = (
        {"default": "device"},
        {"default": "host", "audio_encoder": "device"},
    )
    for placement in placements:
        pipeline, _ = load_pipeline(toy_model, CPU, FLOAT32, placement)
        pipeline.set_progress_bar_config(disable=True)
        if placement["default"] == "host":
            pipeline.offloaded = offload_models(pipeline.components, CPU, plan)
            on_host = {name: host_addresses(getattr(pipeline, name)) for name in pipeline.offloaded}
        output = pipeline(
            image=Image.new("RGB", (64, 64), "red"),
            audio=np.zeros(2560, np.float32),
            prompt="A person.",
            height=64,
            width=64,
            num_inference_steps=12,
            computed_steps=(0, 1, 4, 11),
            generator=torch.Generator().manual_seed(0),
        )
        frames.append(output.frames)
    assert (frames[0] - frames[1]).abs().max() < 1e-4
    for name, addresses in on_host.items():
        now = host_addresses(getattr(pipeline, name))
        moved = [key for key in now if now[key] != addresses[key]]
        stayed = {match[0] for key in moved if (match := re.match(r".*?\.\d+", key))}
        assert len(stayed) == (resident_blocks if name == "transformer" else 0)


def test_a_size_that_the_plan_cannot_make_is_refused_with_those_that_it_can() -> None:
    plan = make_plan(5 * GIB, PUBLISHED)
    engine = Engine(None, CPU, 0.0, None, plan, has_float8=False)  # type: ignore[arg-type]
    engine.require_fits_memory(Image.new("RGB", (300, 300)), 256)
    with pytest.raises(InputTooLargeError, match=r"640 x 1280 .*: 256, 384$") as refused:
        engine.require_fits_memory(Image.new("RGB", (300, 600)), 704)
    assert refused.value.field == "resolution"
