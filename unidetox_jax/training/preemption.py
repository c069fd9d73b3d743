"""SIGTERM: the scheduler wants the machine back.

Inside the training loop it is noted, and the loop saves at a step's end; everywhere else nothing is lost by ending at
once, since what is on disk is whole. With several processes jax's own notifier listens, and all of them learn the one
step at which to save, whichever of them was told.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from unidetox_jax.errors import Preempted

# The sync point is a number of calls, the same for all processes, and must not start again with the next model.
_calls = itertools.count()


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Context: a function that says whether to save and stop now.

    Every process calls it once a step; the answer is the same for all.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_calls))
        return
    asked = threading.Event()
    with _handler(lambda *_: asked.set()):
        yield asked.is_set


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Context: SIGTERM ends the process with `Preempted`'s exit code, for work that the same command does again."""

    def end(*_) -> None:
        # Not an exception: libraries with a broad `except` would swallow it, and threads would hold the process.
        sys.stderr.write("unidetox: stopped by SIGTERM; the same command continues\n")
        sys.stderr.flush()
        os._exit(Preempted.exit_code)

    if jax.process_count() > 1:
        yield
        return
    with _handler(end):
        yield


@contextlib.contextmanager
def _handler(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
