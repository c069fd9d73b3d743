"""Programs compiled ahead of time for accelerators that are not here, and what the compiler says about them.

A TPU's compiler (`libtpu`) runs on any machine: it gives a program's memory to the byte and its collectives to the
letter. What surprises: the compiler counts a loop's body once, however often it runs, so FLOPs and bytes come from the
model's shapes, not from the compiler.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig

GIB = 1 << 30
TRAINING_UTILISATION = 0.40  # of peak FLOPs: what well-tuned training reaches
DECODING_UTILISATION = 0.60  # of memory bandwidth: this project's own target


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it: bytes of memory, bfloat16 FLOP/s, bytes/s of its memory and of its links to the other
    devices (all together, both directions); devices to a chip that is billed."""

    memory: int
    flops: float
    bandwidth: float
    network: float
    per_chip: int = 1


# The makers' published figures; tpu7x has two devices a chip
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 448e9),
    "TPU7x": Chip(96 * GIB, 1153e12, 3690e9, 600e9, per_chip=2),
    "NVIDIA A100-SXM4-80GB": Chip(80 * 10**9, 312e12, 2039e9, 600e9),
    "NVIDIA H100 80GB HBM3": Chip(80 * 10**9, 989e12, 3350e9, 900e9),
}
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # chips side by side; the smallest is one host's
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
PER_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2}  # cores, which the accelerator type counts


class Topology(NamedTuple):
    """Devices to compile for: `name` as it was asked for, `slice` ("v5e:4x4" or "local")."""

    name: str
    slice: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None  # None: a kind whose figures are not known

    @property
    def chips(self) -> int:
        """How many are billed."""
        return len(self.devices) // (self.chip.per_chip if self.chip else 1)


class Program(NamedTuple):
    """What a stage runs on the devices.

    lower: mesh → jax's Lowered. flops, and bytes (mesh → bytes read and written): of one step, all devices together.
    steps: how often it runs.
    utilisation: the share of the tightest bound that is assumed. abstract: mesh → the arguments that stay on the
    devices, as ShapeDtypeStructs. rounds: how often a step runs what stands at each depth of loops. leaner: (flag,
    program) that needs less memory and more time.
    """

    name: str
    lower: Callable[[Mesh], Any]
    flops: float
    bytes: Callable[[Mesh], float]
    steps: int
    utilisation: float
    abstract: Callable[[Mesh], Any]
    rounds: tuple[float, ...]
    leaner: "tuple[str, Program] | None" = None


class Collectives(NamedTuple):
    """One kind of collective at one depth of loops: how many, bytes that each device receives, the largest result."""

    kind: str
    depth: int
    count: int
    bytes: int
    largest: str


class Report(NamedTuple):
    """What the compiler says, bytes per device. `refusal`: why it does not fit, else empty."""

    arguments: int
    temporaries: int
    peak: int
    collectives: tuple[Collectives, ...]
    refusal: str = ""


def accelerator_types() -> dict[str, str]:
    """ "v5e-16" → "v5e:4x4", for every slice."""
    return {
        f"{generation}-{int(np.prod(_sizes(shape))) * PER_CHIP.get(generation, 1)}": f"{generation}:{shape}"
        for generation, shapes in SLICES.items()
        for shape in shapes
    }


def topology(name: str) -> Topology:
    """The devices of a slice ("v5e:4x4"), of an accelerator type ("v5e-16") or of this machine ("local").

    Raises:
      UserError: there is no such topology (those that exist are listed), or libtpu is not installed.
    """
    if name == "local":
        devices = tuple(jax.devices())
        return Topology(name, name, devices, CHIPS.get(devices[0].device_kind))
    types = accelerator_types()
    shape = types.get(name.replace("v5litepod", "v5e"), name)
    if shape not in types.values():
        known = "; ".join(f"{short} = {full}" for short, full in types.items())
        raise UserError(f"--topology: no {name!r}; expected local, or one of {known}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask: this is no TPU machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is taken
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if shape.startswith("v4:") else {}  # both cores as one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except (RuntimeError, ValueError, OSError) as error:
        if not has_libtpu():
            raise UserError("--topology: needs libtpu: pip install 'unidetox-jax[tpu]'") from None
        raise UserError(f"--topology {name!r}: {' '.join(str(error).split())[:200]}") from None
    devices = tuple(found.devices)
    return Topology(name, shape, devices, CHIPS.get(devices[0].device_kind))


def has_libtpu() -> bool:
    """Whether a TPU's compiler is installed."""
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def compile_program(program: Program, mesh: Mesh, chip: Chip | None) -> Report:
    """Lowers and compiles a program for the mesh; what its resident arguments exceed is not compiled at all."""
    resident = bytes_per_device(program.abstract(mesh))
    if chip is not None and resident > chip.memory:
        return Report(resident, 0, resident, (), f"its state alone takes {resident / GIB:.1f} GiB a device")
    lowered = program.lower(mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _needed(str(error))
        if used is None:
            raise
        return Report(resident, used - resident, used, (), f"needs {used / GIB:.1f} GiB a device")
    memory = compiled.memory_analysis()
    peak = max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes) + memory.generated_code_size_in_bytes
    refusal = ""
    if chip is not None and peak > chip.memory:
        refusal = f"needs {peak / GIB:.1f} of {chip.memory / GIB:.0f} GiB"
    found = collectives(compiled.as_text())
    return Report(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, found, refusal)


def _needed(message: str) -> int | None:
    """Bytes that a program needs, by the compiler's complaint that there are fewer."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|required for HLO \w+ \(([\d.]+)([KMGT]?)\) exceeds", message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def bytes_per_device(abstract: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )


def network_bytes(program: Program, report: Report) -> float:
    """Bytes that a device receives in a step: every collective's result, as often as it runs."""
    return sum(found.bytes * program.rounds[min(found.depth, len(program.rounds) - 1)] for found in report.collectives)


def step_seconds(program: Program, report: Report, mesh: Mesh, topology: Topology) -> tuple[float, str] | None:
    """(seconds, which bound) of a step at the program's utilisation of the tightest bound; None: unknown devices."""
    chip, count = topology.chip, len(topology.devices)
    if chip is None:
        return None
    bounds = {
        "FLOPs": program.flops / (count * chip.flops),
        "memory": program.bytes(mesh) / (count * chip.bandwidth),
        "network": network_bytes(program, report) / chip.network,
    }
    bound = max(bounds, key=bounds.get)
    return bounds[bound] / program.utilisation, bound


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(
    r" = (\(?[a-z0-9]+\[.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|called_computations|branch_computations)=(%[\w.\-]+|\{[%\w.\-, ]+\})"
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(hlo: str) -> tuple[Collectives, ...]:
    """The collectives of a compiled program's text, by depth of loops: 0 once a call, 1 in every round of a loop, 2 in
    a loop within (a decoding step's scan over layers)."""
    found: dict[str, list[tuple[str, str, str]]] = {}  # computation → (kind, shape, channel or its own line)
    edges: dict[str, list[tuple[str, bool]]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            entry = name if line.startswith("ENTRY") else entry
            found[name], edges[name] = [], []
            continue
        if match := _COLLECTIVE.search(line):
            channel = re.search(r"channel_id=\d+", line)
            found[name].append((match[2], match[1], channel[0] if channel else line))
        for how, called in _CALLED.findall(line):
            for other in re.findall(r"[\w.\-]+", called):
                edges.setdefault(name, []).append((other, how in ("body", "condition")))
    place = {entry: (0, entry)}  # computation → depth, and the loop's body (or the whole program) that it is part of
    queue = [entry]
    while queue:
        current = queue.pop()
        depth, body = place[current]
        for other, loop in edges.get(current, ()):
            if other in edges and depth + loop > place.get(other, (-1, ""))[0]:
                place[other] = depth + loop, other if loop else body
                queue.append(other)
    groups: dict[tuple[int, str], list[tuple[int, str]]] = {}
    seen = set()
    for computation, kinds in found.items():
        depth, body = place.get(computation, (0, entry))
        for kind, shape, channel in kinds:
            # A TPU's asynchronous collective stands in several fusions of a loop, under one channel: it runs once.
            if (body, channel) not in seen:
                groups.setdefault((depth, kind), []).append(_size(shape))
            seen.add((body, channel))
    return tuple(
        Collectives(kind, level, len(sizes), sum(size for size, _ in sizes), max(sizes)[1])
        for (level, kind), sizes in sorted(groups.items())
    )


def _size(shape: str) -> tuple[int, str]:
    """(bytes, text) of the largest array of a result's shape: an asynchronous one is a tuple of input and output."""
    sizes = []
    for dtype, dims in _ARRAY.findall(shape):
        bits = int(re.sub(r"\D", "", dtype.replace("e4m3", "").replace("e5m2", "")) or 8)
        count = int(np.prod([int(size) for size in dims.split(",") if size] or [1]))
        sizes.append((count * bits // 8, f"{dtype}[{dims}]"))
    return max(sizes)


def training_flops(cfg: ModelConfig, rows: int, length: int, remat: str) -> float:
    """FLOPs of an optimizer step: three passes over the matrices, four where all is computed again."""
    passes = 4 if remat == "full" else 3
    return passes * rows * length * (2 * _matmul_params(cfg) + _attention_flops(cfg, length / 2))


def decoding_flops(cfg: ModelConfig, rows: int, length: int) -> float:
    """FLOPs of one token in each row, half of `length` tokens being in the cache on average."""
    return rows * (2 * _matmul_params(cfg) + _attention_flops(cfg, length / 2))


def scoring_flops(cfg: ModelConfig, rows: int, length: int, scored: int) -> float:
    """FLOPs of one forward pass, the head at `scored` positions of a row only."""
    vocabulary = cfg.vocab_size * cfg.embedding_size
    body = length * (2 * (_matmul_params(cfg) - vocabulary) + _attention_flops(cfg, length / 2))
    return rows * (body + 2 * scored * vocabulary)


def optimizer_bytes(cfg: ModelConfig) -> float:
    """Bytes of an optimizer step: weights, gradients and both moments in float32, each read and written."""
    return 4 * 2 * 4 * models.num_params(cfg)


def weight_bytes(cfg: ModelConfig, mesh: Mesh) -> float:
    """Bytes of weights that all devices together read in a forward pass, in the compute dtype: only `model` divides
    that work, whatever is cut over `fsdp` is whole when it is used."""
    return sharding.batch_shards(mesh) * np.dtype(cfg.dtype).itemsize * _matmul_params(cfg)


def cache_bytes(cfg: ModelConfig, rows: int, length: int) -> float:
    """Bytes of keys and values of `length` tokens a row."""
    return rows * np.dtype(cfg.dtype).itemsize * cfg.num_layers * 2 * cfg.num_kv_heads * cfg.head_size * length


def _matmul_params(cfg: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all but tables of positions, and an embedding that is no head."""
    tables = cfg.max_position_embeddings * cfg.hidden_size if cfg.position_table else 0
    if not cfg.tie_word_embeddings:
        tables += cfg.vocab_size * cfg.embedding_size
    return models.num_params(cfg) - tables


def _attention_flops(cfg: ModelConfig, keys: float) -> float:
    """Of one token over that many keys, all layers: queries times keys, weights times values."""
    return 4 * cfg.num_layers * cfg.num_heads * cfg.head_size * keys


def describe_shardings(abstract: Any, limit: int = 12) -> list[str]:
    """The largest leaves of a tree, one a line: path, shape, how it is cut, a device's bytes."""
    lines = []
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    for path, leaf in sorted(leaves, key=lambda item: -item[1].size)[:limit]:
        size = bytes_per_device(leaf)
        spec = ", ".join(str(axis) for axis in leaf.sharding.spec) or "whole on every device"
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{sharding.path_string(path):<44} {shape:<22} ({spec})  {size / GIB:.3f} GiB")
    return lines


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split("x")]
