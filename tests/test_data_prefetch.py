"""The thread that makes batches ahead: order, errors, and an end that leaves no thread behind."""

import threading
import time

import pytest
from conftest import HANGS

from unidetox_jax import data


def threads() -> set[threading.Thread]:
    """Those of grain's that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}


def ended(some: set[threading.Thread]) -> bool:
    """Whether they end; leaving the context tells them to, and does not wait."""
    for thread in some:
        thread.join(timeout=60)
    return not any(thread.is_alive() for thread in some)


def test_items_in_order_then_the_end():
    with data.ahead(lambda step: step * step, 3, 8) as made:
        assert list(made) == [step * step for step in range(3, 8)]
        assert list(made) == []
    assert ended(threads())


@pytest.mark.parametrize("start", [0, 4])
def test_nothing_to_do(start):
    with data.ahead(lambda step: step, start, start) as made:
        assert list(made) == []


def test_it_works_ahead_but_not_too_far():
    begun = []
    with data.ahead(lambda step: begun.append(step) or step, 0, 100) as made:
        assert next(made) == 0
        deadline = time.monotonic() + HANGS
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert begun == [0, 1, 2], "one taken, two waiting"


def test_an_error_is_raised_where_the_item_would_have_come():
    def make(step):
        if step == 2:
            raise ValueError("no such batch")
        return step

    taken = []
    with data.ahead(make, 0, 5) as made, pytest.raises(ValueError, match="no such batch"):
        taken.extend(made)
    assert taken == [0, 1]


def test_leaving_in_the_middle_ends_the_thread():
    with data.ahead(lambda step: step, 0, 10**9) as made:
        assert next(made) == 0
        [thread] = threads()
    assert ended({thread})
