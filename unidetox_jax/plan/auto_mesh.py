"""The mesh "auto": the fastest mesh of the devices on which the programs fit in memory.

Meshes are compared by the bounds of what the programs must compute, read and exchange (compiler.bounds), without
compiling anything, so every host chooses the same. Network time is added to the other bounds, since little of it is
hidden behind them; among about equally fast meshes the one with the least memory is best. On devices of unknown speed,
such as CPUs, the mesh is `FALLBACK`.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.devices import GIB
from unidetox_jax.errors import UserError
from unidetox_jax.plan import compiler
from unidetox_jax.plan.compiler import Program
from unidetox_jax.plan.topology import Topology

AUTO = "auto"
FALLBACK = "data:1,fsdp:-1,model:1"
MEMORY_SHARE = 0.92  # of a device's memory that an estimate may take
SPEED_TOLERANCE = 1.03  # times of the fastest mesh that count as equally fast


class MeshEstimate(NamedTuple):
    """Estimated cost of a mesh: bytes of a device, whether they fit, seconds of all steps together, seconds of a step
    of the slowest program, and the bound that determines them."""

    layout: str
    memory: float
    fits: bool
    total_seconds: float
    step_seconds: float
    bound: str

    def __str__(self) -> str:
        excess = "" if self.fits else ", more than there is"
        milliseconds, gib = self.step_seconds * 1e3, self.memory / GIB
        return f"{self.layout} ({milliseconds:,.2f} ms a step by {self.bound}, about {gib:.1f} GiB{excess})"


def choose_mesh(layout: str, programs: Sequence[Program], topology: Topology, label: str = "") -> Mesh:
    """The mesh of a layout; for "auto" the best one for the programs that run on it.

    label: names the programs in the log.
    """
    if layout != AUTO:
        return sharding.make_mesh(layout, topology.devices)
    if not can_choose(topology):
        return sharding.make_mesh(FALLBACK, topology.devices)
    best, *others = rank_meshes(programs, topology)
    logging.info("mesh of %s: %s; next %s", label, best, others[0] if others else "none")
    return sharding.make_mesh(best.layout, topology.devices)


def can_choose(topology: Topology) -> bool:
    """Whether there are several meshes, and known device speeds to choose by."""
    return topology.specs is not None and len(topology.devices) > 1


def rank_meshes(programs: Sequence[Program], topology: Topology) -> list[MeshEstimate]:
    """Every mesh each of whose axes can split something in the programs' models, best first; meshes that fit precede
    those that do not."""
    if topology.specs is None:
        return []
    candidates = (_estimate(layout, programs, topology) for layout in mesh_layouts(len(topology.devices)))
    estimates = [estimate for estimate in candidates if estimate]
    fastest = min((estimate.total_seconds for estimate in estimates if estimate.fits), default=0.0)

    def order(estimate: MeshEstimate) -> tuple:
        by_memory = not estimate.fits or estimate.total_seconds <= SPEED_TOLERANCE * fastest
        key = estimate.memory if by_memory else estimate.total_seconds
        return not estimate.fits, not by_memory, key, estimate.layout

    return sorted(estimates, key=order)


def mesh_layouts(count: int) -> Iterator[str]:
    """Every arrangement of `count` devices on the three axes."""
    for model in (size for size in range(1, count + 1) if count % size == 0):
        for fsdp in (size for size in range(1, count // model + 1) if count // model % size == 0):
            yield f"data:{count // model // fsdp},fsdp:{fsdp},model:{model}"


def _estimate(layout: str, programs: Sequence[Program], topology: Topology) -> MeshEstimate | None:
    """None if an axis of the mesh cannot split anything in some program's model."""
    mesh = _make_mesh(layout, topology.devices)
    platform = topology.devices[0].platform
    memory = total = longest = slowest_step = 0.0
    bound = ""
    for program in programs:
        try:
            memory = max(memory, program.cost(mesh.shape, platform).memory)
        except UserError:
            return None
        bounds = compiler.bounds(program, mesh, topology)
        seconds, tightest = compiler.step_seconds(program, bounds)
        total += program.steps * (max(bounds["FLOPs"], bounds["memory"]) + bounds["network"]) / program.utilisation
        if program.steps * seconds > longest:
            longest, slowest_step, bound = program.steps * seconds, seconds, tightest
    return MeshEstimate(layout, memory, memory <= MEMORY_SHARE * topology.memory, total, slowest_step, bound)


@functools.cache
def _make_mesh(layout: str, devices: tuple) -> Mesh:
    return sharding.make_mesh(layout, devices)
