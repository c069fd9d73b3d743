"""About how long a task will take on this machine: its operations over the measured speed of a matrix product.

A guess for a person who decides whether to wait, no promise: the share of that speed which real programs reach is a
round number, and so is the time that a task takes before it computes anything.
"""

from unidetox_jax import machine
from unidetox_jax.stages.base import Task

SHARE = 0.25  # of the matrix product's speed: small models and short texts reach less, large ones more
OVERHEAD = 10.0  # seconds of compiling, reading and writing a task


def seconds(task: Task) -> float:
    """Seconds that a task may take from its beginning."""
    return OVERHEAD + (task.operations() if task.operations else 0.0) / (SHARE * machine.matmul_rate())


def readable(count: float) -> str:
    """Seconds as "40 s", "12 min", "3.5 h"."""
    if count < 90:
        return f"{max(10, round(count, -1)):.0f} s"
    return f"{count / 60:.0f} min" if count < 5400 else f"{count / 3600:.1f} h"
