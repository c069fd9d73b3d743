"""Compiles programs for devices that are not present: memory to the byte, collectives, lower bounds of the time.

The compiler's own cost analysis counts a loop's body once, so FLOPs and memory traffic come from the model's shapes.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unidetox_jax.devices import GIB, Specs
from unidetox_jax.plan import hlo
from unidetox_jax.plan.cost_model import AxisSizes, StepCost
from unidetox_jax.plan.topology import Topology

LATENCY, LATENCY_BETWEEN_HOSTS = 5e-6, 20e-6  # assumed seconds of a collective of few bytes


class Program(NamedTuple):
    """What a stage runs on the devices.

    resident: mesh → arguments that stay on the devices, as ShapeDtypeStructs.
    lower: mesh → jax's Lowered.
    steps: how many steps the stage runs.
    cost: (sizes of the mesh's axes, platform) → cost of a step on each device.
    utilisation: assumed share of the tightest bound.
    loops: a step is one round of one of so many loops, as in decoding; 0: a step is the whole program.
    memory_savers: (flags, program) of variants that need less memory and more time.
    shallow: (mesh, layers) → the program with only that many layers, unrolled and for few tokens, lowered. Compiled at
      two depths it gives the number of kernels in a step of `layers` layers, a model's on average.
    """

    name: str
    resident: Callable[[Mesh], Any]
    lower: Callable[[Mesh], Any]
    steps: int
    cost: Callable[[AxisSizes, str], StepCost]
    utilisation: float
    loops: int = 0
    memory_savers: "Callable[[], Iterable[tuple[str, Program]]]" = tuple
    shallow: Callable[[Mesh, int], Any] | None = None
    layers: float = 0


class Report(NamedTuple):
    """The compiler's result, in bytes per device. sorts: as in `hlo.sorts`. refusal: why it does not fit, or empty."""

    arguments: int
    temporaries: int
    peak: int
    collectives: tuple[hlo.Collectives, ...] = ()
    sorts: Mapping[tuple[int, str], int] = {}
    refusal: str = ""


def compile_program(program: Program, mesh: Mesh, capacity: float = math.inf) -> Report:
    """Compiles a program for devices with `capacity` bytes each, unless its resident arguments exceed that."""
    resident = bytes_per_device(program.resident(mesh))
    if resident > capacity:
        return Report(resident, 0, resident, refusal=f"its state alone takes {resident / GIB:.1f} GiB a device")
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_bytes(str(error))
        if needed is None:
            raise
        return Report(resident, needed - resident, needed, refusal=f"needs {needed / GIB:.1f} GiB a device")
    memory = compiled.memory_analysis()
    peak = max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes) + memory.generated_code_size_in_bytes
    refusal = f"needs {peak / GIB:.1f} of {capacity / GIB:.0f} GiB" if peak > capacity else ""
    text = compiled.as_text()
    return Report(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak,
        hlo.collectives(text),
        hlo.sorts(text),
        refusal,
    )


def kernels(program: Program, mesh: Mesh) -> int | None:
    """Kernels that a GPU launches in a step, linear in the number of layers; None if a step is the whole program."""
    if program.shallow is None:
        return None
    one, two = (hlo.kernels(program.shallow(mesh, depth).compile().as_text()).get(1, 0) for depth in (1, 2))
    return round(one + (program.layers - 1) * (two - one))


def _needed_bytes(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's out-of-memory message; None for another message."""
    match = re.search(r"(?:Used |required for HLO \w+ \()([\d.]+)([KMGT]?)(?: of|\) exceeds)", message)
    return match and int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def bytes_per_device(abstract: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def network_bytes(program: Program, report: Report) -> float:
    """Bytes that a device receives in a step: every collective's result, as often as it runs."""
    return sum(collective.bytes * count for collective, count in _per_step(program, report))


def _per_step(program: Program, report: Report) -> Iterator[tuple[hlo.Collectives, float]]:
    """The collectives, and how often a step runs them."""
    for collective in report.collectives:
        if not program.loops:
            yield collective, collective.times
        elif collective.in_steps:
            yield collective, collective.times / program.loops


def bounds(program: Program, mesh: Mesh, topology: Topology, report: Report | None = None) -> Mapping[str, float]:
    """Seconds of a step by the devices' FLOPs, memory and network; empty for devices of unknown speed.

    report: gives the compiled program's collectives; None: takes those of the cost model.
    """
    specs, hosts = topology.specs, [device.process_index for device in mesh.devices.flat]
    if specs is None:
        return {}
    cost = program.cost(mesh.shape, mesh.devices.flat[0].platform)
    if report is None:
        transfers = [(cost.network[axis], cost.collectives[axis], _first_group(mesh, axis)) for axis in cost.network]
    else:
        everyone = tuple(range(mesh.size))
        transfers = [
            (collective.bytes * trips, collective.count * trips, collective.group or everyone)
            for collective, trips in _per_step(program, report)
        ]
    network = sum(
        _network_seconds(received, count, [hosts[index] for index in group], specs)
        for received, count, group in transfers
    )
    return {"FLOPs": cost.flops / specs.flops, "memory": cost.traffic / specs.bandwidth, "network": network}


def _first_group(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Indices in the mesh of the first group of devices that exchange over an axis."""
    indices = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), mesh.axis_names.index(axis), -1)
    return tuple(indices.reshape(-1, mesh.shape[axis])[0].tolist())


def _network_seconds(received: float, count: float, hosts: list[int], specs: Specs) -> float:
    """Seconds for a device to receive `received` bytes in `count` collectives of a group on these hosts.

    Between hosts each shard travels once, carried jointly by all devices of a host.
    """
    others = len(set(hosts)) - 1
    if not (others and specs.between_hosts):
        return count * LATENCY + received / specs.network
    between = received * others / len(hosts) / specs.between_hosts
    return count * LATENCY_BETWEEN_HOSTS + max(received / specs.network, between)


def step_seconds(program: Program, bounds: Mapping[str, float]) -> tuple[float, str]:
    """(seconds of a step, the bound that determines them)."""
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound] / program.utilisation, bound
