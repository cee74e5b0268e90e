"""Sparse attention: what it leaves out, what that costs, and that it keeps to its tolerance."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.model.values import DEVICES
from tests.support.golden_transformer import relative_difference
from worker.model import sparse_attention as sparse
from worker.model.attention import KERNELS
from worker.model.kernels import choose_blocks, merge_attended
from worker.model.sparse_attention import BLOCK, ChosenBlocks, SparseAttention, TokenBlocks

NUM_TEXT, NUM_PATCHES, NUM_FRAMES = 90, 120, 34
HEADS, WIDTH = 2, 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens_of(num_face_patches: int = 4) -> TokenBlocks:
    gate = torch.zeros(1, NUM_PATCHES, NUM_FRAMES, 1)
    gate[:, 10 : 10 + num_face_patches, 1:] = 1
    return TokenBlocks(gate, NUM_TEXT)


def local_attention(sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose attention is local, the more so the sharper; 0: it is flat."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    num_tokens = NUM_PATCHES * NUM_FRAMES + NUM_TEXT
    stretches = normal(num_tokens // 400 + 1, HEADS, WIDTH).repeat_interleave(400, 0)[:num_tokens]
    query, key = (sharpness * stretches + normal(num_tokens, HEADS, WIDTH) for _ in range(2))
    value = stretches + normal(num_tokens, HEADS, WIDTH)
    return query[None], key[None], value[None]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return KERNELS["native"](query, key, value)


def test_the_tokens_of_the_face_and_of_the_text_see_all() -> None:
    tokens = tokens_of(4)
    face = range(10 * NUM_FRAMES // BLOCK, (14 * NUM_FRAMES - 1) // BLOCK + 1)
    text = range(NUM_PATCHES * NUM_FRAMES // BLOCK, len(tokens.dense))
    assert {place for place, sees_all in enumerate(tokens.dense) if sees_all} == {*face, *text}
    assert not tokens.dense[tokens.queries // BLOCK].any()
    assert len(tokens.queries) == (~tokens.dense).sum() * BLOCK
    assert tokens.required[:, text.start :].all()  # the text is seen by all
    assert tokens.required.diagonal().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.9, 1.0])
def test_the_fewest_blocks_of_a_mass_are_chosen(device: str, mass: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 40, 77, generator=generator)
    required = torch.rand(40, 77, generator=generator) < 0.05
    all_seen = torch.rand(40, generator=generator) < 0.2
    chosen, counts, indices = (
        each.cpu()
        for each in choose_blocks(scores.to(device), required.to(device), all_seen.to(device), mass)
    )
    shares = scores.softmax(-1)
    assert chosen[:, all_seen].all()
    assert chosen[required.expand_as(chosen)].all()
    assert (counts == chosen.sum(-1)).all()
    for head, query in [(0, 0), (1, 7), (1, 39)]:
        count = counts[head, query]
        places = chosen[head, query].nonzero().flatten()
        assert indices[head, query, :count].tolist() == places.tolist()
    free = chosen & ~required & ~all_seen[:, None]
    reached = (shares * chosen).sum(-1)
    assert (reached > mass - 1e-5).all()
    # one block less would not do, and none that was left out is heavier
    least = shares.masked_fill(~free, 2).amin(-1)
    assert (reached - least < mass + 1e-5)[free.any(-1)].all()
    left_out = shares.masked_fill(chosen, 0).amax(-1)
    assert (left_out <= least + 1e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_two_parts_of_attention_are_merged(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, 200, 24, 128, generator=generator, device=device) for _ in range(3)
    )

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key[:, keys]) * 128**-0.5
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value[:, keys])
        return out, scores.logsumexp(-1)

    (first, first_sums), (second, second_sums) = part(slice(150)), part(slice(150, None))
    second_sums[..., :10] = -torch.inf  # these saw nothing
    second[:, :10] = torch.nan
    exact = dense(query, key, value)
    exact[:, :10] = first[:, :10]
    found = merge_attended(
        first.bfloat16(), second.bfloat16(), first_sums, second_sums - 0.5, bias=0.5
    )
    assert relative_difference(found, exact) < 5e-3


@pytest.mark.parametrize("sharpness", [0.0, 1.0])
def test_the_error_is_foretold(sharpness: float) -> None:
    tensors, tokens = local_attention(sharpness), tokens_of()
    exact = dense(*tensors)
    rows = tokens.queries
    errors, densities = sparse.error_curve(*tensors, tokens, rows)
    for mass, error, density in list(zip(sparse.MASSES, errors, densities, strict=True))[::4]:
        blocks = ChosenBlocks.of(*tensors, tokens, mass)
        found = sparse.attend_sparsely_by_torch(*tensors, blocks)
        assert relative_difference(found[:, rows], exact[:, rows]) == pytest.approx(error, rel=1e-3)
        seen = blocks.chosen[:, ~tokens.dense].float().mean().item()
        assert seen == pytest.approx(density, abs=1e-3)
    assert errors == sorted(errors, reverse=True)


def test_queries_that_see_all_are_exact() -> None:
    tensors, tokens = local_attention(1.0), tokens_of()
    blocks = ChosenBlocks.of(*tensors, tokens, 0.2)
    found = sparse.attend_sparsely_by_torch(*tensors, blocks)
    sees_all = torch.ones(found.shape[1], dtype=torch.bool)
    sees_all[tokens.queries] = False
    assert relative_difference(found[:, sees_all], dense(*tensors)[:, sees_all]) < 1e-5
    assert relative_difference(found, dense(*tensors)) > 1e-3


@pytest.mark.parametrize("tolerance", [0.2, 0.05])
def test_each_call_keeps_to_the_tolerance(tolerance: float) -> None:
    whole, tokens = SparseAttention(tolerance, 0, CPU), tokens_of()
    tensors = local_attention(1.0)
    exact = dense(*tensors)
    for _ in range(4):
        found = whole.layer(0, 0, tokens).attend(*tensors, dense)
        assert relative_difference(found, exact) <= tolerance
    assert whole.report().error <= tolerance
    assert whole.report().density < 1


def test_attention_that_is_flat_sees_all() -> None:
    whole, tokens = SparseAttention(1e-3, 0, CPU), tokens_of()
    tensors = local_attention(0.0)
    for _ in range(2):
        assert (whole.layer(0, 0, tokens).attend(*tensors, dense) == dense(*tensors)).all()
    assert whole.report() == (1.0, 0.0, 0)


def test_a_call_beyond_the_tolerance_is_done_again() -> None:
    whole, tokens = SparseAttention(0.05, 0, CPU), tokens_of()
    layer = whole.layer(0, 0, tokens)
    tensors = local_attention(1.0)
    layer.attend(*tensors, dense)
    assert layer.mass is not None
    whole.tolerance = 1e-5  # as if another step's attention were less local
    assert (layer.attend(*tensors, dense) == dense(*tensors)).all()
    assert whole.report().fallbacks == 1
    assert layer.mass is None


def test_a_face_that_fills_the_picture_sees_all() -> None:
    whole, tokens = SparseAttention(0.5, 0, CPU), tokens_of(NUM_PATCHES - 10)
    tokens = TokenBlocks(torch.ones(1, NUM_PATCHES, NUM_FRAMES, 1), NUM_TEXT)
    tensors = local_attention(1.0)
    assert (whole.layer(0, 0, tokens).attend(*tensors, dense) == dense(*tensors)).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the packages that are looked for
def test_the_kernels_of_this_gpu_are_right() -> None:
    assert sparse.sparse_error(torch.device("cuda")) < sparse.LARGEST_ERROR
