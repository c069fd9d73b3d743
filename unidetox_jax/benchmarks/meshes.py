"""On which meshes each published layout of attention heads compiles, for devices that are not present.

    python -m unidetox_jax.benchmarks.meshes [HUB ...] [--devices h100 v5e] [--meshes MESH ...] [--layouts gpt2 ...]
        [--programs train distill evaluate score] [--results FILE]

HUB: folders of checkpoints' folders, whose config.json files are read in addition to the package's own configurations.
A layout is a family, a number of heads and key-value heads, a head size and a kind of attention. It is compiled with
one layer of each kind and a small vocabulary, on every mesh of 1, 2, 4 and 8 devices: a training step of odd length,
the generation of two models together (distillation), of several texts a prompt (evaluation), the scoring of texts.

Prints Markdown, a line for each layout and kind of device: ok; refused, with the number of a reason below, if the
package rejects it before compiling; FAILED otherwise. The exit code is 1 if anything failed. The whole table takes six
hours of one core: with --results a run that was stopped goes on where it ended.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from unidetox_jax import models, sharding
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig
from unidetox_jax.plan import abstract_programs, auto_mesh, topology
from unidetox_jax.plan.compiler import Program
from unidetox_jax.recipe import Recipe

COUNTS = (1, 2, 4, 8)
MESHES = tuple(layout for count in COUNTS for layout in auto_mesh.mesh_layouts(count))
PROGRAMS = ("train", "distill", "evaluate", "score")
HIDDEN = 128  # hidden size; attention has all the heads of the published model
WINDOW = 16  # shorter than the texts, so that it matters


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description="every mesh for every layout of heads, compiled")
    parser.add_argument("hub", nargs="*", type=pathlib.Path, help="folders of published checkpoints' folders")
    parser.add_argument("--devices", nargs="+", default=["h100", "v5e"], help="kinds in `unidetox plan --topology`")
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--layouts", nargs="+", default=[""], help="only layouts whose names start with one of these")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--results", type=pathlib.Path, help="JSON lines of outcomes; only failures are repeated")
    options = parser.parse_args(argv)
    try:
        selected = {name: cfg for name, cfg in layouts(options.hub).items() if name.startswith(tuple(options.layouts))}
        failed = table(selected, options.devices, options.meshes, options.programs, options.results)
    except UserError as error:
        print(f"meshes: {error}", file=sys.stderr)
        return error.exit_code
    return int(failed)


def layouts(hubs: Sequence[pathlib.Path] = ()) -> dict[str, ModelConfig]:
    """Name of a layout → configuration of a small model, made from the first checkpoint with that layout."""
    configs = [models.published_config(name) for name in models.PUBLISHED]
    for path in sorted(path for hub in hubs for path in hub.glob("*/config.json")):
        try:
            configs.append(models.config_from_hf(json.loads(path.read_text()), where=str(path)))
        except UserError:  # not one of our families
            continue
    small: dict[str, ModelConfig] = {}
    for cfg in configs:
        assert cfg is not None
        small.setdefault(layout_name(cfg), shrink(cfg))
    return dict(sorted(small.items()))


def layout_name(cfg: ModelConfig) -> str:
    """ "gemma3_text 4/1 x 256, window in some layers": heads, key-value heads, head size, kind of attention."""
    window = "window in some layers" if len(set(cfg.local)) > 1 else "window" if any(cfg.local) else ""
    attention = (window, "ALiBi" if cfg.alibi else "", "cap" if cfg.attention_cap else "")
    heads = f"{cfg.family} {cfg.num_heads}/{cfg.num_kv_heads} x {cfg.head_size}"
    return ", ".join(filter(None, (heads, *attention)))


def shrink(cfg: ModelConfig) -> ModelConfig:
    """A model of the same layout that compiles in seconds; sizes that 8 does not divide stay so."""
    local = (True, False) if len(set(cfg.local)) > 1 else cfg.local[:1]
    width: dict[str, Any] = (
        {"token_width": HIDDEN} if hasattr(cfg, "token_width") else {}
    )  # OPT's may be another than hidden_size
    return dataclasses.replace(
        cfg,
        **width,
        dtype="bfloat16",
        hidden_size=HIDDEN,
        num_layers=max(1, len(local)),
        local=local,
        window=WINDOW if local else 0,
        vocab_size=512 + cfg.vocab_size % 8,
        intermediate_size=256 + cfg.intermediate_size % 8,
    )


def programs_of(cfg: ModelConfig) -> Iterator[Program]:
    """The programs of the stages."""
    yield abstract_programs.training_program("train", cfg, Recipe(steps=1, max_length=33))
    yield abstract_programs.decoding_program(
        "distill", [cfg, cfg], objectives.get("contrastive"), warpers.choose(top_k=50), rows=8, prompt=1,
        new_tokens=24, batches=1,
    )  # fmt: skip
    yield abstract_programs.decoding_program(
        "evaluate", [cfg], objectives.get("base"), warpers.choose(top_p=0.9), rows=16, prompt=9, new_tokens=12,
        batches=1, samples=2,
    )  # fmt: skip
    yield abstract_programs.scoring_program("score", cfg, 8, 33, 9, 1)


def outcome(cfg: ModelConfig, mesh: Mesh, names: Sequence[str]) -> tuple[str, str]:
    """("ok", ""), ("refused", reason) or ("FAILED", program and error)."""
    for program in (program for program in programs_of(cfg) if program.name in names):
        try:
            lowered = program.lower(mesh)
        except UserError as error:
            return "refused", str(error)
        except Exception as error:  # any failure belongs in the table
            return "FAILED", f"{program.name}: {_line(error)}"
        try:
            lowered.compile()
        except Exception as error:
            return "FAILED", f"{program.name}: {_line(error)}"
    return "ok", ""


def mesh_of(kind: str, layout: str) -> Mesh:
    """The layout on the first devices of the smallest topology of that kind that has enough."""
    shape = tuple(int(part.partition(":")[2]) for part in layout.split(","))
    count = int(np.prod(shape))
    devices = topology.get_topology(f"{kind}-{count if kind in topology.GPUS else max(4, count)}").devices
    if len(devices) == count:
        return sharding.make_mesh(layout, devices)
    return Mesh(np.asarray(devices[:count]).reshape(shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def table(
    configs: dict[str, ModelConfig],
    kinds: Sequence[str],
    meshes: Sequence[str],
    names: Sequence[str],
    file: pathlib.Path | None = None,
) -> bool:
    """Prints the table line by line; returns whether anything failed. Outcomes in the file are not compiled again but
    for failures, which may have been mended; new ones are added to it."""
    known = _known(file)
    reasons: dict[str, int] = {}
    failed = False
    print("Meshes as data x fsdp x model.\n")
    print(
        "| layout | for |"
        + "".join(f" {'x'.join(part.partition(':')[2] for part in mesh.split(','))} |" for mesh in meshes)
    )
    print("|---" * (2 + len(meshes)) + "|", flush=True)
    for name, cfg in configs.items():
        for kind in kinds:
            cells = []
            for layout in meshes:
                key = (name, kind, layout, ",".join(names), jax.__version__)
                if key not in known:
                    start = time.monotonic()
                    known[key] = outcome(cfg, mesh_of(kind, layout), names)
                    result, reason = known[key]
                    seconds = time.monotonic() - start
                    print(f"{name}, {kind}, {layout}: {result} {reason} ({seconds:.1f} s)", file=sys.stderr, flush=True)
                    if file is not None:
                        with file.open("a") as lines:
                            print(json.dumps([*key, result, reason]), file=lines)
                result, reason = known[key]
                failed |= result == "FAILED"
                note = f" {reasons.setdefault(reason, len(reasons) + 1)}" if reason else ""
                cells.append("ok" if result == "ok" else f"{result}{note}")
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)
            jax.clear_caches()  # traces of programs that do not come again take 50 MB a cell
    for reason, number in reasons.items():
        print(f"\n{number}. {reason}")
    return failed


def _known(file: pathlib.Path | None) -> dict[tuple[str, ...], tuple[str, str]]:
    """(layout, kind of device, mesh, programs, version of JAX) → outcome of earlier runs that is no failure."""
    lines = [] if file is None or not file.exists() else file.read_text().splitlines()
    return {tuple(key): (result, reason) for *key, result, reason in map(json.loads, lines) if result != "FAILED"}


def _line(error: Exception) -> str:
    """The error on one line; a long message keeps its end, where an embedded traceback says what happened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:100]} … {text[-200:]}'}"


if __name__ == "__main__":
    sys.exit(main())
