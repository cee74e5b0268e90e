from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear

from tests.model.values import DEVICES, ROUNDING, normal
from tests.support.golden_transformer import relative_difference
from worker.model.linear import (
    FEED_FORWARD_TOKENS,
    Float8Linear,
    Rows,
    feed_forward,
    float8_works,
    project,
    quantize,
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("device", DEVICES)
def test_products_in_eight_bits_are_near_the_exact_ones(device: str) -> None:
    layer = nn.Linear(512, 256, device=device, dtype=torch.bfloat16)
    stored = Float8Linear(512, 256).to(device)
    stored.weight.data, scale = quantize(layer.weight.data)
    stored.weight_scale.data, stored.bias.data = scale.float(), layer.bias.data
    x = normal(1, 40, 512, device=device)
    rows, exact_rows = Rows.of(x, float8=True), Rows.of(x, float8=False)

    with torch.no_grad():
        for each in (layer, stored):
            exact = linear(x.float(), layer.weight.float(), layer.bias.float())
            assert relative_difference(project(each, exact_rows), exact) < 0.04
            assert 1e-3 < relative_difference(project(each, rows), exact) < 0.06
            part = slice(128, None)
            half = linear(x[..., part].float(), layer.weight[:, part].float())
            for float8 in (False, True):
                rows_of_part = Rows.of(x[..., part].contiguous(), float8=float8)
                found = project(each, rows_of_part, part, bias=False)
                assert relative_difference(found, half) < 0.06
                whole = torch.zeros(1, x.shape[1] + 2, half.shape[2], device=device).to(x)
                written = project(each, rows_of_part, part, bias=False, out=whole[:, 1:-1])
                assert torch.equal(written, found)
                assert torch.equal(whole[:, 1:-1], found)
                assert not whole[:, [0, -1]].any()
    assert float8_works(torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("float8", [False, True])
def test_a_feed_forward_of_many_tokens_is_that_of_few_at_a_time(device: str, float8: bool) -> None:
    up = nn.Linear(32, 128, device=device, dtype=torch.bfloat16)
    down = nn.Linear(128, 32, device=device, dtype=torch.bfloat16)
    x = normal(1, FEED_FORWARD_TOKENS + 100, 32, device=device)
    with torch.no_grad():
        whole = feed_forward(up, down, Rows.of(x, float8=float8))
        last = feed_forward(up, down, Rows.of(x[:, -50:], float8=float8))
        exact = down(gelu(up(x), approximate="tanh"))
    assert relative_difference(whole[:, -50:], last) < ROUNDING
    assert relative_difference(whole, exact) < (0.1 if float8 else 2 * ROUNDING)
