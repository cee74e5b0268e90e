"""Items made ahead of their use."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from worker.generation.prefetch import prefetch

DEADLINE_SECONDS = 30


class Maker:
    """Makes numbers; says which it has begun, and whether it was left before its end."""

    def __init__(self, count: int, failing: BaseException | None = None) -> None:
        self.begun = [threading.Event() for _ in range(count)]
        self.threads: set[threading.Thread] = set()
        self.is_left = False
        self._failing = failing

    def __iter__(self) -> Iterator[int]:
        try:
            for number, begun in enumerate(self.begun):
                begun.set()
                self.threads.add(threading.current_thread())
                yield number
            if self._failing is not None:
                raise self._failing
        except GeneratorExit:
            self.is_left = True
            raise


def test_the_items_are_the_iterator_s_in_order() -> None:
    assert list(prefetch(iter(range(100)))) == list(range(100))
    assert list(prefetch(iter(()))) == []


def test_one_item_is_made_while_the_one_before_is_used_and_no_more() -> None:
    maker = Maker(3)
    with closing(prefetch(iter(maker))) as items:
        assert next(items) == 0
        assert maker.begun[1].wait(DEADLINE_SECONDS)
        assert not maker.begun[2].is_set()
        assert next(items) == 1
        assert maker.begun[2].wait(DEADLINE_SECONDS)
    assert threading.current_thread() not in maker.threads


def test_a_failure_comes_out_unchanged_after_the_items_before_it() -> None:
    failure = ValueError("a fault of the GPU")
    items = prefetch(iter(Maker(2, failure)))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="a fault of the GPU") as caught:
        next(items)
    assert caught.value is failure


def test_a_user_that_stops_leaves_nothing_behind() -> None:
    maker = Maker(5)

    def stop_after(number: int) -> None:
        with closing(prefetch(iter(maker))) as items:
            for item in items:
                if item == number:
                    raise InterruptedError

    with pytest.raises(InterruptedError):
        stop_after(1)
    assert not any(thread.is_alive() for thread in maker.threads)
    assert not maker.begun[3].is_set()
    assert maker.is_left


def test_a_failure_that_nobody_waits_for_is_not_raised_when_the_user_stops() -> None:
    maker = Maker(1, ValueError("too late"))
    items = prefetch(iter(maker))
    assert next(items) == 0
    items.close()
    assert not any(thread.is_alive() for thread in maker.threads)
