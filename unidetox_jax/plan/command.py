"""`unidetox plan`: the memory and time of a configuration's stages on devices that are not rented yet.

The package contains the configurations of well-known checkpoints, so a plan needs neither weights nor a hub.
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
from unidetox_jax.plan import auto_mesh, compiler, stage_programs
from unidetox_jax.plan.compiler import Program, Report
from unidetox_jax.plan.feasibility import TABLE_TOPOLOGIES, compute_dtype, suggestions, table
from unidetox_jax.plan.topology import Topology, get_topology
from unidetox_jax.stages import loading
from unidetox_jax.stages.run import all_tasks
from unidetox_jax.stages.settings import Run
from unidetox_jax.stages.task import Task

SHOWN_ARRAYS = 12  # the largest ones, whose shardings are shown
SHOWN_SHARE = 1e-3  # of the disk's peak; tasks below it are not listed

Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--topology", default="", help="v5e:4x4, v5e-16, h100-8, h100-2x8, …; local: the devices of this machine"
    )
    parser.add_argument(
        "--table", action="store_true", help="memory of distillation and fine-tuning on many topologies"
    )
    parser.add_argument("--json", default="", metavar="FILE", type=os.path.expanduser, help="write the plan as JSON")


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Prints the plan; 0 if every stage fits, 1 otherwise."""
    if options.table:
        names = options.topology.split(",") if options.topology else TABLE_TOPOLOGIES
        for line in table(run, [get_topology(name) for name in names]):
            print(line, flush=True)
        return 0
    if not options.topology:
        raise UserError("--topology: missing; expected local, a TPU slice as in v5e:4x4 or v5e-16, GPUs as in h100-8")
    topology = get_topology(options.topology)
    device, records = topology.devices[0].device_kind, []
    print(f"{topology.name}: {len(topology.devices)} x {device} ({topology.slice})")
    for record in plan_programs(run, topology):
        print("\n".join(describe(record)), flush=True)
        records.append(record)
    disk = plan_disk(all_tasks(run))
    print("\n".join(describe_disk(disk)), flush=True)
    refused = [record for record in records if not record["fits"]]
    for record in refused:
        print(f"\n{record['name']} does not fit on {topology.name}; what makes it fit: ", end="")
        print("; ".join(record["suggestions"]) or "nothing that was tried")
    if options.json:
        plan = {"topology": topology.name, "slice": topology.slice, "device": device, "devices": len(topology.devices)}
        storage.write_text(options.json, json.dumps({**plan, "programs": records, "disk": disk}, indent=1))
    return 1 if refused else 0


def plan_programs(run: Run, topology: Topology) -> Iterator[Record]:
    """The plan of each program, as printed by `describe`."""
    for stage, programs in stage_programs.programs_by_stage(run, compute_dtype(run, topology)):
        layout = loading.mesh_layout(run, stage)
        ranks = layout == auto_mesh.AUTO and auto_mesh.can_choose(topology)
        best = auto_mesh.rank_meshes(programs, topology)[:2] if ranks else []
        mesh = auto_mesh.choose_mesh(layout, programs, topology)
        for program in programs:
            report = compiler.compile_program(program, mesh, topology.memory)
            record = _record(program, report, mesh, topology)
            record["auto"] = [str(estimate) for estimate in best]
            record["suggestions"] = suggestions(program, mesh, topology) if report.refusal else []
            yield record


def _record(program: Program, report: Report, mesh: Mesh, topology: Topology) -> Record:
    platform = topology.devices[0].platform
    cost = program.cost(mesh.shape, platform)
    bounds = compiler.bounds(program, mesh, topology, report)
    seconds, bound = compiler.step_seconds(program, bounds) if bounds else (None, None)
    return {
        "name": program.name,
        "mesh": dict(mesh.shape),
        "fits": not report.refusal,
        "refusal": report.refusal,
        "bytes": {"arguments": report.arguments, "temporaries": report.temporaries, "estimate": round(cost.memory)},
        "peak": report.peak,
        "memory": topology.memory if math.isfinite(topology.memory) else None,
        "flops": cost.flops,
        "traffic_bytes": cost.traffic,
        "network_bytes": compiler.network_bytes(program, report),
        "kernels": compiler.kernels(program, mesh) if platform == "gpu" and not report.refusal else None,
        "sorts": [{"depth": depth, "of": of, "count": count} for (depth, of), count in report.sorts.items()],
        "steps": program.steps,
        "bounds": dict(bounds),
        "bound": bound,
        "utilisation": program.utilisation,
        "seconds": seconds,
        "chip_hours": seconds and program.steps * seconds / 3600 * topology.chips,
        "shardings": list(_shardings(program.resident(mesh))),
        "collectives": list(_collectives(report)),
    }


def plan_disk(tasks: Sequence[Task]) -> Record:
    """Bytes of the working directory: the peak and the task during which it occurs, the end, and those of each task."""
    records, stays, peak, during = [], 0.0, 0.0, ""
    for task in tasks:
        task_peak, task_stays = task.disk()
        if stays + task_peak > peak:
            peak, during = stays + task_peak, task.name
        stays += task_stays
        records.append({"name": task.name, "peak": round(task_peak), "stays": round(task_stays)})
    return {"peak": round(peak), "during": during, "stays": round(stays), "tasks": records}


def describe_disk(disk: Record) -> Iterator[str]:
    """The lines about the working directory, without tasks that take next to nothing."""
    yield (
        f"\ndisk: the working directory holds {disk['peak'] / 1e9:,.1f} GB at most, during {disk['during']}, and "
        f"{disk['stays'] / 1e9:,.1f} GB when all is complete"
    )
    for task in disk["tasks"]:
        if task["peak"] > SHOWN_SHARE * disk["peak"]:
            yield f"  {task['name']:<32} {task['peak'] / 1e9:10,.2f} GB at most {task['stays'] / 1e9:10,.2f} stay"


def describe(record: Record) -> Iterator[str]:
    """The lines about one program: whether it fits, memory, cost of a step, time, shardings, collectives."""
    memory = f" of {record['memory'] / GIB:.0f}" if record["memory"] else ""
    yield f"\n{record['name']}: " + ("fits" if record["fits"] else f"DOES NOT FIT: {record['refusal']}")
    yield f"  mesh        {', '.join(f'{axis}:{size}' for axis, size in record['mesh'].items())}"
    yield from _under(
        "auto", (f"{what} {choice}" for what, choice in zip(("chose", "next"), record["auto"], strict=False))
    )
    sizes = [f"{record['bytes'][kind] / GIB:.2f} {kind}" for kind in ("arguments", "temporaries")]
    yield f"  GiB a chip  {' + '.join(sizes)}, peak {record['peak'] / GIB:.2f}{memory}"
    moved, received = record["traffic_bytes"] / 1e9, record["network_bytes"] / 1e9
    yield (
        f"  a step      {record['flops'] / 1e12:,.3f} TFLOP, {moved:,.2f} GB to and from memory and {received:,.3f} GB "
        "received, on each chip"
    )
    if record["kernels"] is not None:
        yield f"  launches    {record['kernels']:,} kernels in a step"
    yield from _under(
        "sorts", (f"{sort['count']} of {sort['of']}, {_where(sort['depth'])}" for sort in record["sorts"])
    )
    if record["bounds"]:
        total = record["steps"] * record["seconds"]
        bounds = ", ".join(f"{name} {value * 1e3:,.2f}" for name, value in record["bounds"].items())
        yield (
            f"  time        {record['seconds'] * 1e3:,.2f} ms a step at {record['utilisation']:.0%} of the bound by "
            f"{record['bound']} (ms: {bounds}); {record['steps']:,} steps {total / 60:,.1f} min, "
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
    """The largest arrays, one a line: path, shape, partition spec, bytes of a device."""
    leaves = jax.tree_util.tree_leaves_with_path(resident)
    for path, leaf in sorted(leaves, key=lambda item: -item[1].size)[:SHOWN_ARRAYS]:
        spec = ", ".join(str(axis) for axis in leaf.sharding.spec) or "whole on every device"
        shape = "x".join(map(str, leaf.shape))
        size = compiler.bytes_per_device(leaf) / GIB
        yield f"{sharding.path_string(path):<44} {shape:<22} ({spec})  {size:.3f} GiB"


def _collectives(report: Report) -> Iterator[str]:
    for entry in report.collectives:
        among = f" among {len(entry.group)}" if entry.group else ""
        size = entry.bytes / 1e6
        times = "once" if entry.times == 1 else f"{entry.times} times"
        often = f"{times} in each step" if entry.in_steps else times
        yield f"{entry.count} {entry.kind}{among}, {often}: {size:,.2f} MB, the largest {entry.largest}"
