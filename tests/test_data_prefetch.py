"""Prefetching: order, errors, and no thread left behind."""

import threading
import time

import pytest
from conftest import HANGS

from unidetox_jax import data


def threads() -> set[threading.Thread]:
    """grain's live threads."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}


def ended(threads: set[threading.Thread]) -> bool:
    """Whether the threads end; leaving the context asks them to, but does not wait."""
    for thread in threads:
        thread.join(timeout=60)
    return not any(thread.is_alive() for thread in threads)


def test_items_come_in_order_and_end():
    with data.prefetch(lambda step: step * step, 3, 8) as items:
        assert list(items) == [step * step for step in range(3, 8)]
        assert list(items) == []
    assert ended(threads())


@pytest.mark.parametrize("start", [0, 4])
def test_empty_range(start):
    with data.prefetch(lambda step: step, start, start) as items:
        assert list(items) == []


def test_two_items_are_prepared_ahead():
    begun = []
    with data.prefetch(lambda step: begun.append(step) or step, 0, 100) as items:
        assert next(items) == 0
        deadline = time.monotonic() + HANGS
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert begun == [0, 1, 2], "one taken, two waiting"


def test_error_is_raised_in_place_of_its_item():
    def make(step):
        if step == 2:
            raise ValueError("no such batch")
        return step

    taken = []
    with data.prefetch(make, 0, 5) as items, pytest.raises(ValueError, match="no such batch"):
        taken.extend(items)
    assert taken == [0, 1]


def test_leaving_early_ends_the_thread():
    before = threads()  # of contexts that other tests left and that are still ending
    with data.prefetch(lambda step: step, 0, 10**9) as items:
        assert next(items) == 0
        own = threads() - before
    assert own and ended(own)
