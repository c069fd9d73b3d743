"""Which processes take part in a run, and a first meeting before jax connects them.

They meet once on the coordinator's port. Without it, a missing process makes jax abort all the others with a stack
trace that does not say which one is missing.
"""

import contextlib
import dataclasses
import os
import re
import socket
import time

from unidetox_jax.errors import UserError

HELLO = re.compile(r"unidetox (\d+) of (\d+) on (\S+)")
ALL_HERE = "all are here"


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The coordinator's HOST:PORT, the number of processes, this one's id, and the local devices it may use."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None  # None: all that it sees


def find_group(coordinator, num_processes, process_id, port, timeout: int) -> ProcessGroup | None:
    """The group given by the arguments or by the cluster's environment; None if this process is alone."""
    arguments = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in arguments.items() if value is None]
    if num_processes == 1:
        return None
    if not missing:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator: found {coordinator!r}, expected HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id: found {process_id}, expected 0 to {num_processes - 1}")
        return ProcessGroup(coordinator, num_processes, process_id)
    if len(missing) < len(arguments):
        raise UserError(f"{', '.join(missing)}: missing; give all of {', '.join(arguments)}, or none")
    try:
        return _detect(port or os.environ.get("JAX_COORDINATOR_PORT"), timeout)
    except Exception as error:  # broken metadata servers or environment variables
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"several processes: cannot find out which take part ({reason}); give --coordinator, --num_processes "
            "and --process_id, or --num_processes=1"
        ) from error


def _detect(port: int | str | None, timeout: int) -> ProcessGroup | None:
    """jax's own cluster detection. jax.distributed.initialize runs it too late for the processes to meet first."""
    from jax._src import clusters

    indexed = "JOB_COMPLETION_INDEX" in os.environ  # any other Kubernetes pod is alone: do not query the cluster
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if indexed or kind is not clusters.K8sCluster]
    cluster = next((kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present()), None)
    if cluster is None or cluster.get_process_count() == 1:
        return None
    coordinator = cluster.get_coordinator_address(timeout, str(port) if port else None)
    return ProcessGroup(coordinator, cluster.get_process_count(), cluster.get_process_id(), _local_devices(cluster))


def _local_devices(cluster) -> list[int] | None:
    """Which of the visible devices belong to this process; None: all of them."""
    index = cluster.get_local_process_id()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    bound = "SLURM_GPUS_PER_TASK" in os.environ or (visible is not None and len(visible.split(",")) == 1)
    one_per_node = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return None if index is None or bound or one_per_node else [index]


def wait_for_all(group: ProcessGroup, timeout: int) -> None:
    """Returns when all processes have reached the coordinator.

    Raises:
      UserError: on every process that arrived: which ones did not, or that two claim the same id.
    """
    deadline = time.monotonic() + timeout
    problem = (_accept_others if group.process_id == 0 else _report_to_first)(group, deadline)
    if problem:
        raise UserError(f"several processes: {problem}")


def _accept_others(group: ProcessGroup, deadline: float) -> str:
    """Waits for all other processes and answers them; returns the problem, or an empty string."""
    port, dual = int(group.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=group.num_processes)
    except OSError as error:
        raise UserError(f"--coordinator: process 0 cannot listen on port {port} ({error.strerror})") from None
    hosts: dict[int, str] = {}  # process id → host
    connections, problem = [], ""
    while len(hosts) < group.num_processes - 1 and not problem:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            hello = HELLO.fullmatch(connection.makefile().readline().strip())
        except OSError:
            if time.monotonic() >= deadline:
                missing = ", ".join(str(i) for i in range(1, group.num_processes) if i not in hosts)
                problem = f"of {group.num_processes}, process {missing} did not reach {group.coordinator} in time"
            continue
        if hello is None:  # not one of ours
            continue
        index, count, host = int(hello[1]), int(hello[2]), hello[3]
        if count != group.num_processes or not 0 < index < count or index in hosts:
            also = f", and so does one on {hosts[index]}" if index in hosts else ""
            problem = f"process 0 expects {group.num_processes}, but {host} says it is process {index} of {count}{also}"
        hosts[index] = host
        connections.append(connection)
    for connection in connections:
        with contextlib.suppress(OSError), connection:
            connection.sendall(f"{problem or ALL_HERE}\n".encode())
            connection.recv(1)  # the other end closes first, so that the port is free for jax
    server.close()
    return problem


def _report_to_first(group: ProcessGroup, deadline: float) -> str:
    """Connects to process 0 and waits for its answer; returns the problem, or an empty string."""
    host, port = group.coordinator.rsplit(":", 1)
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"process 0 does not answer at {group.coordinator} in time ({error})"
            time.sleep(0.2)
    answer = ""
    with contextlib.suppress(OSError), connection:
        connection.settimeout(max(5.0, deadline - time.monotonic() + 10))
        hello = f"unidetox {group.process_id} of {group.num_processes} on {socket.gethostname()}\n"
        connection.sendall(hello.encode())
        answer = connection.makefile().readline().strip()
    lost = f"process 0 at {group.coordinator} ended while this process, {group.process_id}, waited for the others"
    return "" if answer == ALL_HERE else answer or lost
