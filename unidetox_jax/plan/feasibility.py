"""What fits on which devices, found by compiling: suggestions for a plan, and a table of models and topologies."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from absl import logging
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.devices import GIB
from unidetox_jax.plan import abstract_programs, auto_mesh, compiler, stage_programs
from unidetox_jax.plan.compiler import Program
from unidetox_jax.plan.topology import Topology, get_topology, larger_topologies
from unidetox_jax.stages import loading
from unidetox_jax.stages.settings import Run, model_name

MAX_MESHES = 2  # compiled per program: the fastest ones that should fit
# Rows of the table in BENCHMARKS.md, and its columns
TABLE_MODELS = (
    "openai-community/gpt2-xl",
    "facebook/opt-6.7b",
    "tiiuae/falcon-7b",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
)
TABLE_TOPOLOGIES = ("v5e-4", "v5e-16", "v5p-8", "v4-16", "v6e-8", "a100-80-8", "h100-1", "h100-8", "b200-8")


class Fit(NamedTuple):
    """A program that fits: its settings as flags, its mesh, and peak bytes of a device."""

    flags: str
    mesh: Mesh
    peak: int

    def __str__(self) -> str:
        return f"{self.flags} ({self.peak / GIB:.1f} GiB)"


def suggestions(program: Program, mesh: Mesh, topology: Topology) -> list[str]:
    """Alternatives to a program that does not fit on a mesh: other meshes of these devices, settings that take less
    memory, the smallest larger topology."""
    fits = [first_fit([("", program)], topology, [mesh])]
    fits += [first_fit([variant], topology) for variant in program.memory_savers()]
    larger = ((f"--topology={name}", get_topology(name)) for name in larger_topologies(topology))
    fits.append(next(filter(None, (first_fit([(flag, program)], other) for flag, other in larger)), None))
    return [str(fit) for fit in fits if fit]


def first_fit(
    candidates: Iterable[tuple[str, Program]], topology: Topology, excluded: Sequence[Mesh] = ()
) -> Fit | None:
    """The first of (flags, program) that fits on some mesh of the devices that is not excluded."""
    for flags, program in candidates:
        estimates = [estimate for estimate in auto_mesh.rank_meshes([program], topology) if estimate.fits]
        meshes = [sharding.make_mesh(estimate.layout, topology.devices) for estimate in estimates[:MAX_MESHES]]
        for mesh in (mesh for mesh in meshes if mesh not in excluded):
            report = compiler.compile_program(program, mesh, topology.memory)
            if not report.refusal:
                return Fit(" ".join(filter(None, (flags, _mesh_flag(program, mesh)))), mesh, report.peak)
    return None


def _mesh_flag(program: Program, mesh: Mesh) -> str:
    """The mesh as a setting of the program's stage."""
    stage = program.name.split()[0].rstrip(":")
    section = f"{stage}." if stage in ("distill", "evaluate") else ""
    sizes = _sizes(mesh)
    return f"--config.{section}mesh={sizes}" if sizes else ""


def _sizes(mesh: Mesh) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1)


def table(run: Run, topologies: Sequence[Topology], names: Iterable[str] = ("", *TABLE_MODELS)) -> Iterator[str]:
    """Lines of a Markdown table: GiB a device of fine-tuning each model (of distillation if the name is empty) on the
    fastest mesh, with recomputation where it does not fit without."""
    yield f"| GiB a device | {' | '.join(topology.name for topology in topologies)} |"
    yield "|---|" + "---:|" * len(topologies)
    for name in names:
        label = f"fine-tune {model_name(name)}" if name else f"distill {', '.join(run.distill.models)}"
        cells = []
        for topology in topologies:
            cells.append(_cell(_table_program(run, name, topology), bool(name), topology))
            logging.info("plan: %s, %s: %s", label, topology.name, cells[-1])
        yield f"| {label} | {' | '.join(cells)} |"


def _cell(program: Program, trains: bool, topology: Topology) -> str:
    savers = list(program.memory_savers())[:1] if trains else []
    fit = first_fit([("", program), *savers], topology)
    if fit:
        remat = ", remat full" if "remat" in fit.flags else ""
        return f"{fit.peak / GIB:.1f} ({_sizes(fit.mesh) or 'one'}{remat})"
    leanest = [saver for _, saver in savers] or [program]
    memory = min(estimate.memory for estimate in auto_mesh.rank_meshes(leanest, topology))
    return f"no: about {memory / GIB:.0f}"


def _table_program(run: Run, name: str, topology: Topology) -> Program:
    dtype = compute_dtype(run, topology)
    if not name:
        return stage_programs.distillation_program(run, run.distill, dtype)
    recipe = dataclasses.replace(run.detoxify, remat="none")
    return abstract_programs.training_program(
        f"detoxify {model_name(name)}", loading.load_config(run, name, dtype), recipe
    )


def compute_dtype(run: Run, topology: Topology) -> str:
    """The run's compute dtype on these devices."""
    return run.shared.dtype or models.default_dtype(topology.devices[0].platform)
