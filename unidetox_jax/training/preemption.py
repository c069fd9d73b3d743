"""SIGTERM from a scheduler that reclaims the machine.

The training loop saves at the end of a step. Everywhere else the process exits at once, which loses nothing, since
files on disk are always complete. With several processes, JAX's own notifier listens, and all of them agree on the step
at which to save.
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

# JAX identifies sync points by a number, which all processes must count alike and never reuse.
_calls = itertools.count()


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Context: a function that tells whether to save and stop, to be called by every process once per step.

    All processes get the same answer.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_calls))
        return
    received = threading.Event()
    with _handler(lambda *_: received.set()):
        yield received.is_set


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Context: SIGTERM ends the process with `Preempted`'s exit code, for work that the same command repeats."""

    def terminate(*_) -> None:
        # Not an exception: libraries with a broad `except` would swallow it, and threads would keep the process alive
        sys.stderr.write("unidetox: stopped by SIGTERM; the same command continues\n")
        sys.stderr.flush()
        os._exit(Preempted.exit_code)

    if jax.process_count() > 1:
        yield
        return
    with _handler(terminate):
        yield


@contextlib.contextmanager
def _handler(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread can
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
