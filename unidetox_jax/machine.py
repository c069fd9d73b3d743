"""What this machine's device can do at best: memory copied a second, and matrix products.

Figures of speed are shares of these. Surprising: a fresh output array costs more to allocate than to fill on a CPU, so
memory is measured in place, with every number read once and written once.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax.models import default_dtype

REPEATS = 5  # the fastest counts: whatever else the machine does only makes it slower


def fastest(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    jax.block_until_ready(work())
    return min(seconds(work) for _ in range(repeats))


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that one call takes until its result is there."""
    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that one device reads and writes, together, over an array that no cache holds."""
    accelerator = jax.default_backend() != "cpu"
    numbers, calls = (1 << 28, 16) if accelerator else (1 << 26, 2)
    change = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    state = [jnp.ones(numbers, jnp.float32)]

    def work():
        for _ in range(calls):  # in flight together, so that starting them is not measured
            state[0] = change(state[0])
        return state[0]

    return calls * 2 * 4 * numbers / fastest(work)


def matmul_rate(dtype: str = "") -> float:
    """Floating-point operations a second of a large square matrix product on one device; float32 means float32.

    dtype: "float32" or "bfloat16"; an empty string: the default compute dtype.
    """
    return _matmul_rate(dtype or default_dtype())


@functools.cache
def _matmul_rate(dtype: str) -> float:
    size, calls = (8192, 8) if jax.default_backend() != "cpu" else (1024, 4)
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))

    def work():
        return [multiply(matrix, matrix) for _ in range(calls)]

    return calls * 2 * size**3 / fastest(work)


def describe() -> dict[str, Any]:
    """The device and its measured rates, as they stand in every measurement."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "copy_bytes_per_second": copy_bandwidth(),
        "matmul_flops_float32": matmul_rate("float32"),
        "matmul_flops_bfloat16": matmul_rate("bfloat16"),
    }
