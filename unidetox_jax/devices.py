"""What devices can do at best: by the data sheet for any of them, by measurement for the one that is here.

Every figure of speed in this package is a share of one of these.
"""

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

GIB = 1 << 30
MAPS, MOST_MAPS = epath.Path("/proc/self/maps"), epath.Path("/proc/sys/vm/max_map_count")  # of Linux
MAPS_SHARE = 0.5  # of those that a process may have: one task's programs may take as many again
ACCELERATORS = ("nvidiactl", "accel0", "vfio")  # what a machine with a GPU or a TPU has in /dev
# mallopt's numbers of glibc's malloc.h and what they are set to
KEEP = (
    (-8, 1),  # M_ARENA_MAX: one heap for all threads; another thread's holds 64 MiB at most
    (-4, 0),  # M_MMAP_MAX: no mapping of its own for a large block
    (-1, -1),  # M_TRIM_THRESHOLD: the heap's end is never given back
    (-2, 256 << 20),  # M_TOP_PAD: what the heap grows by
)
REPEATS = 5  # the fastest counts: whatever else the machine does only makes it slower


@dataclasses.dataclass(frozen=True)
class Specs:
    """One device as jax sees it: bytes of memory, dense bfloat16 FLOP/s, bytes/s from and to its memory, bytes/s that
    it receives over all its links; devices to a chip that is billed; bytes/s that it receives from other hosts, where
    that is over a slower network (0: it is over the same links)."""

    memory: int
    flops: float
    bandwidth: float
    network: float
    per_chip: int = 1
    between_hosts: float = 0.0


NIC = 50e9  # bytes/s each way of a 400 Gbit/s adapter, of which NVIDIA's DGX and HGX H100 have one for each GPU


# By the beginning of jax's device_kind. TPUs: docs.cloud.google.com/tpu/docs, a page for each version; v5p is "TPU v5",
# and TPU7x has two devices a chip. GPUs: NVIDIA's data sheets, FLOP/s without sparsity. Both count a link's two
# directions together; a device receives half of that.
SPECS = {
    "TPU v4": Specs(32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5e": Specs(16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Specs(95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6e": Specs(32 * GIB, 918e12, 1638e9, 400e9),
    "TPU7x": Specs(96 * GIB, 1153e12, 3690e9, 300e9, per_chip=2),
    "NVIDIA L4": Specs(24 * 10**9, 121e12, 300e9, 32e9),
    "NVIDIA A100-SXM4-40GB": Specs(40 * 10**9, 312e12, 1555e9, 300e9, between_hosts=NIC / 2),
    "NVIDIA A100-SXM4-80GB": Specs(80 * 10**9, 312e12, 2039e9, 300e9, between_hosts=NIC / 2),
    "NVIDIA A100-PCIE-40GB": Specs(40 * 10**9, 312e12, 1555e9, 32e9),
    "NVIDIA A100 80GB PCIe": Specs(80 * 10**9, 312e12, 1935e9, 32e9),
    "NVIDIA H100 80GB HBM3": Specs(80 * 10**9, 989e12, 3350e9, 450e9, between_hosts=NIC),
    "NVIDIA H100 PCIe": Specs(80 * 10**9, 756e12, 2000e9, 64e9),
    "NVIDIA H200": Specs(141 * 10**9, 989e12, 4800e9, 450e9, between_hosts=NIC),
    "NVIDIA B200": Specs(180 * 10**9, 2250e12, 7700e9, 900e9, between_hosts=NIC),
}


def specs(kind: str) -> Specs | None:
    """The data sheet of a `jax.Device.device_kind`; None where there is none (a CPU)."""
    kind = kind.replace(" lite", "e")  # libtpu says "TPU v5 lite" for a v5e
    return next((found for name, found in SPECS.items() if kind.startswith(name)), None)


def here() -> str:
    """The devices of this run: "8 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def fastest(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    jax.block_until_ready(work())
    return min(seconds(work) for _ in range(repeats))


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that one call takes until its result is there."""
    started = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    return time.perf_counter() - started


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that one device reads and writes, together, over an array that no cache holds.

    In place: a CPU takes longer to allocate a fresh array than to fill it.
    """
    accelerator = jax.default_backend() != "cpu"
    numbers, calls = (1 << 28, 16) if accelerator else (1 << 26, 2)
    change = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    state = [jnp.ones(numbers, jnp.float32)]

    def work():
        for _ in range(calls):  # in flight together, so that starting them is not measured
            state[0] = change(state[0])
        return state[0]

    return calls * 2 * 4 * numbers / fastest(work)


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product on one device, in "float32" (float32 throughout) or "bfloat16"."""
    size, calls = (8192, 8) if jax.default_backend() != "cpu" else (1024, 4)
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return calls * 2 * size**3 / fastest(lambda: [multiply(matrix, matrix) for _ in range(calls)])


def describe() -> dict[str, Any]:
    """The device and its measured rates, as they stand in every measurement."""
    return {
        "device": here(),
        "copy_bytes_per_second": copy_bandwidth(),
        "matmul_flops_float32": matmul_rate("float32"),
        "matmul_flops_bfloat16": matmul_rate("bfloat16"),
    }


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, where the CPU computes and the C library is glibc; returns
    whether it does. To be called before jax starts its threads.

    XLA's programs for CPUs allocate their buffers in every call. glibc would map and unmap the large ones, and the
    system's clearing of their pages was a fifth of a training's processor time.
    """
    if any((epath.Path("/dev") / name).exists() for name in ACCELERATORS):
        return False  # the host holds weights on their way, not buffers that return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*setting) for setting in KEEP])


def programs_fill_up() -> bool:
    """Whether compiled programs have come near the number of memory maps that Linux allows a process: each takes dozens
    of them on a CPU, and where none is left the compiler crashes."""
    try:
        most = int(MOST_MAPS.read_text())
        return len(MAPS.read_text().splitlines()) > MAPS_SHARE * most
    except (OSError, ValueError):  # another system, or one that does not say
        return False
