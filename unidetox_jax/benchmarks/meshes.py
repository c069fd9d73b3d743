"""Which meshes every published layout of heads compiles on, for devices that are not here.

    python -m unidetox_jax.benchmarks.meshes [HUB ...] [--devices h100 v5e] [--meshes MESH ...] [--layouts gpt2 ...]
        [--programs train distill evaluate score]

HUB: folders of published checkpoints' folders, of which the config.json alone is read, beside those that are built in.
Checkpoints of one family, one number of heads, of key-value heads, one head size and one kind of attention are one
layout. It is compiled with a layer of each kind and little vocabulary, on every mesh of 1, 2, 4 and 8 devices: a
training step of an odd length, the generation of two models together (distillation), that of several texts a prompt
(evaluation) and the scoring of texts.

Prints Markdown, a line for each layout and kind of device: ok; a number where it is refused before anything is
compiled, with the reason below; FAILED otherwise. The exit code is 1 where anything failed.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from unidetox_jax import models, sharding
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig
from unidetox_jax.plan import auto, programs, topology
from unidetox_jax.plan.compiler import Program
from unidetox_jax.recipe import Recipe

COUNTS = (1, 2, 4, 8)
MESHES = tuple(layout for count in COUNTS for layout in auto.layouts(count))
PROGRAMS = ("train", "distill", "evaluate", "score")
HIDDEN = 128  # between the blocks; in its attention a model has all its heads
WINDOW = 16  # less than the texts' length, so that it cuts something off


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description="every mesh for every layout of heads, compiled")
    parser.add_argument("hub", nargs="*", type=pathlib.Path, help="folders of published checkpoints' folders")
    parser.add_argument("--devices", nargs="+", default=["h100", "v5e"], help="as `unidetox plan --topology` has them")
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--layouts", nargs="+", default=[""], help="those alone whose names begin so")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    options = parser.parse_args(argv)
    try:
        known = layouts(options.hub)
        found = {name: known[name] for name in known if name.startswith(tuple(options.layouts))}
        failed = table(found, options.devices, options.meshes, options.programs)
    except UserError as error:
        print(f"meshes: {error}", file=sys.stderr)
        return error.exit_code
    return int(failed)


def layouts(hubs: Sequence[pathlib.Path] = ()) -> dict[str, ModelConfig]:
    """Name of a layout → a small model of it, as the first checkpoint has it that is so."""
    configs = [models.published_config(name) for name in models.PUBLISHED]
    for path in sorted(path for hub in hubs for path in hub.glob("*/config.json")):
        try:
            configs.append(models.config_from_hf(json.loads(path.read_text()), where=str(path)))
        except UserError:  # of another kind than any family
            continue
    found: dict[str, ModelConfig] = {}
    for cfg in configs:
        assert cfg is not None
        found.setdefault(name_of(cfg), small(cfg))
    return dict(sorted(found.items()))


def name_of(cfg: ModelConfig) -> str:
    """ "gemma3_text 4/1 x 256, window in some layers": heads, key-value heads, their size, what else attention has."""
    window = "window in some layers" if len(set(cfg.local)) > 1 else "window" if any(cfg.local) else ""
    more = (window, "ALiBi" if cfg.alibi else "", "cap" if cfg.attention_cap else "")
    heads = f"{cfg.family} {cfg.num_heads}/{cfg.num_kv_heads} x {cfg.head_size}"
    return ", ".join(filter(None, (heads, *more)))


def small(cfg: ModelConfig) -> ModelConfig:
    """A model of the same layout that compiles in seconds; what does not divide by 8 still does not."""
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
    """What the stages run."""
    yield programs.training_program("train", cfg, Recipe(steps=1, max_length=33))
    yield programs.decoding_program(
        "distill", [cfg, cfg], objectives.get("contrastive"), warpers.choose(top_k=50), rows=8, prompt=1,
        new_tokens=24, batches=1,
    )  # fmt: skip
    yield programs.decoding_program(
        "evaluate", [cfg], objectives.get("base"), warpers.choose(top_p=0.9), rows=16, prompt=9, new_tokens=12,
        batches=1, samples=2,
    )  # fmt: skip
    yield programs.scoring_program("score", cfg, 8, 33, 9, 1)


def outcome(cfg: ModelConfig, mesh: Mesh, names: Sequence[str]) -> tuple[str, str]:
    """("ok", ""), ("refused", reason) or ("FAILED", program and error)."""
    for program in (one for one in programs_of(cfg) if one.name in names):
        try:
            lowered = program.lower(mesh)
        except UserError as error:
            return "refused", str(error)
        except Exception as error:  # whatever it is, the table is to hold it
            return "FAILED", f"{program.name}: {_line(error)}"
        try:
            lowered.compile()
        except Exception as error:
            return "FAILED", f"{program.name}: {_line(error)}"
    return "ok", ""


def mesh_of(kind: str, layout: str) -> Mesh:
    """A mesh of as many of a kind of device as the layout has, of the smallest topology that has them."""
    shape = tuple(int(part.partition(":")[2]) for part in layout.split(","))
    count = int(np.prod(shape))
    devices = topology.topology(f"{kind}-{count if kind in topology.GPUS else max(4, count)}").devices
    if len(devices) == count:
        return sharding.make_mesh(layout, devices)
    return Mesh(np.asarray(devices[:count]).reshape(shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def table(found: dict[str, ModelConfig], kinds: Sequence[str], meshes: Sequence[str], names: Sequence[str]) -> bool:
    """Prints the table as its lines come; returns whether anything failed."""
    reasons: dict[str, int] = {}
    failed = False
    print("Meshes as data x fsdp x model.\n")
    print(
        "| layout | for |"
        + "".join(f" {'x'.join(part.partition(':')[2] for part in mesh.split(','))} |" for mesh in meshes)
    )
    print("|---" * (2 + len(meshes)) + "|", flush=True)
    for name, cfg in found.items():
        for kind in kinds:
            cells = []
            for layout in meshes:
                start = time.monotonic()
                result, reason = outcome(cfg, mesh_of(kind, layout), names)
                failed |= result == "FAILED"
                note = f" {reasons.setdefault(reason, len(reasons) + 1)}" if reason else ""
                cells.append("ok" if result == "ok" else f"{result}{note}")
                took = time.monotonic() - start
                print(f"{name}, {kind}, {layout}: {result} {reason} ({took:.1f} s)", file=sys.stderr, flush=True)
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)
    for reason, number in reasons.items():
        print(f"\n{number}. {reason}")
    return failed


def _line(error: Exception) -> str:
    """On one line; of a long message the beginning and the end, where a traceback in it says what happened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:100]} … {text[-200:]}'}"


if __name__ == "__main__":
    sys.exit(main())
