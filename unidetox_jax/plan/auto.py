"""The mesh "auto": of all meshes of the devices, the one that is fastest among those on which the programs fit.

By the bounds of what they must compute, read and exchange (compiler.bounds), without compiling anything, so it is the
same on every host. The network's time is added to the others', as little of it is hidden behind them; of meshes that
are about as fast, the one that takes least memory is best. Where the devices' figures are not known, as on CPUs, there
is nothing to choose by, and the mesh is `UNKNOWN`.
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
UNKNOWN = "data:1,fsdp:-1,model:1"
ROOM = 0.92  # of a device's memory: what an estimate of it may take
ALIKE = 1.03  # times the fastest


class Choice(NamedTuple):
    """A mesh and what speaks for it: bytes of a device, whether they fit, seconds of all steps together, and those of a
    step of the program that takes longest, with the bound that they follow from."""

    layout: str
    memory: float
    fits: bool
    total: float
    step: float
    bound: str

    def __str__(self) -> str:
        fits = "" if self.fits else ", more than there is"
        return (
            f"{self.layout} ({self.step * 1e3:,.2f} ms a step by {self.bound}, about {self.memory / GIB:.1f} GiB{fits})"
        )


def mesh(layout: str, programs: Sequence[Program], place: Topology, label: str = "") -> Mesh:
    """The mesh of a layout; of "auto", the one that programs which run on it are fastest on.

    label: names them in the line of the log that says why.
    """
    if layout != AUTO:
        return sharding.make_mesh(layout, place.devices)
    if not can_choose(place):
        return sharding.make_mesh(UNKNOWN, place.devices)
    best, *others = ranked(programs, place)
    logging.info("mesh of %s: %s; next %s", label, best, others[0] if others else "none")
    return sharding.make_mesh(best.layout, place.devices)


def can_choose(place: Topology) -> bool:
    """Whether there are several meshes, and figures to choose one by."""
    return place.specs is not None and len(place.devices) > 1


def ranked(programs: Sequence[Program], place: Topology) -> list[Choice]:
    """Every mesh on which something of the programs' models can be split, the best first, and what fits before what
    does not."""
    if place.specs is None:
        return []
    choices = [choice for layout in layouts(len(place.devices)) if (choice := _judge(layout, programs, place))]
    fastest = min((one.total for one in choices if one.fits), default=0.0)

    def order(one: Choice) -> tuple:
        alike = not one.fits or one.total <= ALIKE * fastest
        return not one.fits, not alike, one.memory if alike else one.total, one.layout

    return sorted(choices, key=order)


def layouts(count: int) -> Iterator[str]:
    """Every way to arrange so many devices on three axes."""
    for model in (ways for ways in range(1, count + 1) if count % ways == 0):
        for fsdp in (ways for ways in range(1, count // model + 1) if count // model % ways == 0):
            yield f"data:{count // model // fsdp},fsdp:{fsdp},model:{model}"


def _judge(layout: str, programs: Sequence[Program], place: Topology) -> Choice | None:
    arranged = _arranged(layout, place.devices)
    platform = place.devices[0].platform
    memory = total = longest = step = 0.0
    bound = ""
    for program in programs:
        try:
            memory = max(memory, program.work(arranged.shape, platform).memory)
        except UserError:
            return None
        bounds = compiler.bounds(program, arranged, place)
        seconds, by = compiler.step_seconds(program, bounds)
        total += program.steps * (max(bounds["FLOPs"], bounds["memory"]) + bounds["network"]) / program.utilisation
        if program.steps * seconds > longest:
            longest, step, bound = program.steps * seconds, seconds, by
    return Choice(layout, memory, memory <= ROOM * place.memory, total, step, bound)


@functools.cache
def _arranged(layout: str, devices: tuple) -> Mesh:
    return sharding.make_mesh(layout, devices)
