"""Who takes part in a run of several processes, and how they meet before jax is told of one another.

They meet at the coordinator's port once before jax does so there: where one does not come, jax aborts all others with a
stack trace that names nobody.
"""

import contextlib
import dataclasses
import os
import re
import socket
import time

from unidetox_jax.errors import UserError

HELLO = re.compile(r"unidetox (\d+) of (\d+) on (\S+)")


@dataclasses.dataclass(frozen=True)
class Members:
    """Who takes part: the address where all meet, how many there are, and which one this is."""

    coordinator: str
    count: int
    index: int
    local_device_ids: list[int] | None = None


def find_members(coordinator, num_processes, process_id, port, timeout: int) -> Members | None:
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


def meet(members: Members, timeout: int) -> None:
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
