"""Devices to compile for, by name: TPU slices (need `libtpu` but no TPU), NVIDIA GPUs (need JAX's CUDA plugin but no
GPU), or the devices of this machine."""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from unidetox_jax import devices
from unidetox_jax.errors import UserError

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # arrangements of chips; the smallest is one host
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
CORES_PER_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2}  # an accelerator type counts cores


class Gpu(NamedTuple):
    """What XLA's compiler needs to know of a GPU beside `devices.SPECS`: compute capability, multiprocessors, their
    float32 units, their shared memory and the share of one block, L2 cache, clock (GHz), memory as the driver reports
    it. Sizes in bytes."""

    kind: str
    capability: int
    cores: int
    units: int
    shared_memory: int
    block_memory: int
    cache: int
    clock: float
    memory: int


# From openxla/xla, xla/backends/gpu/target_config/specs
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 8, 108, 64, 167936, 166912, 41943040, 1.41, 42331013120),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41, 85100068864),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448, 52428800, 1.98, 84942979072),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 233472, 232448, 52428800, 1.98, 151397597184),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233472, 232448, 132644864, 1.965, 191514411008),
}
_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  cuda_compute_capability {{ major: {0.capability} }}
  core_count: {0.cores} fpus_per_core: {0.units} clock_rate_ghz: {0.clock} l2_cache_size: {0.cache}
  shared_memory_per_core: {0.shared_memory} shared_memory_per_block_optin: {0.block_memory}
  device_memory_size: {0.memory} memory_bandwidth: {1:.0f}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{0.kind}"
"""
GPUS_PER_HOST = 8
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class Topology(NamedTuple):
    """Devices to compile for. name: as requested; slice: "v5e:4x4", "h100:1x8" or "local"."""

    name: str
    slice: str
    devices: tuple[jax.Device, ...]
    specs: devices.Specs | None  # None: an unknown kind of device
    memory: float  # bytes of a device; infinite if unknown

    @property
    def chips(self) -> int:
        """The number of chips, which are what is billed."""
        return len(self.devices) // (self.specs.per_chip if self.specs else 1)


def larger_topologies(topology: Topology) -> Iterator[str]:
    """Names of the topologies with more devices of the same kind, smallest first."""
    kind, _, shape = topology.slice.partition(":")
    if kind in GPUS:
        hosts, _, gpus = shape.partition("x")
        yield from (f"{kind}-{count}" for count in (2, 4, GPUS_PER_HOST) if hosts == "1" and count > int(gpus))
        yield from (f"{kind}-{count}x{GPUS_PER_HOST}" for count in (2, 4, 8) if count > int(hosts))
    elif kind in SLICES:
        names = {slice: name for name, slice in accelerator_types().items()}
        larger_shapes = SLICES[kind][SLICES[kind].index(shape) + 1 :]
        yield from (names[f"{kind}:{shape}"] for shape in larger_shapes)


def accelerator_types() -> dict[str, str]:
    """ "v5e-16" → "v5e:4x4", for every slice."""
    return {
        f"{version}-{math.prod(map(int, shape.split('x'))) * CORES_PER_CHIP.get(version, 1)}": f"{version}:{shape}"
        for version, shapes in SLICES.items()
        for shape in shapes
    }


def get_topology(name: str) -> Topology:
    """The devices of a slice ("v5e:4x4"), an accelerator type ("v5e-16"), one host with GPUs ("h100-8"), several hosts
    ("h100-2x8") or this machine ("local").

    Raises:
      UserError: no such topology (lists the existing ones), or its compiler is not installed.
    """
    if name == "local":
        return _make_topology(name, name, jax.devices())
    if gpus := re.fullmatch(rf"({'|'.join(GPUS)})[-:](?:([1-9]\d*)x)?([1-9]\d*)", name):
        return _gpu_topology(name, gpus[1], int(gpus[2] or 1), int(gpus[3]))
    types = accelerator_types()
    shape = types.get(name.replace("v5litepod", "v5e"), name)
    if shape not in types.values():
        known = "; ".join(f"{short} = {full}" for short, full in types.items())
        known += "; or GPUs: " + ", ".join(f"{kind}-8" for kind in GPUS) + " or any other number, h100-2x8 on two hosts"
        raise UserError(f"--topology: no {name!r}; expected local, or one of {known}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server: this is not a TPU machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is acquired
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if shape.startswith("v4:") else {}  # both cores as one device
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except (RuntimeError, ValueError, OSError) as error:
        if not has_libtpu():
            raise UserError("--topology: needs libtpu: pip install 'unidetox-jax[tpu]'") from None
        raise UserError(f"--topology {name!r}: {' '.join(str(error).split())[:200]}") from None
    return _make_topology(name, shape, description.devices)


def _gpu_topology(name: str, kind: str, hosts: int, gpus_per_host: int) -> Topology:
    if not has_cuda_plugin():
        raise UserError("--topology: needs JAX's compiler for GPUs: pip install 'unidetox-jax[plan-gpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # libraries that compilation does not need
    gpu, shape = GPUS[kind], f"{hosts}x1x{gpus_per_host}"  # hosts x processes per host x devices per process
    config = _DESCRIPTION.format(gpu, devices.SPECS[gpu.kind].bandwidth)
    try:
        description = topologies.get_topology_desc(kind, platform="cuda", topology=shape, target_config=config)
    except (NotImplementedError, RuntimeError) as error:  # the plugin did not load; jax has logged why
        raise UserError(f"--topology {name!r}: {' '.join(str(error).split())[:200]}") from None
    return _make_topology(name, f"{kind}:{hosts}x{gpus_per_host}", description.devices)


def has_cuda_plugin() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs is installed."""
    return any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _make_topology(name: str, shape: str, members) -> Topology:
    specs = devices.specs(members[0].device_kind)
    stats = {} if specs or name != "local" else jax.local_devices()[0].memory_stats() or {}  # local devices only
    memory = specs.memory if specs else stats.get("bytes_limit", math.inf)
    return Topology(name, shape, tuple(members), specs, memory)
