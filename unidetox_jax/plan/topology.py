"""Devices to compile for, by name: slices of TPUs, which need `libtpu` and no TPU, or the devices that are here."""

import importlib.util
import math
import os
from typing import NamedTuple

import jax

from unidetox_jax import devices
from unidetox_jax.errors import UserError

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # chips side by side; the smallest is one host's
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
CORES_PER_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2}  # an accelerator type counts cores


class Topology(NamedTuple):
    """Devices to compile for: `name` as it was asked for, `slice` ("v5e:4x4" or "local")."""

    name: str
    slice: str
    devices: tuple[jax.Device, ...]
    specs: devices.Specs | None  # None: a kind whose figures are not known

    @property
    def chips(self) -> int:
        """How many are billed."""
        return len(self.devices) // (self.specs.per_chip if self.specs else 1)


def accelerator_types() -> dict[str, str]:
    """ "v5e-16" → "v5e:4x4", for every slice."""
    return {
        f"{version}-{math.prod(map(int, shape.split('x'))) * CORES_PER_CHIP.get(version, 1)}": f"{version}:{shape}"
        for version, shapes in SLICES.items()
        for shape in shapes
    }


def topology(name: str) -> Topology:
    """The devices of a slice ("v5e:4x4"), of an accelerator type ("v5e-16") or of this machine ("local").

    Raises:
      UserError: there is no such topology (those that exist are listed), or libtpu is not installed.
    """
    if name == "local":
        return _of(name, name, jax.devices())
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
        description = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except (RuntimeError, ValueError, OSError) as error:
        if not has_libtpu():
            raise UserError("--topology: needs libtpu: pip install 'unidetox-jax[tpu]'") from None
        raise UserError(f"--topology {name!r}: {' '.join(str(error).split())[:200]}") from None
    return _of(name, shape, description.devices)


def has_libtpu() -> bool:
    """Whether a TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _of(name: str, shape: str, members) -> Topology:
    return Topology(name, shape, tuple(members), devices.specs(members[0].device_kind))
