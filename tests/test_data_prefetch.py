"""The thread that makes batches ahead: order, errors, and an end that leaves no thread behind."""

import threading
import time

import pytest
from conftest import HANGS

from unidetox_jax import data


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_steps_in_order_then_the_end():
    with data.Prefetch(lambda step: step * step, 3, 8) as ahead:
        assert list(ahead) == [(step, step * step) for step in range(3, 8)]
        assert list(ahead) == []
    assert not alive()


def test_nothing_to_do():
    with data.Prefetch(lambda step: step, 4, 4) as ahead:
        assert list(ahead) == []


def test_it_works_ahead_but_not_too_far():
    made = []
    with data.Prefetch(lambda step: made.append(step) or step, 0, 100, depth=2) as ahead:
        items = iter(ahead)
        assert next(items) == (0, 0)
        deadline = time.monotonic() + HANGS
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3], "one taken, two waiting, one in hand"
    assert not alive()


def test_an_error_is_raised_where_the_item_would_have_come():
    def make(step):
        if step == 2:
            raise ValueError("no such batch")
        return step

    taken = []
    with data.Prefetch(make, 0, 5) as ahead:
        with pytest.raises(ValueError, match="no such batch"):
            taken.extend(iter(ahead))
        assert list(ahead) == []
    assert not alive()


def test_leaving_in_the_middle_ends_the_thread():
    ahead = data.Prefetch(lambda step: step, 0, 10**9)
    assert next(iter(ahead)) == (0, 0)
    ahead.close()
    ahead.close()
    assert not alive()
