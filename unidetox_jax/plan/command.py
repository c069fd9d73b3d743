"""`unidetox plan`: what every stage of a configuration takes on a topology, before it is rented.

Configurations of well-known checkpoints come with the package, so a plan needs neither weights nor a hub.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from unidetox_jax import sharding, storage
from unidetox_jax.devices import GIB
from unidetox_jax.errors import UserError
from unidetox_jax.plan import auto, compiler, configuration
from unidetox_jax.plan.compiler import Program, Report
from unidetox_jax.plan.fits import TABLE_TOPOLOGIES, dtype, suggestions, table
from unidetox_jax.plan.topology import Topology, topology
from unidetox_jax.stages import base, common
from unidetox_jax.stages.run import planned as planned_tasks
from unidetox_jax.stages.settings import Run

LARGEST = 12  # arrays whose sharding is shown
SHOWN_SHARE = 1e-3  # of the disk's peak, below which a task is not listed

Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--topology", default="", help="v5e:4x4, v5e-16, h100-8, h100-2x8, … or local: the devices of this machine"
    )
    parser.add_argument(
        "--table", action="store_true", help="memory of distillation and fine-tuning on many topologies"
    )
    parser.add_argument(
        "--json", default="", metavar="FILE", type=os.path.expanduser, help="all that is printed, there"
    )


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Prints the plan; 0 where every stage fits, 1 where one does not."""
    if options.table:
        names = options.topology.split(",") if options.topology else TABLE_TOPOLOGIES
        for line in table(run, [topology(name) for name in names]):
            print(line, flush=True)
        return 0
    if not options.topology:
        raise UserError("--topology: missing; expected local, v5e:4x4 or v5e-16 as TPUs are called, GPUs as in h100-8")
    place = topology(options.topology)
    device, records = place.devices[0].device_kind, []
    print(f"{place.name}: {len(place.devices)} x {device} ({place.slice})")
    for record in planned(run, place):
        print("\n".join(describe(record)), flush=True)
        records.append(record)
    disk = disk_of(planned_tasks(run))
    print("\n".join(describe_disk(disk)), flush=True)
    refused = [record for record in records if not record["fits"]]
    for record in refused:
        print(f"\n{record['name']} does not fit on {place.name}; what makes it fit: ", end="")
        print("; ".join(record["suggestions"]) or "nothing that was tried")
    if options.json:
        plan = {"topology": place.name, "slice": place.slice, "device": device, "devices": len(place.devices)}
        storage.write_text(options.json, json.dumps({**plan, "programs": records, "disk": disk}, indent=1))
    return 1 if refused else 0


def planned(run: Run, place: Topology) -> Iterator[Record]:
    """What is printed of each program, as values."""
    for stage, programs in configuration.programs(run, dtype(run, place)):
        layout = common.layout_of(run, stage)
        others = auto.ranked(programs, place)[:2] if layout == auto.AUTO and auto.can_choose(place) else []
        mesh = auto.mesh(layout, programs, place)
        for program in programs:
            report = compiler.compile_program(program, mesh, place.memory)
            record = _record(program, report, mesh, place)
            record["auto"] = [str(choice) for choice in others]
            record["suggestions"] = suggestions(program, mesh, place) if report.refusal else []
            yield record


def _record(program: Program, report: Report, mesh: Mesh, place: Topology) -> Record:
    platform = place.devices[0].platform
    work = program.work(mesh.shape, platform)
    bounds = compiler.bounds(program, mesh, place, report)
    seconds, bound = compiler.step_seconds(program, bounds) if bounds else (None, None)
    return {
        "name": program.name,
        "mesh": dict(mesh.shape),
        "fits": not report.refusal,
        "refusal": report.refusal,
        "bytes": {"arguments": report.arguments, "temporaries": report.temporaries, "estimate": round(work.memory)},
        "peak": report.peak,
        "memory": place.memory if math.isfinite(place.memory) else None,
        "flops": work.flops,
        "traffic_bytes": work.traffic,
        "network_bytes": compiler.network_bytes(program, report),
        "kernels": compiler.kernels(program, mesh) if platform == "gpu" and not report.refusal else None,
        "sorts": [{"depth": depth, "of": of, "count": count} for (depth, of), count in report.sorts.items()],
        "steps": program.steps,
        "bounds": dict(bounds),
        "bound": bound,
        "utilisation": program.utilisation,
        "seconds": seconds,
        "chip_hours": seconds and program.steps * seconds / 3600 * place.chips,
        "shardings": list(_shardings(program.resident(mesh))),
        "collectives": list(_collectives(report)),
    }


def disk_of(tasks: Sequence[base.Task]) -> Record:
    """Bytes of the working directory: at most while it is filled and by which task, after all, and of each task."""
    each, stays, peak, during = [], 0.0, 0.0, ""
    for task in tasks:
        most, left = task.disk()
        if stays + most > peak:
            peak, during = stays + most, task.name
        stays += left
        each.append({"name": task.name, "peak": round(most), "stays": round(left)})
    return {"peak": round(peak), "during": during, "stays": round(stays), "tasks": each}


def describe_disk(disk: Record) -> Iterator[str]:
    """The lines on the working directory; tasks that hold next to nothing are left out."""
    yield (
        f"\ndisk: the working directory holds {disk['peak'] / 1e9:,.1f} GB at most, during {disk['during']}, and "
        f"{disk['stays'] / 1e9:,.1f} GB when all is complete"
    )
    for task in disk["tasks"]:
        if task["peak"] > SHOWN_SHARE * disk["peak"]:
            yield f"  {task['name']:<32} {task['peak'] / 1e9:10,.2f} GB at most {task['stays'] / 1e9:10,.2f} stay"


def describe(record: Record) -> Iterator[str]:
    """The lines of one program: does it fit, memory, work of a step, time, shardings, collectives."""
    memory = f" of {record['memory'] / GIB:.0f}" if record["memory"] else ""
    yield f"\n{record['name']}: " + ("fits" if record["fits"] else f"DOES NOT FIT: {record['refusal']}")
    yield f"  mesh        {', '.join(f'{axis}:{size}' for axis, size in record['mesh'].items())}"
    yield from _under(
        "auto", (f"{what} {choice}" for what, choice in zip(("chose", "next"), record["auto"], strict=False))
    )
    parts = [f"{record['bytes'][kind] / GIB:.2f} {kind}" for kind in ("arguments", "temporaries")]
    yield f"  GiB a chip  {' + '.join(parts)}, peak {record['peak'] / GIB:.2f}{memory}"
    moved, received = record["traffic_bytes"] / 1e9, record["network_bytes"] / 1e9
    yield (
        f"  a step      {record['flops'] / 1e12:,.3f} TFLOP, {moved:,.2f} GB to and from memory and {received:,.3f} GB "
        "received, on each chip"
    )
    if record["kernels"] is not None:
        yield f"  launches    {record['kernels']:,} kernels in a step"
    yield from _under("sorts", (f"{one['count']} of {one['of']}, {_where(one['depth'])}" for one in record["sorts"]))
    if record["bounds"]:
        total = record["steps"] * record["seconds"]
        each = ", ".join(f"{name} {value * 1e3:,.2f}" for name, value in record["bounds"].items())
        yield (
            f"  time        {record['seconds'] * 1e3:,.2f} ms a step at {record['utilisation']:.0%} of the bound by "
            f"{record['bound']} (ms: {each}); {record['steps']:,} steps {total / 60:,.1f} min, "
            f"{record['chip_hours']:,.2f} chip-hours"
        )
    yield from _under("shardings", record["shardings"])
    yield from _under("collectives", record["collectives"])


def _under(heading: str, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {heading:<11} {line}"
        heading = ""


def _where(depth: int) -> str:
    return ("once", "in each round of the loop", "in each layer of each round")[min(depth, 2)]


def _shardings(resident) -> Iterator[str]:
    """The largest arrays, one a line: path, shape, how it is cut, a device's bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(resident)
    for path, leaf in sorted(leaves, key=lambda item: -item[1].size)[:LARGEST]:
        spec = ", ".join(str(axis) for axis in leaf.sharding.spec) or "whole on every device"
        shape = "x".join(map(str, leaf.shape))
        size = compiler.bytes_per_device(leaf) / GIB
        yield f"{sharding.path_string(path):<44} {shape:<22} ({spec})  {size:.3f} GiB"


def _collectives(report: Report) -> Iterator[str]:
    for found in report.collectives:
        among = f" among {len(found.group)}" if found.group else ""
        size = found.bytes / 1e6
        yield f"{found.count} {found.kind}{among}, {_where(found.depth)}: {size:,.2f} MB, the largest {found.largest}"
