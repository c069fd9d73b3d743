"""Several real processes on this machine for tests, each with its own devices, joined by jax.distributed."""

import os
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from conftest import HANGS, ROOT


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of standard error."""
        return self.err.strip().rsplit("\n", 1)[-1]


def free_port() -> int:
    """An unused local port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Environment variables of a process with that many CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }


def joined(address: str, count: int, index: int) -> list[str]:
    """Command-line arguments of one of several processes."""
    return [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]


def command(arguments: list[str]) -> list[str]:
    """`unidetox` with these arguments."""
    return [sys.executable, "-m", "unidetox_jax.cli", *arguments]


def start(commands: list[list[str]], devices: int = 2) -> list[subprocess.Popen]:
    """Starts them all."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(devices)}
    return [subprocess.Popen(arguments, **options) for arguments in commands]


def wait(processes: list[subprocess.Popen], timeout: float = HANGS) -> list[Ended]:
    """Waits for all of them; kills those that exceed the timeout, and the test fails."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
