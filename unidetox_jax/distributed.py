"""Several processes as one run: they start together, watch each other, and end together.

`initialize` must run before anything asks jax for a device. The processes check each other's heartbeats more often
than jax does: when one dies, jax aborts all others with a stack trace that does not say which one it was.
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
from unidetox_jax.rendezvous import ProcessGroup, find_group, wait_for_all

START_TIMEOUT = 300  # seconds for all processes to arrive; a pod's hosts install packages at different speeds
BARRIER_TIMEOUT = 7 * 24 * 3600  # seconds: process 0 may be scoring text while the others wait
HEARTBEAT_TIMEOUT = 30.0  # seconds without a heartbeat after which a process counts as dead
HEARTBEAT_INTERVAL = 1.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which processes take part; not needed on Cloud TPU, GKE or under SLURM."""
    group = parser.add_argument_group("several processes (detected on Cloud TPU, GKE and under SLURM)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0 that all can reach")
    group.add_argument("--num_processes", type=int, metavar="N", help="1 alone: run as a single process")
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument("--coordinator_port", type=int, metavar="PORT", help="overrides the detected port")
    group.add_argument("--start_timeout", type=int, default=START_TIMEOUT, metavar="SECONDS", help="for all to arrive")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    coordinator_port: int | None = None,
    timeout: int = START_TIMEOUT,
) -> None:
    """Connects this process to the others of its run, if any, and turns on the compilation cache.

    Args:
      coordinator, num_processes, process_id: all three, or none: then they come from Cloud TPU, GKE or SLURM, or
        this process is alone.
      coordinator_port: replaces the port that jax detects (8482 on Cloud TPU).
      timeout: seconds to wait for all processes.

    Raises:
      UserError: some of the three are missing or wrong, or a process did not arrive: which ones.
    """
    group = find_group(coordinator, num_processes, process_id, coordinator_port, timeout)
    if group is not None:
        _connect(group, timeout)
    use_compilation_cache()


def _connect(group: ProcessGroup, timeout: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    wait_for_all(group, timeout)
    jax.distributed.initialize(
        group.coordinator,
        group.num_processes,
        group.process_id,
        local_device_ids=group.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        shutdown_timeout_seconds=60,
    )
    global _watchdog
    _watchdog = _Watchdog(group)


def use_compilation_cache() -> None:
    """Caches compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or the user's cache directory.

    Turned off on several CPU devices: XLA loads a cached program without the order of its collectives, which then
    wait for each other until the process aborts (JAX 0.10.2 to 0.12.0.1).
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax reads the switch once, and has read it by now
        return
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # defined by jax at run time
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "unidetox_jax", "jax"))


def is_main_process() -> bool:
    """Whether this is process 0, the one that writes text."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has reached it, however long that takes; earlier writes are then visible to all."""
    if _watchdog is not None:  # without the devices
        _watchdog.barrier(name)
    elif jax.process_count() > 1:  # the caller initialised jax.distributed itself
        multihost_utils.sync_global_devices(name)


def all_gather(name: str, value: str) -> list[str]:
    """Every process's value, in process order; all call it with the same name."""
    if _watchdog is not None:
        return _watchdog.all_gather(name, value)
    if jax.process_count() == 1:
        return [value]
    local = np.frombuffer(value.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(local)))  # over the devices: see `barrier`
    padded = multihost_utils.process_allgather(np.pad(local, (0, 1 + int(sizes.max()) - len(local))))
    return [row[:size].tobytes().decode() for row, size in zip(np.asarray(padded), sizes, strict=True)]


def broadcast(value: str) -> str:
    """Process 0's value, on every process: file systems may show a file to one host sooner than to another."""
    return all_gather("broadcast", value)[0]


def finish() -> None:
    """Waits until all processes are done, so that a late error in one still ends all."""
    if _watchdog is not None:
        _watchdog.finish()


def fail(line: str, exit_code: int) -> None:
    """Prints the line. In a run of several processes it also ends all of them and does not return."""
    if _watchdog is None:
        print(line, file=sys.stderr, flush=True)
    else:
        _watchdog.fail(line, exit_code)


_watchdog: "_Watchdog | None" = None


class _Watchdog:
    """A thread that sends this process's heartbeat and ends the process when another one has failed or died.

    It uses jax's coordination service, which works even while devices hang in a collective.
    """

    def __init__(self, group: ProcessGroup):
        from jax._src.distributed import global_state

        self.group = group
        self._client: Any = global_state.client
        self._ending = threading.Lock()
        self._calls = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._thread.start()

    def all_gather(self, name: str, value: str) -> list[str]:
        """Every process's value, in process order; all make the same calls in the same order."""
        self._calls += 1
        prefix = f"unidetox/{name}/{self._calls}"
        self._client.key_value_set(f"{prefix}/{self.group.process_id}", f"={value}")  # empty values are not stored
        return [
            self._client.blocking_key_value_get(f"{prefix}/{i}", BARRIER_TIMEOUT * 1000)[1:]
            for i in range(self.group.num_processes)
        ]

    def barrier(self, name: str) -> None:
        """Waits for all; the thread ends this process if one fails meanwhile."""
        self._calls += 1
        self._client.wait_at_barrier(f"unidetox/{name}/{self._calls}", BARRIER_TIMEOUT * 1000)

    def finish(self) -> None:
        """Waits for all, then disconnects."""
        self.barrier("finish")
        self._done.set()  # from here on a missing heartbeat means nothing
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, line: str, exit_code: int) -> None:
        """Ends this process, and all others with it."""
        if not self._ending.acquire(blocking=False):
            time.sleep(BARRIER_TIMEOUT)  # the other thread is ending this process
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        deadline = time.monotonic() + _grace(exit_code) + 4 * HEARTBEAT_INTERVAL
        with contextlib.suppress(Exception):  # process 0 is gone
            self._client.key_value_set(f"unidetox/failed/{self.group.process_id}", f"{exit_code} {line}")
            if self.group.process_id == 0:  # it hosts the service through which the others learn of this
                while time.monotonic() < deadline and len(self._values("failed")) < self.group.num_processes:
                    time.sleep(0.1)
                time.sleep(HEARTBEAT_INTERVAL)  # who has just reported may still be ending; jax would abort it
        os._exit(exit_code)  # sys.exit would make jax wait for all others

    def _values(self, kind: str) -> dict[int, str]:
        """Process id → its value."""
        entries = self._client.key_value_dir_get(f"unidetox/{kind}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in entries}

    def _run(self) -> None:
        # A process that dies before its first heartbeat is noticed as well
        last = {index: ("", time.monotonic()) for index in range(self.group.num_processes)}
        for beat in itertools.count():
            if self._done.wait(HEARTBEAT_INTERVAL):
                return
            try:
                self._client.key_value_set(f"unidetox/alive/{self.group.process_id}", str(beat), allow_overwrite=True)
                beats, failed = self._values("alive"), self._values("failed")
            except Exception:  # the service is gone, and process 0 with it
                return self.fail("unidetox: process 0 is gone; the same command continues", 1)
            if failed:
                index, message = min(failed.items())
                code, line = message.split(" ", 1)
                time.sleep(_grace(int(code)))  # usually this process is about to report the same error itself
                return self.fail(f"{line} (process {index})", int(code))
            now = time.monotonic()
            last |= {index: (value, now) for index, value in beats.items() if last[index][0] != value}
            silent = [str(index) for index, (_, at) in last.items() if now - at > HEARTBEAT_TIMEOUT]
            if silent:
                text = f"process {', '.join(silent)} gave no sign of life for {HEARTBEAT_TIMEOUT:.0f} s"
                return self.fail(f"unidetox: {text}; the same command continues", 1)


def _grace(exit_code: int) -> float:
    """Seconds a process has to end by itself: after a request to save it may still be writing."""
    return 30.0 if exit_code == Preempted.exit_code else 2.0
