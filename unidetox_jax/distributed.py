"""Several processes as one run: they meet, they watch one another, and they end together.

`initialize` is the first thing that a command does, before anything asks jax for a device. The processes meet at the
coordinator's port once before jax does so there, and look at one another's signs of life more often than jax does:
where one does not come or dies, jax aborts all others with a stack trace that names nobody.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from unidetox_jax.errors import Preempted, UserError

START_TIMEOUT = 300  # seconds for all processes to come; a pod's hosts install packages at different speeds
WAIT = 7 * 24 * 3600  # seconds at a barrier: process 0 may be scoring text while the others wait
SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead
INTERVAL = 1.0  # seconds between signs of life
HELLO = re.compile(r"unidetox (\d+) of (\d+) on (\S+)")


@dataclasses.dataclass(frozen=True)
class Members:
    """Who takes part: the address where all meet, how many there are, and which one this is."""

    coordinator: str
    count: int
    index: int
    local_device_ids: list[int] | None = None


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
    members = _members(coordinator, num_processes, process_id, coordinator_port, timeout)
    if members is not None:
        _join(members, timeout)
    use_compilation_cache()


def _join(members: Members, timeout: int) -> None:
    """Makes this process one of several."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _meet(members, timeout)
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


def _members(coordinator, num_processes, process_id, port, timeout: int) -> Members | None:
    """None: this process is alone."""
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1:
        return None
    if not missing:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator: found {coordinator!r}, expected HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id: found {process_id}, expected 0 to {num_processes - 1}")
        return Members(coordinator, num_processes, process_id)
    if len(missing) < len(given):
        raise UserError(f"{', '.join(missing)}: missing; give all of {', '.join(given)}, or none")
    try:
        return _detected(port or os.environ.get("JAX_COORDINATOR_PORT"), timeout)
    except Exception as error:  # metadata servers and environment variables that are not as they should be
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"several processes: cannot find out who takes part ({reason}); give --coordinator, --num_processes "
            "and --process_id, or --num_processes=1"
        ) from error


def _detected(port: int | str | None, timeout: int) -> Members | None:
    """What jax's own detection finds, which in jax.distributed.initialize would leave no time to meet before."""
    from jax._src import clusters

    indexed = "JOB_COMPLETION_INDEX" in os.environ  # any other pod of Kubernetes is alone, and need not ask
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if indexed or kind is not clusters.K8sCluster]
    found = next((kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present()), None)
    if found is None or found.get_process_count() == 1:
        return None
    coordinator = found.get_coordinator_address(timeout, str(port) if port else None)
    return Members(coordinator, found.get_process_count(), found.get_process_id(), _devices(found))


def _devices(cluster) -> list[int] | None:
    """Which of the devices that this process sees are its own; None: all that it sees."""
    index = cluster.get_local_process_id()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    bound = "SLURM_GPUS_PER_TASK" in os.environ or (seen is not None and len(seen.split(",")) == 1)
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return None if index is None or bound or alone else [index]


def _meet(members: Members, timeout: int) -> None:
    """Returns when all processes have come to the coordinator's address.

    Raises:
      UserError: on every process that came: which ones did not, or that two claim to be the same one.
    """
    deadline = time.monotonic() + timeout
    problem = (_receive if members.index == 0 else _report)(members, deadline)
    if problem:
        raise UserError(f"several processes: {problem}")


def _receive(members: Members, deadline: float) -> str:
    """Waits for all the others and answers them; returns what is wrong, or an empty string."""
    port, both = int(members.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=members.count
        )
    except OSError as error:
        raise UserError(f"--coordinator: process 0 cannot listen on port {port} ({error.strerror})") from None
    came: dict[int, str] = {}  # index → host
    connections, problem = [], ""
    while len(came) < members.count - 1 and not problem:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            hello = HELLO.fullmatch(connection.makefile().readline().strip())
        except OSError:
            if time.monotonic() >= deadline:
                missing = ", ".join(str(i) for i in range(1, members.count) if i not in came)
                problem = f"of {members.count}, process {missing} did not come to {members.coordinator} in time"
            continue
        if hello is None:  # somebody else's
            continue
        index, count, host = int(hello[1]), int(hello[2]), hello[3]
        if count != members.count or not 0 < index < count or index in came:
            also = f", and so does one on {came[index]}" if index in came else ""
            problem = f"process 0 knows of {members.count}, but {host} says it is process {index} of {count}{also}"
        came[index] = host
        connections.append(connection)
    for connection in connections:
        with contextlib.suppress(OSError), connection:
            connection.sendall(f"{problem or 'all are here'}\n".encode())
            connection.recv(1)  # the other end closes first, so that the port is free for jax
    server.close()
    return problem


def _report(members: Members, deadline: float) -> str:
    """Comes to process 0 and waits for its answer; returns what is wrong, or an empty string."""
    host, port = members.coordinator.rsplit(":", 1)
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"process 0 does not answer at {members.coordinator} in time ({error})"
            time.sleep(0.2)
    answer = ""
    with contextlib.suppress(OSError), connection:
        connection.settimeout(max(5.0, deadline - time.monotonic() + 10))
        connection.sendall(f"unidetox {members.index} of {members.count} on {socket.gethostname()}\n".encode())
        answer = connection.makefile().readline().strip()
    gone = f"process 0 at {members.coordinator} ended while this process, {members.index}, waited for the others"
    return "" if answer == "all are here" else answer or gone


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
