"""Memory that a process frees and asks for again, on a CPU: pages of it that the system had to give."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

PAGES = 64 << 20 >> 12
PROGRAM = """
import resource, sys
from unidetox_jax import devices
if "keep" in sys.argv:
    assert devices.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    before = faults()
    b"x" * (64 << 20)
print(faults() - before)
"""


def pages(*arguments):
    """Page faults of the last of ten blocks of 64 MiB, each freed before the next."""
    path = str(pathlib.Path(__file__).resolve().parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")
def test_freed_memory_is_used_again():
    assert pages() >= PAGES  # or there is nothing to win
    assert pages("keep") < PAGES // 100
