"""Peak rates of devices: from data sheets for any of them, by measurement for the local one.

All speeds that this package reports are relative to these. Also two limits of the host: heap memory and memory maps.
"""

import ctypes
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

GIB = 1 << 30
MAPS, MAX_MAPS = epath.Path("/proc/self/maps"), epath.Path("/proc/sys/vm/max_map_count")  # Linux
MAPS_FRACTION = 0.5  # of the maximum; one more task's programs may need as many again
TPUS = ("accel0", "vfio")  # in /dev of a machine with a TPU
ACCELERATORS = ("nvidiactl", *TPUS)  # or with a GPU
# What libtpu, the compiler for TPUs, otherwise asks a machine without one for, and complains about in five lines
ANY_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
# Options of mallopt (glibc's malloc.h) and their values
MALLOC_OPTIONS = (
    (-8, 1),  # M_ARENA_MAX: one heap for all threads; further arenas are limited to 64 MiB
    (-4, 0),  # M_MMAP_MAX: no separate mappings for large blocks
    (-1, -1),  # M_TRIM_THRESHOLD: never shrink the heap
    (-2, 256 << 20),  # M_TOP_PAD: grow the heap in steps of 256 MiB
)
# FLOP/s and bytes/s that programs reach: shares of an accelerator's peaks; of a CPU's core, by a model so small that
# compiling takes longer than running it
USUAL_SHARES, CPU_RATES = (0.4, 0.6), (1e10, 1e10)
REPEATS = 5  # of a measurement; the fastest counts, since other load only slows it down


@dataclasses.dataclass(frozen=True)
class Specs:
    """The data sheet of one device as JAX counts them."""

    memory: int  # bytes
    flops: float  # dense bfloat16 FLOP/s
    bandwidth: float  # of memory, bytes/s, reads and writes together
    network: float  # bytes/s received over all links
    per_chip: int = 1  # devices per chip that is billed
    between_hosts: float = 0.0  # bytes/s received from other hosts, if over a slower network; 0: over the same links


NIC = 50e9  # bytes/s per direction of a 400 Gbit/s adapter; NVIDIA's DGX and HGX H100 have one per GPU


# By prefix of JAX's device_kind. TPUs: docs.cloud.google.com/tpu/docs, one page per version; v5p is "TPU v5". GPUs:
# NVIDIA's data sheets, FLOP/s without sparsity. Both add a link's two directions; a device receives half of that.
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
    """The data sheet of a `jax.Device.device_kind`; None if unknown (a CPU)."""
    kind = kind.replace(" lite", "e")  # libtpu calls a v5e "TPU v5 lite"
    return next((sheet for prefix, sheet in SPECS.items() if kind.startswith(prefix)), None)


def usual_rates(kind: str) -> tuple[float, float]:
    """About how many FLOP/s and bytes/s a program reaches on a device, the same on every host: to weigh work against
    compiling."""
    sheet = specs(kind)
    if sheet is None:
        return CPU_RATES
    return USUAL_SHARES[0] * sheet.flops, USUAL_SHARES[1] * sheet.bandwidth


def summary() -> str:
    """The devices of this run, e.g. "8 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of `REPEATS` calls, after one that compiles."""
    jax.block_until_ready(work())
    return min(seconds(work) for _ in range(REPEATS))


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that one call takes until its result is ready."""
    started = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    return time.perf_counter() - started


@functools.cache
def copy_bandwidth() -> float:
    """Bytes/s that one device reads and writes together, on an array larger than any cache.

    In place, since a CPU takes longer to allocate a new array than to fill it.
    """
    accelerator = jax.default_backend() != "cpu"
    numbers, calls = (1 << 28, 16) if accelerator else (1 << 26, 2)
    change = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    state = [jnp.ones(numbers, jnp.float32)]

    def work():
        for _ in range(calls):  # queued together, so that dispatch is not measured
            state[0] = change(state[0])
        return state[0]

    return calls * 2 * 4 * numbers / fastest(work)


@functools.cache
def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product on one device, in full "float32" or in "bfloat16"."""
    size, calls = (8192, 8) if jax.default_backend() != "cpu" else (1024, 4)
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return calls * 2 * size**3 / fastest(lambda: [multiply(matrix, matrix) for _ in range(calls)])


def describe() -> dict[str, Any]:
    """The device and its measured rates, for a benchmark's record."""
    return {
        "device": summary(),
        "copy_bytes_per_second": copy_bandwidth(),
        "matmul_flops_float32": matmul_rate("float32"),
        "matmul_flops_bfloat16": matmul_rate("bfloat16"),
    }


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory on machines that compute on the CPU; returns whether it does.

    To be called before JAX starts its threads. XLA's CPU programs allocate buffers in every call. By default glibc maps
    and unmaps large ones, and clearing their pages took a fifth of a training's processor time.
    """
    if _is_here(ACCELERATORS):
        return False  # the host only passes weights on and reuses no buffers
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*option) for option in MALLOC_OPTIONS])


def quiet_libtpu() -> None:
    """Keeps libtpu, where it is installed for `unidetox plan`, from complaining that there is no TPU.

    To be called before JAX looks for devices.
    """
    if not _is_here(TPUS):
        for name, value in ANY_TPU.items():
            os.environ.setdefault(name, value)


def _is_here(nodes: Iterable[str]) -> bool:
    return any((epath.Path("/dev") / name).exists() for name in nodes)


def memory_maps_run_out() -> bool:
    """Whether this process nears Linux's limit of memory maps.

    Each compiled CPU program takes dozens of them; when none is left, the compiler crashes.
    """
    try:
        return len(MAPS.read_text().splitlines()) > MAPS_FRACTION * int(MAX_MAPS.read_text())
    except (OSError, ValueError):  # not Linux, or not readable
        return False
