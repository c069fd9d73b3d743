"""A program compiled for devices that are not here: its memory to the byte, its collectives, the time that it may take.

The compiler counts a loop's body once, however often it runs, so FLOPs and memory traffic come from the model's shapes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from unidetox_jax.devices import GIB, Specs
from unidetox_jax.plan import hlo
from unidetox_jax.plan.topology import Topology


class Program(NamedTuple):
    """What a stage runs on the devices.

    resident: mesh → the arguments that stay on the devices, as ShapeDtypeStructs. lower: mesh → jax's Lowered.
    steps: how often it runs. flops, and traffic (mesh → bytes read and written): of one step, all devices together.
    utilisation: the share of the tightest bound that is assumed. rounds: how often a step runs what stands at each
    depth of loops. leaner: (flag, program) that needs less memory and more time.
    """

    name: str
    resident: Callable[[Mesh], Any]
    lower: Callable[[Mesh], Any]
    steps: int
    flops: float
    traffic: Callable[[Mesh], float]
    utilisation: float
    rounds: tuple[float, ...]
    leaner: "tuple[str, Program] | None" = None


class Report(NamedTuple):
    """What the compiler says, bytes per device. `refusal`: why it does not fit, else empty."""

    arguments: int
    temporaries: int
    peak: int
    collectives: tuple[hlo.Collectives, ...] = ()
    refusal: str = ""


def compile_program(program: Program, mesh: Mesh, specs: Specs | None) -> Report:
    """Lowers and compiles a program for the mesh; what its resident arguments exceed is not compiled at all."""
    resident = bytes_per_device(program.resident(mesh))
    capacity = specs.memory if specs else math.inf
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
    collectives = hlo.collectives(compiled.as_text())
    return Report(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, collectives, refusal)


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
    deepest = len(program.rounds) - 1
    return sum(found.bytes * program.rounds[min(found.depth, deepest)] for found in report.collectives)


def bounds(program: Program, report: Report, mesh: Mesh, topology: Topology) -> Mapping[str, float]:
    """Seconds of a step by the devices' FLOPs, memory and network; empty where the devices are not known."""
    specs, count = topology.specs, len(topology.devices)
    if specs is None:
        return {}
    return {
        "FLOPs": program.flops / (count * specs.flops),
        "memory": program.traffic(mesh) / (count * specs.bandwidth),
        "network": network_bytes(program, report) / specs.network,
    }
