"""Several processes as one run: they meet, they watch one another, and they end together.

`initialize` is the first thing that a command does, before anything asks jax for a device. The processes look at one
another's signs of life more often than jax does: where one dies, jax aborts all others with a stack trace that names
nobody.
"""

import argparse
import contextlib
import itertools
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from unidetox_jax.errors import Preempted
from unidetox_jax.rendezvous import Members, find_members, meet

START_TIMEOUT = 300  # seconds for all processes to come; a pod's hosts install packages at different speeds
WAIT = 7 * 24 * 3600  # seconds at a barrier: process 0 may be scoring text while the others wait
SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead
INTERVAL = 1.0  # seconds between signs of life


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says who takes part; none of it is needed on Cloud TPU or under SLURM."""
    group = parser.add_argument_group("several processes (found out by themselves on Cloud TPU, GKE and under SLURM)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0 that all can reach")
    group.add_argument("--num_processes", type=int, metavar="N", help="1, and nothing else: this one is alone")
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument("--coordinator_port", type=int, metavar="PORT", help="where it is found out: another port")
    group.add_argument("--start_timeout", type=int, default=START_TIMEOUT, metavar="SECONDS", help="for all to come")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    coordinator_port: int | None = None,
    timeout: int = START_TIMEOUT,
) -> None:
    """Makes this process one of a run's, where there are several, and switches on the compilation cache.

    Args:
      coordinator, num_processes, process_id: all three, or none: then Cloud TPU, GKE or SLURM say it, or it is one.
      coordinator_port: the port in place of the one that jax chooses there (8482 on Cloud TPU).
      timeout: seconds to wait for all of them.

    Raises:
      UserError: some of the three are missing or wrong, or a process did not come: which ones.
    """
    members = find_members(coordinator, num_processes, process_id, coordinator_port, timeout)
    if members is not None:
        _join(members, timeout)
    use_compilation_cache()


def _join(members: Members, timeout: int) -> None:
    """Makes this process one of several."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    meet(members, timeout)
    jax.distributed.initialize(
        members.coordinator,
        members.count,
        members.index,
        local_device_ids=members.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        shutdown_timeout_seconds=60,
    )
    global _watch
    _watch = _Watch(members)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk: in JAX_COMPILATION_CACHE_DIR, or in the user's cache directory.

    Several CPU devices keep nothing: XLA reads a program for them back without the order of its collectives, which
    then wait for one another until the process aborts (JAX 0.10.2 to 0.12.0.1).
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax has asked for the switch by now, and asks once
        return
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # made by jax at run time
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "unidetox_jax", "jax"))


def first_process() -> bool:
    """Whether this process is the one that writes text."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here, however long it takes: what one wrote before it, all see after it."""
    if _watch is not None:  # the devices are not asked
        _watch.barrier(name)
    elif jax.process_count() > 1:  # jax.distributed was initialised by somebody else
        multihost_utils.sync_global_devices(name)


def exchange(name: str, value: str) -> list[str]:
    """Every process's value, in their order; all call it alike."""
    if _watch is not None:
        return _watch.exchange(name, value)
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(value.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own)))  # by the devices: see `barrier`
    everyone = multihost_utils.process_allgather(np.pad(own, (0, 1 + int(sizes.max()) - len(own))))
    return [row[:size].tobytes().decode() for row, size in zip(np.asarray(everyone), sizes, strict=True)]


def as_first_says(value: str) -> str:
    """Process 0's value, on every process: file systems may show the same file sooner to one host than to another."""
    return exchange("said", value)[0]


def finish() -> None:
    """Waits until all processes have come to their end, so that a late error of one still ends all."""
    if _watch is not None:
        _watch.finish()


def fail(line: str, exit_code: int) -> None:
    """Says the line and, where there are several processes, ends all of them with it; otherwise it returns."""
    if _watch is None:
        print(line, file=sys.stderr, flush=True)
    else:
        _watch.fail(line, exit_code)


_watch: "_Watch | None" = None


class _Watch:
    """A thread that tells the others that this process lives, and ends it when one of them has failed or is gone.

    It speaks over jax's coordination service, which works while the devices of others hang in a collective.
    """

    def __init__(self, members: Members):
        from jax._src.distributed import global_state

        self.members = members
        self._client: Any = global_state.client
        self._ending = threading.Lock()
        self._rounds = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def exchange(self, name: str, value: str) -> list[str]:
        """Every process's value, in their order; all call it alike."""
        self._rounds += 1
        prefix = f"unidetox/{name}/{self._rounds}"
        self._client.key_value_set(f"{prefix}/{self.members.index}", f"={value}")  # an empty value is none
        return [
            self._client.blocking_key_value_get(f"{prefix}/{i}", WAIT * 1000)[1:] for i in range(self.members.count)
        ]

    def barrier(self, name: str) -> None:
        """Waits for all; the watch ends the process if one fails meanwhile."""
        self._rounds += 1
        self._client.wait_at_barrier(f"unidetox/{name}/{self._rounds}", WAIT * 1000)

    def finish(self) -> None:
        """Waits for all, then takes leave."""
        self.barrier("finish")
        self._over.set()  # from here on nobody's silence means anything
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, line: str, exit_code: int) -> None:
        """Ends this process, and all others with it."""
        if not self._ending.acquire(blocking=False):
            time.sleep(WAIT)  # the watch is ending this process
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        deadline = time.monotonic() + _grace(exit_code) + 4 * INTERVAL
        with contextlib.suppress(Exception):  # process 0 is gone
            self._client.key_value_set(f"unidetox/failed/{self.members.index}", f"{exit_code} {line}")
            if self.members.index == 0:  # it carries the service by which the others learn of this
                while time.monotonic() < deadline and len(self._values("failed")) < self.members.count:
                    time.sleep(0.1)
        os._exit(exit_code)  # not sys.exit: jax would wait for all others at its own end

    def _values(self, kind: str) -> dict[int, str]:
        """Process → what it said."""
        found = self._client.key_value_dir_get(f"unidetox/{kind}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in found}

    def _run(self) -> None:
        # One that dies before its first sign of life counts as well
        last = {index: ("", time.monotonic()) for index in range(self.members.count)}
        for beat in itertools.count():
            if self._over.wait(INTERVAL):
                return
            try:
                self._client.key_value_set(f"unidetox/alive/{self.members.index}", str(beat), allow_overwrite=True)
                seen, failed = self._values("alive"), self._values("failed")
            except Exception:  # the service is gone, and process 0 with it
                return self.fail("unidetox: process 0 is gone; the same command continues", 1)
            if failed:
                index, said = min(failed.items())
                code, line = said.split(" ", 1)
                time.sleep(_grace(int(code)))  # as a rule this process goes on to say the same thing itself
                return self.fail(f"{line} (process {index})", int(code))
            now = time.monotonic()
            last |= {index: (value, now) for index, value in seen.items() if last[index][0] != value}
            silent = [str(index) for index, (_, at) in last.items() if now - at > SILENCE]
            if silent:
                text = f"process {', '.join(silent)} gave no sign of life for {SILENCE:.0f} s"
                return self.fail(f"unidetox: {text}; the same command continues", 1)


def _grace(exit_code: int) -> float:
    """Seconds that a process has to end by itself: when all were told to save, it may be still writing."""
    return 30.0 if exit_code == Preempted.exit_code else 2.0
