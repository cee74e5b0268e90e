"""The process group in real processes: two ranks and four, with gloo on the CPU."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.multi_gpu import group_rank
from worker.multi_gpu.process_group import tensor_specs

FOUR = pytest.mark.parametrize("ranks", [4], ids=["four ranks"], indirect=True)


class Ranks:
    """The tests' ends of the pipes to all ranks of a group."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def __len__(self) -> int:
        return len(self._pipes)

    def ask(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Has the rank call a function of `group_rank`; `answer` waits for it."""
        self._pipes[rank].send((function, arguments))

    def answer(self, rank: int) -> Any:
        assert self._pipes[rank].poll(60.0), f"rank {rank} does not answer"
        answer = self._pipes[rank].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def all(self, function: Callable[..., Any], *arguments: Any, active: int = 0) -> list[Any]:
        """The answers of all ranks, or of the first so many."""
        ranks = range(active or len(self._pipes))
        for rank in ranks:
            self.ask(rank, function, *arguments)
        return [self.answer(rank) for rank in ranks]


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranks]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([group_rank.__name__])  # torch is imported once for all
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    pipes, processes = [], []
    for rank in range(request.param):
        ours, theirs = context.Pipe()
        arguments = (rank, request.param, rendezvous, theirs)
        process = context.Process(target=group_rank.run, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    yield Ranks(pipes)
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(10.0)
        process.kill()
        process.join()


def test_each_cfg_branch_has_its_own_half_of_the_ranks(ranks: Ranks) -> None:
    places = ranks.all(group_rank.place)
    half = len(places) // 2
    assert places == [(rank, int(rank >= half)) for rank in range(2 * half)]


def test_a_broadcast_gives_all_ranks_the_tensor_of_rank_0(ranks: Ranks) -> None:
    for answer in ranks.all(group_rank.broadcast, 2):
        assert answer == [0.0, 0.0]


@FOUR
def test_a_broadcast_of_one_branch_leaves_the_other_branchs_ranks_alone(ranks: Ranks) -> None:
    for answer in ranks.all(group_rank.broadcast, 1, active=2):
        assert answer == [0.0, 0.0]


def test_an_all_gather_gives_the_velocities_in_the_order_of_the_branches(ranks: Ranks) -> None:
    answers = ranks.all(group_rank.all_gather)
    half = len(answers) // 2
    for rank, answer in enumerate(answers):
        first = rank % half  # its partner in the other branch is half of the ranks further
        assert answer == [[first, first], [first + half, first + half]]


def test_numbers_are_gathered_in_the_order_of_the_ranks(ranks: Ranks) -> None:
    expected = [[rank, 1 / 3] for rank in range(len(ranks))]
    for answer in ranks.all(group_rank.gather_numbers, 2):
        assert answer == expected


@FOUR
def test_numbers_of_one_branch_leave_the_other_branchs_ranks_alone(ranks: Ranks) -> None:
    for answer in ranks.all(group_rank.gather_numbers, 1, active=2):
        assert answer == [[0, 1 / 3], [1, 1 / 3]]


def test_a_value_arrives_with_its_tensors_bit_for_bit(ranks: Ranks) -> None:
    specs = tensor_specs(group_rank.values())
    assert "tensor(" not in repr(specs)
    ranks.ask(0, group_rank.send, 2)
    for rank in range(1, len(ranks)):
        ranks.ask(rank, group_rank.receive, specs, 2)
    assert [ranks.answer(rank) for rank in range(len(ranks))] == [None] + [True] * (len(ranks) - 1)


@pytest.mark.parametrize(
    ("num_columns", "num_text", "heads"),
    [(8, 4, 8), (9, 5, 6), (5, 3, 3)],
    ids=["even", "uneven", "more ranks than heads"],
)
def test_ranks_swap_their_tokens_for_heads_and_back(
    ranks: Ranks, num_columns: int, num_text: int, heads: int
) -> None:
    assert all(ranks.all(group_rank.swap_for_heads, num_columns, num_text, heads))


def test_a_group_whose_sum_is_right_passes_the_check(ranks: Ranks) -> None:
    for rank in range(len(ranks)):
        ranks.ask(rank, group_rank.check, rank + 1)
    assert [ranks.answer(rank) for rank in range(len(ranks))] == [None] * len(ranks)


def test_a_wrong_sum_is_told_by_every_rank(ranks: Ranks) -> None:
    for rank in range(len(ranks)):
        ranks.ask(rank, group_rank.check, 7)
    for rank in range(len(ranks)):
        with pytest.raises(RuntimeError, match="wrong numbers"):
            ranks.answer(rank)


def test_a_rank_gives_up_the_check_when_it_is_told_to(ranks: Ranks) -> None:
    ranks.ask(0, group_rank.check, 1, True)
    with pytest.raises(RuntimeError, match="do not reach each other"):
        ranks.answer(0)
    for rank in range(1, len(ranks)):  # its part of the sum arrives all the same
        ranks.ask(rank, group_rank.check, rank + 1)
    for rank in range(1, len(ranks)):
        assert ranks.answer(rank) is None
