"""The blocks' point-wise work and products: what a GPU's kernels give, beside torch's operators."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear, rms_norm

from worker.model import kernels
from worker.model.attention import LARGEST_ERROR, _error, fastest_backend
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
def inference():
    with torch.no_grad():
        yield


ROUNDING = 3e-3  # of bfloat16, in relative norm
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relative_difference(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def normal(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


@pytest.fixture(params=[(37, 3072), (5, 256), (1, 64)], ids=str)
def rows(request):
    return request.param


@pytest.mark.parametrize("device", DEVICES)
def test_norms_and_gates_are_exact_to_the_rounding(device, rows):
    x, y, z = (normal(1, *rows, device=device, seed=seed) for seed in range(3))
    gate, shift, scale = (normal(1, rows[1], device=device, seed=seed) for seed in range(3, 6))

    def normed(value):
        value = nn.functional.layer_norm(value.float(), (rows[1],), eps=1e-6)
        return value * (1 + scale.float()[:, None]) + shift.float()[:, None]

    total = x.float() + gate.float()[:, None] * y.float()
    assert (
        relative_difference(kernels.adaln_modulate(x, shift, scale, 1e-6), normed(x)) < 2 * ROUNDING
    )
    found, found_norm = kernels.gated_residual_adaln(x, y, gate, shift, scale, 1e-6)
    assert relative_difference(found, total) < ROUNDING
    assert relative_difference(found_norm, normed(found)) < 2 * ROUNDING
    assert relative_difference(kernels.gated_residual(x, y, gate), total) < ROUNDING
    more = total + gate.float()[:, None] * z.float()
    assert relative_difference(kernels.gated_residual(x, y, gate, z), more) < ROUNDING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("heads", [(24, 128), (3, 64)], ids=str)
def test_heads_are_normed_and_turned(device, heads, turned):
    query, key = (normal(1, 7, *heads, device=device, seed=seed) for seed in range(2))
    norms = [nn.RMSNorm(heads[1], eps=1e-6, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 2)
    angles = torch.rand(7, heads[1] // 2, device=device).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos(), angles.sin()) if turned else None
    whole = torch.zeros(1, 9, *heads, device=device, dtype=torch.bfloat16)
    out = (whole[:, 1:8], query.clone())

    with torch.no_grad():
        kernels.norm_and_rotate(query, key, *norms, rotary, *out)

    for x, norm, found in zip((query, key), norms, out, strict=True):
        x = rms_norm(x.float(), heads[1:], norm.weight.float(), 1e-6)
        if turned:  # as complex numbers
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            turn = torch.polar(torch.ones_like(angles), angles)[:, None, ::2]
            x = torch.view_as_real(pairs * turn).flatten(-2)
        assert relative_difference(found, x) < 2 * ROUNDING
    assert not whole[:, 0].any()
    assert not whole[:, 8].any()  # nothing beside


@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_eight_bits_have_a_scale_each(device):
    x = normal(6, 256, device=device)
    x[1], x[2] = 0, x[2] * 1e-6
    apart = torch.zeros(6, 512, device=device, dtype=torch.bfloat16)
    apart[:, :256] = x

    for values, scale in (
        kernels.quantize_per_token(x),
        kernels.quantize_per_token(apart[:, :256]),
    ):
        found = values.float() * scale
        assert (found - x.float()).abs().max() < x.abs().max() / 16
        assert relative_difference(found[2], x[2]) < 0.04
        assert not found[1].any()
    values, scale = kernels.quantize_per_token(x, of_gelu=True)
    assert relative_difference(values.float() * scale, gelu(x.float(), approximate="tanh")) < 0.04
    given = x.clone()
    exact = gelu(given.float(), approximate="tanh")
    assert relative_difference(kernels.gelu_in_place(given), exact) < ROUNDING


@pytest.mark.parametrize("device", DEVICES)
def test_products_in_eight_bits_are_near_the_exact_ones(device):
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
    assert float8_works(torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("float8", [False, True])
def test_a_feed_forward_of_many_tokens_is_that_of_few_at_a_time(device, float8):
    up = nn.Linear(32, 128, device=device, dtype=torch.bfloat16)
    down = nn.Linear(128, 32, device=device, dtype=torch.bfloat16)
    x = normal(1, FEED_FORWARD_TOKENS + 100, 32, device=device)
    with torch.no_grad():
        whole = feed_forward(up, down, Rows.of(x, float8=float8))
        last = feed_forward(up, down, Rows.of(x[:, -50:], float8=float8))
        exact = down(gelu(up(x), approximate="tanh"))
    assert relative_difference(whole[:, -50:], last) < ROUNDING
    assert relative_difference(whole, exact) < (0.1 if float8 else 2 * ROUNDING)


@pytest.mark.gpu
def test_the_kernels_compile_here():
    assert kernels._compiled(0, 3072, 128) is not None


@pytest.mark.gpu
def test_the_attention_kernel_of_this_gpu_is_right():
    device = torch.device("cuda")
    assert _error(fastest_backend(device), device) < LARGEST_ERROR
    assert _error("_native_flash", device) < LARGEST_ERROR
