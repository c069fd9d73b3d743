"""`unidetox plan`: what every stage of a configuration takes on a topology, before it is rented.

Configurations of well-known checkpoints come with the package, so a plan needs neither weights nor a hub.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
from absl import logging
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.devices import GIB
from unidetox_jax.errors import UserError
from unidetox_jax.plan import compiler, programs
from unidetox_jax.plan.compiler import Program, Report
from unidetox_jax.plan.topology import Topology, topology
from unidetox_jax.stages import common
from unidetox_jax.stages.settings import Run, model_name

MESHES = ("fsdp:-1", "fsdp:-1,model:2", "fsdp:-1,model:4", "model:-1")  # tried in this order where the run's fails
LARGEST = 12  # arrays whose sharding is shown
# Rows of the table of BENCHMARKS.md, and the slices that it is for
TABLE_MODELS = (
    "openai-community/gpt2-xl",
    "facebook/opt-6.7b",
    "tiiuae/falcon-7b",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
)
TABLE_TOPOLOGIES = ("v5e-4", "v5e-16", "v5p-8", "v4-16", "v6e-8")

Candidate = tuple[str, Program, str]  # what it is called, the program, the mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--topology", default="", help="v5e:4x4, v5e-16, … or local: the devices of this machine")
    parser.add_argument("--table", action="store_true", help="memory of distillation and fine-tuning on many slices")


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Prints the plan; 0 where every stage fits, 1 where one does not."""
    if options.table:
        names = options.topology.split(",") if options.topology else TABLE_TOPOLOGIES
        for line in table(run, TABLE_MODELS, [topology(name) for name in names]):
            print(line, flush=True)
        return 0
    if not options.topology:
        raise UserError("--topology: missing; expected local, a slice such as v5e:4x4, or a type such as v5e-16")
    place = topology(options.topology)
    print(f"{place.name}: {len(place.devices)} x {place.devices[0].device_kind} ({place.slice})")
    fits = True
    for program in programs.programs(run, _dtype(run, place)):
        mesh = sharding.make_mesh(run.shared.mesh, place.devices)
        report = compiler.compile_program(program, mesh, place.specs)
        print("\n".join(describe(program, report, mesh, place)), flush=True)
        if report.refusal:
            print(f"  suggestion  {suggest(run, program, place)}", flush=True)
            fits = False
    return 0 if fits else 1


def describe(program: Program, report: Report, mesh: Mesh, place: Topology) -> Iterator[str]:
    """The lines of one program: does it fit, memory, work of a step, time, shardings, collectives."""
    memory = f" of {place.specs.memory / GIB:.0f}" if place.specs else ""
    verdict = f"DOES NOT FIT: {report.refusal}" if report.refusal else "fits"
    yield f"\n{program.name}: {verdict}"
    yield f"  mesh        {', '.join(f'{axis}:{size}' for axis, size in mesh.shape.items())}"
    yield (
        f"  GiB a chip  {report.arguments / GIB:.2f} arguments + {report.temporaries / GIB:.2f} temporaries, "
        f"peak {report.peak / GIB:.2f}{memory}"
    )
    moved, received = program.traffic(mesh) / 1e9, compiler.network_bytes(program, report) / 1e9
    yield (
        f"  a step      {program.flops / 1e12:,.2f} TFLOP and {moved:,.2f} GB of memory traffic on all chips together, "
        f"{received:,.3f} GB received by each"
    )
    bounds = compiler.bounds(program, report, mesh, place)
    if bounds:
        bound = max(bounds, key=bounds.__getitem__)
        seconds = bounds[bound] / program.utilisation
        total = program.steps * seconds
        yield (
            f"  time        {seconds * 1e3:,.2f} ms a step at {program.utilisation:.0%} of the bound by {bound}; "
            f"{program.steps:,} steps {total / 60:,.1f} min, {total / 3600 * place.chips:,.2f} chip-hours"
        )
    yield from _under("shardings", _shardings(program.resident(mesh)))
    yield from _under("collectives", _collectives(report))


def _under(heading: str, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {heading:<11} {line}"
        heading = ""


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
        where = ("once", "in each round of the loop", "in each layer of each round")[min(found.depth, 2)]
        size = found.bytes / 1e6
        yield f"{found.count} {found.kind}, {where}: {size:,.2f} MB, the largest {found.largest}"


def suggest(run: Run, program: Program, place: Topology) -> str:
    """What would fit, as flags: recomputation on the run's mesh, then the other meshes."""
    flag, leaner = program.leaner or ("", program)
    meshes = _meshes(run)
    flags = {mesh: f"{flag} --config.mesh={mesh}".strip() for mesh in meshes[1:]}
    flags |= {meshes[0]: flag} if flag else {}
    fit, peak = first_fit([(flags[mesh], leaner, mesh) for mesh in meshes if mesh in flags], place)
    if fit:
        return f"{fit} needs {peak / GIB:.1f} GiB"
    return "none of " + ", ".join(meshes) + " fits; take more chips, accumulation or a smaller batch"


def table(run: Run, names: Iterable[str], places: Sequence[Topology], distill: bool = True) -> Iterator[str]:
    """Lines of a Markdown table: GiB a chip of distillation and of fine-tuning each model, slice by slice.

    Each cell is the first that fits of: the run's mesh without and with recomputation, then other meshes.
    """
    yield f"| GiB a chip | {' | '.join(place.name for place in places)} |"
    yield "|---|" + "---:|" * len(places)
    for name in (*[""] * distill, *names):
        label = f"fine-tune {model_name(name)}" if name else f"distill {', '.join(run.distill.models)}"
        cells = []
        for place in places:
            fit, peak = first_fit(_candidates(run, name, _dtype(run, place)), place)
            cells.append(f"{peak / GIB:.1f} ({fit})" if fit else f"no: at least {peak / GIB:.1f}")
            logging.info("plan: %s, %s: %s", label, place.name, cells[-1])
        yield f"| {label} | {' | '.join(cells)} |"


def _candidates(run: Run, name: str, dtype: str) -> Iterator[Candidate]:
    """Ways to fine-tune a model, or to distill where there is no name."""
    if name:
        recipe = dataclasses.replace(run.detoxify, remat="none")
        cfg = common.load_config(run, name, dtype)
        program = programs.training_program(f"detoxify {model_name(name)}", cfg, recipe)
    else:
        program = programs.distillation(run, dtype)
    for mesh in _meshes(run):
        yield mesh, program, mesh
        if program.leaner:
            yield f"{mesh}, remat full", program.leaner[1], mesh


def first_fit(candidates: Iterable[Candidate], place: Topology) -> tuple[str, float]:
    """The first candidate that fits and its peak in bytes a device; or "" and the least that one of them needs."""
    least = math.inf
    for name, program, layout in candidates:
        try:
            report = compiler.compile_program(program, sharding.make_mesh(layout, place.devices), place.specs)
        except UserError:  # the mesh does not go with the devices or the model
            continue
        if not report.refusal:
            return name, report.peak
        least = min(least, report.peak)
    return "", least


def _meshes(run: Run) -> list[str]:
    return list(dict.fromkeys((run.shared.mesh, *MESHES)))


def _dtype(run: Run, place: Topology) -> str:
    return run.shared.dtype or models.default_dtype(place.devices[0].platform)
