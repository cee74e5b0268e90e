"""The blocks' point-wise work: what a GPU's kernels give, beside torch's operators."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, rms_norm

from tests.model.values import DEVICES, ROUNDING, normal
from tests.support.golden_transformer import relative_difference
from worker.model import kernels


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[(37, 3072), (5, 256), (1, 64)], ids=str)
def rows(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("device", DEVICES)
def test_norms_and_gates_are_exact_to_the_rounding(device: str, rows: Any) -> None:
    x, y, z = (normal(1, *rows, device=device, seed=seed) for seed in range(3))
    gate, shift, scale = (normal(1, rows[1], device=device, seed=seed) for seed in range(3, 6))

    def normed(value: Any) -> Any:
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
def test_heads_are_normed_and_turned(device: str, heads: tuple[int, int], turned: bool) -> None:
    x = normal(1, 7, *heads, device=device)
    norm = nn.RMSNorm(heads[1], eps=1e-6, device=device, dtype=torch.bfloat16)
    norm.weight.data.uniform_(0.5, 2)
    angles = torch.rand(7, heads[1] // 2, device=device).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos(), angles.sin()) if turned else None
    whole = torch.zeros(1, 9, *heads, device=device, dtype=torch.bfloat16)
    exact = rms_norm(x.float(), heads[1:], norm.weight.float(), 1e-6)
    if turned:  # as complex numbers
        pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)).contiguous())
        turn = torch.polar(torch.ones_like(angles), angles)[:, None, ::2]
        exact = torch.view_as_real(pairs * turn).flatten(-2)

    some = torch.zeros(1, 9, heads[0] - 1, heads[1], device=device, dtype=torch.bfloat16)

    with torch.no_grad():
        kernels.norm_and_rotate(x, norm, rotary, whole[:, 1:8])
        kernels.norm_and_rotate(x[:, :, 1:], norm, rotary, some[:, 1:8])  # all heads but one
        kernels.norm_and_rotate(x, norm, rotary, x)

    assert relative_difference(whole[:, 1:8], exact) < 2 * ROUNDING
    assert torch.equal(whole[:, 1:8], x)
    assert torch.equal(some[:, 1:8], x[:, :, 1:])
    for written in (whole, some):
        assert not written[:, 0].any()
        assert not written[:, 8].any()  # nothing beside


@pytest.mark.parametrize("device", DEVICES)
def test_what_lies_side_by_side_is_joined_without_a_copy(device: str) -> None:
    whole = normal(1, 7, 3, 64, device=device)
    first, second = whole[:, :5], whole[:, 5:]
    of_two = normal(2, 7, 3, 64, device=device)

    assert kernels.joined(first, second).data_ptr() == whole.data_ptr()
    for parts in (
        (first, second),
        (second, first),
        (first, second[:, 1:]),
        (first[..., :32], second[..., :32]),
        (first, second.clone()),
        (of_two[:, :5], of_two[:, 5:]),
    ):
        assert torch.equal(kernels.joined(*parts), torch.cat(parts, dim=1))
    with torch.enable_grad():
        assert kernels.joined(first, second).data_ptr() != whole.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_eight_bits_have_a_scale_each(device: str) -> None:
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


@pytest.mark.gpu
def test_the_kernels_compile_here() -> None:
    assert kernels.compiled(0, 3072, 128) is not None
