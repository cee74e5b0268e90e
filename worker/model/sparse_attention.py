"""Attention over the blocks of keys that matter, with an error that is measured in each call.

Queries and keys are taken in blocks of 128 neighbouring tokens. For each block of queries the
means of both say roughly what each block of keys weighs; the fewest blocks of a given mass are
attended to in full, and each of the others as one key and one value, their means. What that costs
is measured: some queries, drawn anew in each call, are computed in full too, and a call that is
off by more than the tolerance is done again with all keys. The mass follows from how the error
depends on it, for each layer alone; a layer that would need more than half of the blocks sees all.

Always in full are the queries inside the face mask, since the mouth is what a viewer looks at, and
those of the text; always seen are the text and a block's neighbours.

Related: SVG2 (arXiv 2505.18875) and MInference (arXiv 2407.02490) choose blocks by estimates too.

Shape letters: N tokens, h heads, D width, q and k blocks of queries and of keys, R drawn queries.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from worker.model import flash_attention_4
from worker.model.kernels import choose_blocks, merge_attended

logger = logging.getLogger(__name__)

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # 3 x (1, N, h, D/h) -> (1, N, h, D/h)

BLOCK = flash_attention_4.BLOCK
MASSES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
DENSEST = (
    0.5  # of the blocks, for queries that need not see all: beyond, there is too little to gain
)
CALIBRATED_ERROR = 0.8  # of the tolerance that a mass is chosen for: each call draws other queries
RELAXED_ERROR = 0.5  # of the tolerance: below, the next smaller mass is tried
CALIBRATING_QUERIES, MEASURING_QUERIES = 64, 128
LARGEST_ERROR = 1e-2  # relative norm, of the kernels in bfloat16
CHUNK_BYTES = 2**28  # of scores that lie in memory at once


class SparsityReport(NamedTuple):
    """What the calls of one video did; on several ranks, each with its heads and samples, all."""

    density: float  # mean share of the blocks that were computed; 1: all of them
    error: float  # the largest that was measured and kept, relative norm
    fallbacks: int  # calls that were off by more than the tolerance, and were done again


class SparseAttention:
    """The state of one video's sparse attention on one device, for all layers.

    Args:
        tolerance: relative norm by which a layer's attention may be off.
        seed: of the queries that are drawn.
        fixed_mass: a mass for all layers, which never changes; for measurements.
        sees_all: computes all keys, on a rank that has no room or kernel for less, and reports it.
    """

    def __init__(
        self,
        tolerance: float,
        seed: int,
        device: torch.device,
        fixed_mass: float | None = None,
        *,
        sees_all: bool = False,
    ) -> None:
        self.tolerance = tolerance
        self.fixed_mass = fixed_mass
        self.sees_all = sees_all
        self.generator = torch.Generator(device).manual_seed(seed)
        self._layers: dict[tuple[int, int], LayerSparsity] = {}
        self._densities: list[float] = []
        self._largest_error = 0.0
        self._fallbacks = 0
        self._report_of_all: SparsityReport | None = None

    def layer(self, index: int, stream: int, tokens: "TokenBlocks") -> "LayerSparsity":
        """That of a layer, for one of the samples that pass it."""
        layer = self._layers.setdefault((index, stream), LayerSparsity(self, self.fixed_mass))
        layer.tokens = tokens
        return layer

    def record(self, density: float, error: float, *, is_fallback: bool = False) -> None:
        """Notes a call."""
        self._densities.append(1.0 if is_fallback else density)
        self._fallbacks += is_fallback
        if not is_fallback:
            self._largest_error = max(self._largest_error, error)

    def share_report(self, gather: Callable[[Sequence[float]], list[list[float]]]) -> None:
        """Has `report` tell of all ranks from now on. Each calls this once, after its last call.

        `gather` gives the numbers of all ranks; each has attended as often.
        """
        densities, errors, fallbacks = zip(*gather(self.report()), strict=True)
        density = sum(densities) / len(densities)
        self._report_of_all = SparsityReport(density, max(errors), int(sum(fallbacks)))

    def report(self) -> SparsityReport:
        """What the calls so far did, on this rank or on all."""
        if self._report_of_all is not None:
            return self._report_of_all
        density = sum(self._densities) / len(self._densities) if self._densities else 1.0
        return SparsityReport(density, self._largest_error, self._fallbacks)


class TokenBlocks:
    """The tokens of one sample in their blocks: which of them see all, and which all see.

    Args:
        audio_gate: (1, S, 1 + T, 1), how much of the audio each image token gets: the face mask.
        num_text: valid text tokens, which follow the image's.
    """

    def __init__(self, audio_gate: Tensor, num_text: int) -> None:
        in_face = audio_gate.flatten() > 0
        self.num_image = len(in_face)
        self.num_tokens = self.num_image + num_text
        count = math.ceil(self.num_tokens / BLOCK)
        device = audio_gate.device
        self.sizes = torch.full((count,), float(BLOCK), device=device)  # (k,)
        self.sizes[-1] = self.num_tokens - BLOCK * (count - 1)
        is_text = torch.arange(count, device=device) >= self.num_image // BLOCK
        padded = torch.zeros(count * BLOCK, dtype=torch.bool, device=device)
        padded[: self.num_image] = in_face
        self.dense = padded.view(count, BLOCK).any(1) | is_text  # (q,): these see all
        places = torch.arange(count, device=device)
        is_near = (places[:, None] - places).abs() <= 1
        self.required = is_near | is_text  # (q, k)
        self.queries = torch.arange(self.num_tokens, device=device)[
            ~self.dense.repeat_interleave(BLOCK)[: self.num_tokens]
        ]  # those that do not see all

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (R,) int64
        """Some of the queries that do not see all."""
        places = torch.randint(
            len(self.queries), (count,), generator=generator, device=self.queries.device
        )
        return self.queries[places]


@dataclass
class LayerSparsity:
    """One layer's share of it: with a mass it attends to chosen blocks; without, to all."""

    whole: SparseAttention
    mass: float | None = None
    _calls_to_wait: int = 0  # before a mass is looked for again
    _longest_wait: int = 0
    tokens: TokenBlocks = field(init=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dense: Dense) -> Tensor:
        """Softmax attention within the tolerance, 3 x (1, N, h, D/h) -> (1, N, h, D/h).

        `dense` computes all of it.
        """
        whole, tokens = self.whole, self.tokens
        if not len(tokens.queries):  # a face that fills the picture
            return dense(query, key, value)
        if whole.sees_all:
            whole.record(1.0, 0.0)
            return dense(query, key, value)
        if self.mass is None:
            if self._calls_to_wait == 0:
                self._calibrate(query, key, value)
            else:
                self._calls_to_wait -= 1
            whole.record(1.0, 0.0)
            return dense(query, key, value)
        blocks = ChosenBlocks.of(query, key, value, tokens, self.mass)
        attended = attend_sparsely(query, key, value, blocks)
        rows = tokens.draw(MEASURING_QUERIES, whole.generator)
        exact = few_queries(query[:, rows], key, value)
        off = (attended[:, rows] - exact).float().norm() / exact.float().norm()
        density, error = torch.stack([blocks.density, off]).tolist()
        if whole.fixed_mass is not None or error <= whole.tolerance:
            whole.record(density, error)
            if whole.fixed_mass is None and error < RELAXED_ERROR * whole.tolerance:
                self.mass = max((each for each in MASSES if each < self.mass), default=self.mass)
            return attended
        whole.record(density, error, is_fallback=True)
        attended = dense(query, key, value)
        self._calibrate(query, key, value)
        return attended

    def _calibrate(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Chooses the smallest mass that keeps within the tolerance; none where that is dear."""
        tokens, tolerance = self.tokens, self.whole.tolerance
        rows = tokens.draw(CALIBRATING_QUERIES, self.whole.generator)
        errors, densities = error_curve(query, key, value, tokens, rows)
        fitting = [
            mass
            for mass, error, density in zip(MASSES, errors, densities, strict=True)
            if error <= CALIBRATED_ERROR * tolerance and density <= DENSEST
        ]
        self.mass = min(fitting, default=None)
        if self.mass is None:  # looking costs a sixth of what it could save
            self._calls_to_wait, self._longest_wait = self._longest_wait, 2 * self._longest_wait + 1


@dataclass(frozen=True)
class ChosenBlocks:
    """The blocks of keys that each block of queries sees, and what stands for the others."""

    chosen: Tensor  # (h, q, k) bool
    counts: Tensor  # (h, q) int32
    indices: Tensor  # (h, q, k) int32, in order
    keys: Tensor  # (1, k, h, D/h), means, as are values
    values: Tensor

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, tokens: TokenBlocks, mass: float
    ) -> "ChosenBlocks":
        """Those of a mass, by the means of queries and keys."""
        keys = block_means(key)
        scores = block_scores(block_means(query), keys, tokens.sizes)
        chosen = choose_blocks(scores, tokens.required, tokens.dense, mass)
        values = block_means(value)
        return cls(*chosen, keys.to(key.dtype)[None], values.to(value.dtype)[None])

    @property
    def density(self) -> Tensor:  # ()
        """The share of all blocks that are chosen."""
        return self.counts.float().mean() / self.chosen.shape[2]


def block_means(x: Tensor) -> Tensor:  # (1, N, h, D/h) -> (k, h, D/h), float32 at least
    """The mean of each block."""
    precise = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[1] // BLOCK
    whole, rest = x[0, : count * BLOCK], x[0, count * BLOCK :]
    means = whole.unflatten(0, (count, BLOCK)).mean(1, dtype=precise)
    if not len(rest):
        return means
    return torch.cat([means, rest.mean(0, keepdim=True, dtype=precise)])


def block_scores(
    queries: Tensor,  # (q, h, D/h), means, as are keys (k, h, D/h)
    keys: Tensor,
    sizes: Tensor,  # (k,)
) -> Tensor:  # (h, q, k)
    """Logarithms of what blocks of keys weigh together, by their means."""
    scale = queries.shape[-1] ** -0.5
    scores = torch.matmul(queries.transpose(0, 1), keys.permute(1, 2, 0)) * scale
    return scores + sizes.log()


def attend_sparsely(query: Tensor, key: Tensor, value: Tensor, blocks: ChosenBlocks) -> Tensor:
    """Attention to the chosen blocks, and to the means of the others, (1, N, h, D/h).

    On a GPU by FlashAttention 4; elsewhere by PyTorch's operators.
    """
    if not query.is_cuda:
        return attend_sparsely_by_torch(query, key, value, blocks)
    attended, sums = flash_attention_4.attend_blocks(
        query, key, value, blocks.counts, blocks.indices
    )
    mask = blocks.chosen.view(torch.uint8)
    skipped, skipped_sums = flash_attention_4.attend_unmasked(
        query, blocks.keys, blocks.values, mask
    )
    return merge_attended(attended, skipped, sums, skipped_sums, math.log(BLOCK))


def attend_sparsely_by_torch(
    query: Tensor, key: Tensor, value: Tensor, blocks: ChosenBlocks
) -> Tensor:
    """The same by PyTorch's operators, in chunks of the blocks of queries."""
    _, num_tokens, heads, _ = query.shape
    precise = torch.promote_types(query.dtype, torch.float32)
    queries, keys, values = (x[0].transpose(0, 1).to(precise) for x in (query, key, value))
    all_keys = torch.cat([keys, blocks.keys[0].transpose(0, 1).to(precise)], dim=1)
    all_values = torch.cat([values, blocks.values[0].transpose(0, 1).to(precise)], dim=1)
    bytes_a_block = heads * BLOCK * all_keys.shape[1] * precise.itemsize
    chunk = BLOCK * max(1, CHUNK_BYTES // bytes_a_block)
    attended = torch.empty_like(query)
    for start in range(0, num_tokens, chunk):
        part = queries[:, start : start + chunk]  # (h, n, D/h)
        chosen = blocks.chosen[:, start // BLOCK : (start + chunk) // BLOCK]
        chosen = chosen.repeat_interleave(BLOCK, 1)[:, : part.shape[1]]
        seen = chosen.repeat_interleave(BLOCK, 2)[:, :, :num_tokens]
        bias = all_keys.new_zeros(seen.shape[:2] + all_keys.shape[1:2])
        bias[..., :num_tokens].masked_fill_(~seen, -math.inf)
        bias[..., num_tokens:] = math.log(BLOCK)
        bias[..., num_tokens:].masked_fill_(chosen, -math.inf)
        found = scaled_dot_product_attention(part, all_keys, all_values, attn_mask=bias)
        attended[0, start : start + chunk] = found.transpose(0, 1)
    return attended


def few_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (1, R, h, D/h)
    """Attention of few queries to all keys."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    # FlashAttention 2 divides the keys among the GPU's processors where there are few queries.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query.is_cuda else nullcontext():
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def error_curve(
    query: Tensor,  # (1, N, h, D/h), as are key and value
    key: Tensor,
    value: Tensor,
    tokens: TokenBlocks,
    rows: Tensor,  # (R,)
) -> tuple[list[float], list[float]]:
    """For each of `MASSES` by how much the drawn queries would be off, and at what density."""
    key_means, value_means = block_means(key), block_means(value)  # (k, h, D/h)
    query_means = block_means(query)[rows // BLOCK]  # (R, h, D/h)
    required = tokens.required[rows // BLOCK]
    heads, count = query.shape[2], len(tokens.sizes)
    padded = count * BLOCK - tokens.num_tokens
    chunk = max(1, CHUNK_BYTES // (4 * len(rows) * count * max(BLOCK, query.shape[3])))
    squares = query_means.new_zeros(1 + len(MASSES))
    chosen_blocks = query_means.new_zeros(len(MASSES))
    for start in range(0, heads, chunk):
        part = slice(start, start + chunk)
        shares = block_scores(query_means[:, part], key_means[:, part], tokens.sizes).softmax(-1)
        few, all_keys, all_values = (
            x[0].transpose(0, 1).to(query_means.dtype)
            for x in (query[:, rows, part], key[:, :, part], value[:, :, part])
        )
        few = few * few.shape[-1] ** -0.5
        scores = few @ all_keys.transpose(1, 2)  # (h, R, N)
        means = few @ key_means[:, part].permute(1, 2, 0)  # (h, R, k)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.nn.functional.pad((scores - largest).exp_(), (0, padded))
        weights = weights.unflatten(2, (count, BLOCK))  # (h, R, k, BLOCK)
        all_values = torch.nn.functional.pad(all_values, (0, 0, 0, padded))
        sums = weights.sum(-1)  # (h, R, k)
        found = torch.einsum("hrkn,hknd->hrkd", weights, all_values.unflatten(1, (count, BLOCK)))
        mean_sums = tokens.sizes * (means - largest).exp()
        mean_found = mean_sums[..., None] * value_means[:, part].transpose(0, 1)[:, None]
        exact = found.sum(2) / sums.sum(2, keepdim=True)
        squares[0] += exact.square().sum()
        total, total_sums = found - mean_found, sums - mean_sums
        base, base_sums = mean_found.sum(2), mean_sums.sum(2, keepdim=True)
        for place, mass in enumerate(MASSES):
            chosen = _fewest(shares, required, mass)
            numbers = chosen.to(total.dtype)
            top = base + torch.einsum("hrk,hrkd->hrd", numbers, total)
            bottom = base_sums + (numbers * total_sums).sum(2, keepdim=True)
            squares[1 + place] += (top / bottom - exact).square().sum()
            chosen_blocks[place] += numbers.sum()
    errors = (squares[1:] / squares[0]).sqrt()
    densities = chosen_blocks / (heads * len(rows) * count)
    return errors.tolist(), densities.tolist()


def _fewest(shares: Tensor, required: Tensor, mass: float) -> Tensor:
    dense = torch.zeros(shares.shape[1], dtype=torch.bool, device=shares.device)
    chosen, _, _ = choose_blocks(shares.log(), required, dense, mass)
    return chosen


def sparse_attention_works(device: torch.device) -> bool:
    """Whether this GPU computes what PyTorch's operators do: some kernels ignore the blocks."""
    error = sparse_error(device)
    if not error < LARGEST_ERROR:
        reason = flash_attention_4.why_not() or f"its error is {error}"
        logger.info("attention sees all keys in every preset: %s", reason)
    return error < LARGEST_ERROR


def sparse_error(device: torch.device) -> float:
    """How far it is on this GPU from PyTorch's operators; infinite: it does not run."""
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, heads, width = 4243, 24, 128
    shape = (3, 1, num_tokens, heads, width)
    query, key, value = torch.randn(shape, generator=generator, device=device).bfloat16()
    gate = torch.zeros(1, num_tokens - 300, 1, 1, device=device)
    try:
        blocks = ChosenBlocks.of(query, key, value, TokenBlocks(gate, 300), 0.3)
        found = attend_sparsely(query, key, value, blocks).float()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a package that does not fit this GPU raises
        logger.info("sparse attention does not run here: %s", error)
        return math.inf
    exact = attend_sparsely_by_torch(query.float(), key.float(), value.float(), blocks)
    return ((found - exact).norm() / exact.norm()).item()
