"""What fits on which devices, tried out by compiling: for suggestions, and for a table of models and topologies."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from absl import logging
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.devices import GIB
from unidetox_jax.plan import auto, compiler, configuration, programs
from unidetox_jax.plan.compiler import Program
from unidetox_jax.plan.topology import Topology, larger, topology
from unidetox_jax.stages import common
from unidetox_jax.stages.settings import Run, model_name

TRIED = 2  # meshes of a program, the fastest ones that should fit
# Rows of the table of BENCHMARKS.md, and what it is for
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
    """A program that fits: the settings that it takes, the mesh, bytes of a device at most."""

    flags: str
    mesh: Mesh
    peak: int

    def __str__(self) -> str:
        return f"{self.flags} ({self.peak / GIB:.1f} GiB)"


def suggestions(program: Program, mesh: Mesh, place: Topology) -> list[str]:
    """What fits in place of a program that does not on a mesh: on other meshes of these devices, with settings that
    take less memory, on the next number of devices that is enough."""
    here = [("", program)]
    found = [first_fit(here, place, [mesh]), *(first_fit([leaner], place) for leaner in program.leaner())]
    more = ((f"--topology={name}", topology(name)) for name in larger(place))
    found.append(next(filter(None, (first_fit([(flag, program)], bigger) for flag, bigger in more)), None))
    return [str(fit) for fit in found if fit]


def first_fit(candidates: Iterable[tuple[str, Program]], place: Topology, but: Sequence[Mesh] = ()) -> Fit | None:
    """The first of (flags, program) that fits on some mesh of the devices, but not on those meshes."""
    for flags, program in candidates:
        choices = [choice for choice in auto.ranked([program], place) if choice.fits]
        meshes = [sharding.make_mesh(choice.layout, place.devices) for choice in choices[:TRIED]]
        for mesh in (mesh for mesh in meshes if mesh not in but):
            report = compiler.compile_program(program, mesh, place.memory)
            if not report.refusal:
                return Fit(" ".join(filter(None, (flags, _as_flag(program, mesh)))), mesh, report.peak)
    return None


def _as_flag(program: Program, mesh: Mesh) -> str:
    """The mesh as a setting of the program's stage."""
    stage = program.name.split()[0].rstrip(":")
    section = f"{stage}." if stage in ("distill", "evaluate") else ""
    sizes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1)
    return f"--config.{section}mesh={sizes}" if sizes else ""


def table(run: Run, places: Sequence[Topology], names: Iterable[str] = ("", *TABLE_MODELS)) -> Iterator[str]:
    """Lines of a Markdown table: GiB a device of fine-tuning each model (of distillation where the name is empty) on
    the mesh that is fastest, with recomputation where it does not fit without."""
    yield f"| GiB a device | {' | '.join(place.name for place in places)} |"
    yield "|---|" + "---:|" * len(places)
    for name in names:
        label = f"fine-tune {model_name(name)}" if name else f"distill {', '.join(run.distill.models)}"
        cells = []
        for place in places:
            program = _of_table(run, name, place)
            leaner = list(program.leaner())[:1] if name else []
            fit = first_fit([("", program), *leaner], place)
            least = min(auto.ranked([one for _, one in leaner] or [program], place), key=lambda choice: choice.memory)
            sizes = fit and ",".join(f"{axis}:{size}" for axis, size in fit.mesh.shape.items() if size > 1)
            remat = ", remat full" if fit and "remat" in fit.flags else ""
            cells.append(
                f"{fit.peak / GIB:.1f} ({sizes or 'one'}{remat})" if fit else f"no: about {least.memory / GIB:.0f}"
            )
            logging.info("plan: %s, %s: %s", label, place.name, cells[-1])
        yield f"| {label} | {' | '.join(cells)} |"


def _of_table(run: Run, name: str, place: Topology) -> Program:
    if not name:
        return configuration.distillation(run, run.distill, dtype(run, place))
    recipe = dataclasses.replace(run.detoxify, remat="none")
    return programs.training_program(
        f"detoxify {model_name(name)}", common.load_config(run, name, dtype(run, place)), recipe
    )


def dtype(run: Run, place: Topology) -> str:
    """What the run computes in on these devices."""
    return run.shared.dtype or models.default_dtype(place.devices[0].platform)
