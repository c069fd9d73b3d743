"""A program compiled for devices that are not here: its memory to the byte, its collectives, the time that it may take.

The compiler counts a loop's body once, however often it runs, so FLOPs and memory traffic come from the model's shapes.
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
from unidetox_jax.plan.topology import Topology
from unidetox_jax.plan.work import Sizes, Work

LATENCY, LATENCY_BETWEEN_HOSTS = 5e-6, 20e-6  # seconds that a collective of few bytes takes: assumptions


class Program(NamedTuple):
    """What a stage runs on the devices.

    resident: mesh → the arguments that stay on the devices, as ShapeDtypeStructs. lower: mesh → jax's Lowered.
    steps: how often it runs. work: (a mesh's sizes, platform) → what a step asks of a device. utilisation: the share of
    the tightest bound that is assumed. rounds: how often a step runs what stands at each depth of loops. leaner: (flag,
    program) of what needs less memory and more time. shallow: (mesh, layers) → the same, lowered with so few layers,
    unrolled and for few tokens: from two depths follow the kernels of a step of `layers`, a model's on average.
    """

    name: str
    resident: Callable[[Mesh], Any]
    lower: Callable[[Mesh], Any]
    steps: int
    work: Callable[[Sizes, str], Work]
    utilisation: float
    rounds: tuple[float, ...]
    leaner: "Callable[[], Iterable[tuple[str, Program]]]" = tuple
    shallow: Callable[[Mesh, int], Any] | None = None
    layers: float = 0


class Report(NamedTuple):
    """What the compiler says, bytes per device. sorts: of `hlo.sorts`. `refusal`: why it does not fit, else empty."""

    arguments: int
    temporaries: int
    peak: int
    collectives: tuple[hlo.Collectives, ...] = ()
    sorts: Mapping[tuple[int, str], int] = {}
    refusal: str = ""


def compile_program(program: Program, mesh: Mesh, capacity: float = math.inf) -> Report:
    """Lowers and compiles a program for a mesh of devices with so much memory; if its resident arguments exceed that
    it is not compiled at all."""
    resident = bytes_per_device(program.resident(mesh))
    if resident > capacity:
        return Report(resident, 0, resident, refusal=f"its state alone takes {resident / GIB:.1f} GiB a device")
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return Report(resident, needed - resident, needed, refusal=f"needs {needed / GIB:.1f} GiB a device")
    memory = compiled.memory_analysis()
    peak = max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes) + memory.generated_code_size_in_bytes
    refusal = f"needs {peak / GIB:.1f} of {capacity / GIB:.0f} GiB" if peak > capacity else ""
    text = compiled.as_text()
    found = hlo.collectives(text), hlo.sorts(text)
    return Report(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, *found, refusal=refusal)


def kernels(program: Program, mesh: Mesh) -> int | None:
    """What a GPU launches in a step, to which each layer adds the same; None where a step is the whole program."""
    if program.shallow is None:
        return None
    one, two = (hlo.kernels(program.shallow(mesh, depth).compile().as_text()).get(1, 0) for depth in (1, 2))
    return round(one + (program.layers - 1) * (two - one))


def _needed(message: str) -> int | None:
    """Bytes that a program needs, by the compiler's complaint that there are fewer."""
    found = re.search(r"(?:Used |required for HLO \w+ \()([\d.]+)([KMGT]?)(?: of|\) exceeds)", message)
    return found and int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def bytes_per_device(abstract: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def network_bytes(program: Program, report: Report) -> float:
    """Bytes that a device receives in a step: every collective's result, as often as it runs."""
    return sum(found.bytes * rounds for found, rounds in _rounds(program, report))


def _rounds(program: Program, report: Report) -> Iterator[tuple[hlo.Collectives, float]]:
    deepest = len(program.rounds) - 1
    return ((found, program.rounds[min(found.depth, deepest)]) for found in report.collectives)


def bounds(program: Program, mesh: Mesh, topology: Topology, report: Report | None = None) -> Mapping[str, float]:
    """Seconds of a step by the devices' FLOPs, memory and network; empty where the devices are not known.

    report: the compiler's, for the collectives that there are; None: for those that there should be.
    """
    specs, hosts = topology.specs, [device.process_index for device in mesh.devices.flat]
    if specs is None:
        return {}
    work = program.work(mesh.shape, mesh.devices.flat[0].platform)
    if report is None:
        places = {axis: _places(mesh, axis) for axis in work.network}
        traffic = [(work.network[axis], work.collectives[axis], places[axis]) for axis in places]
    else:
        everyone = tuple(range(mesh.size))
        traffic = [(one.bytes * n, one.count * n, one.group or everyone) for one, n in _rounds(program, report)]
    network = sum(_seconds(received, count, [hosts[at] for at in group], specs) for received, count, group in traffic)
    return {"FLOPs": work.flops / specs.flops, "memory": work.traffic / specs.bandwidth, "network": network}


def _places(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Where the devices stand, in the mesh's order, that exchange over an axis: the first of its groups."""
    places = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), mesh.axis_names.index(axis), -1)
    return tuple(places.reshape(-1, mesh.shape[axis])[0].tolist())


def _seconds(received: float, count: float, hosts: list[int], specs: Specs) -> float:
    """For a device to receive so many bytes in so many collectives of a group on these hosts. Between hosts each part
    goes once, and all the devices of a host carry it together."""
    others = len(set(hosts)) - 1
    if not (others and specs.between_hosts):
        return count * LATENCY + received / specs.network
    between = received * others / len(hosts) / specs.between_hosts
    return count * LATENCY_BETWEEN_HOSTS + max(received / specs.network, between)


def step_seconds(program: Program, bounds: Mapping[str, float]) -> tuple[float, str]:
    """(seconds of a step, by which bound)."""
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound] / program.utilisation, bound
