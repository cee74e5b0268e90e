"""Two ranks share each pass: they compute what one does, with the same sparsity."""

import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.model.test_transformer import tiny_inputs, tiny_transformer
from tests.support.golden_transformer import relative_difference
from worker.model.context_parallel import ContextParallel
from worker.model.sparse_attention import SparseAttention
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

TOLERANCE = 1e-6
ATTENTION_TOLERANCE = 0.1
SMALL = {"num_layers": 2, "num_single_layers": 2}
SPARSE_LAYERS = 3  # the last one sees all keys
CPU = torch.device("cpu")


@dataclass
class Case:
    """A pass, and what one process made of it."""

    heads: int
    inputs: dict[str, Tensor]
    mass: float | None = None  # that sparse attention is held to; None: all keys
    sample: Tensor | None = None
    cached: Tensor | None = None  # by the tokens of that pass
    density: float = 1.0

    def model(self) -> HunyuanVideoAvatarTransformer3DModel:
        """In float64, so that no rounding decides about a block."""
        model = tiny_transformer(num_attention_heads=self.heads, **SMALL).double()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            # tokens look at those like them, and near them
            block.attn.to_k.load_state_dict(block.attn.to_q.state_dict())
            block.attn.norm_q.weight.fill_(2.5)
            block.attn.norm_k.weight.fill_(2.5)
        return model

    def sparsity(self) -> SparseAttention | None:
        return None if self.mass is None else SparseAttention(math.inf, 0, CPU, self.mass)

    def run(self, model: HunyuanVideoAvatarTransformer3DModel) -> tuple[Tensor, Tensor, float]:
        """The velocity, that by the tokens of the pass, and the density of this rank."""
        sparsity = self.sparsity()
        output = model(**self.inputs, return_cached_tokens=True, sparsity=sparsity)
        cached = model(**self.inputs, cached_tokens=output.cached_tokens).sample
        return output.sample, cached, 1.0 if sparsity is None else sparsity.report().density


def wide_inputs() -> dict[str, Tensor]:
    """45 columns, which two ranks cannot halve, with 1,535 tokens; two voices, each with a face."""
    generator = torch.Generator().manual_seed(3)
    inputs = tiny_inputs(5, num_frames=33)
    for name in ("hidden_states", "reference_latents"):
        inputs[name] = torch.randn(1, 4, 33, 10, 18, generator=generator)
    audio = inputs["audio_embeds"]
    inputs["audio_embeds"] = torch.cat([audio, audio.flip(1)])
    face_mask = torch.zeros(1, 2, 1, 10, 18)
    face_mask[:, 0, :, 4:6, 2:4] = face_mask[:, 1, :, 4:6, 12:14] = 1
    return inputs | {"face_mask": face_mask}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.slow
def test_two_ranks_together_compute_what_one_does(tmp_path: Path) -> None:
    cases = [
        Case(4, tiny_inputs(6, 5)),
        Case(1, tiny_inputs(5)),
        Case(3, wide_inputs()),
        Case(4, wide_inputs(), mass=0.3),
    ]
    for case in cases:
        case.sample, case.cached, case.density = case.run(case.model())
    sparse = cases[-1]
    assert sparse.density < 0.8
    assert sparse.sample is not None
    all_keys = sparse.model()(**sparse.inputs).sample
    assert relative_difference(sparse.sample, all_keys) > 100 * TOLERANCE
    torch.save([vars(case) for case in cases], tmp_path / "cases")

    spawn(run_rank, args=(tmp_path, free_port()), nprocs=2)


def run_rank(rank: int, directory: Path, port: int) -> None:
    """One of two processes, each with half of the tokens."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    parallel = ContextParallel(dist.group.WORLD)
    cases = [Case(**told) for told in torch.load(directory / "cases")]
    with torch.inference_mode():
        for case in cases:
            model = case.model()
            model.context_parallel = parallel
            sample, cached, density = case.run(model)
            assert case.sample is not None
            assert case.cached is not None
            assert relative_difference(sample, case.sample) < TOLERANCE
            assert relative_difference(cached, case.cached) < TOLERANCE
            [[first], [second]] = gathered([density])
            assert (first + second) / 2 == pytest.approx(case.density)
        keep_to_the_tolerance(cases[-1], parallel)
    dist.destroy_process_group()


def keep_to_the_tolerance(case: Case, parallel: ContextParallel) -> None:
    """Passes in which each rank decides for its own heads, and one of them falls back alone."""
    model = case.model()
    model.context_parallel = parallel
    rank = parallel.group.rank()
    all_keys = model(**case.inputs).sample
    sparsity = SparseAttention(ATTENTION_TOLERANCE, rank, CPU)
    with pytest.MonkeyPatch.context() as patch:
        exchanges: list[str] = []

        def count(name: str, exchange: Callable[..., Any]) -> None:
            def counted(*arguments: Any, **named: Any) -> Any:
                exchanges.append(name)
                return exchange(*arguments, **named)

            patch.setattr(dist, name, counted)

        for name in ("batch_isend_irecv", "all_to_all_single"):
            count(name, getattr(dist, name))
        # a layer swaps queries, keys, values and what is attended; then comes the velocity
        expected = 4 * (SPARSE_LAYERS + 1) * ["batch_isend_irecv"] + ["all_to_all_single"]
        for tolerance in (ATTENTION_TOLERANCE, ATTENTION_TOLERANCE, 1e-9):
            if rank == 1:
                sparsity.tolerance = tolerance
            found = model(**case.inputs, sparsity=sparsity).sample
            assert relative_difference(found, all_keys) < ATTENTION_TOLERANCE
            assert exchanges == expected  # whatever a rank decides
            exchanges.clear()
    own = sparsity.report()
    assert own.fallbacks == rank * SPARSE_LAYERS
    sparsity.share_report(gathered)
    assert sparsity.report().fallbacks == SPARSE_LAYERS
    assert sparsity.report().density < 1
    assert own.error <= sparsity.report().error <= ATTENTION_TOLERANCE


def gathered(numbers: Any) -> list[list[float]]:
    """Those of both ranks."""
    found: list[list[float]] = [[], []]
    dist.all_gather_object(found, list(numbers))
    return found


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
