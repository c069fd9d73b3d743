"""Meshes from strings, and shardings by path rules.

Three axes: `data` replicates the model and splits the batch, `fsdp` splits matrices and the batch, `model` splits
heads, feed-forward and vocabulary. A dimension that an axis does not divide is not split over it. Meshes are in Auto
mode: the compiler places what the rules leave open.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unidetox_jax.errors import UserError, suggest

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")

Axis = str | tuple[str, ...] | None

# A pattern of a leaf's path -> the mesh axes of its last dimensions; dimensions in front (layers) are not split.
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"positions/embedding$", (None, "fsdp")),
    (r"(tokens|head)/embedding$", ("model", "fsdp")),
    (r"(query|key|value)/kernel$", ("fsdp", "model", None)),
    (r"(query|key|value)/bias$", ("model", None)),
    (r"attention/output/kernel$", ("model", None, "fsdp")),
    (r"(up|gate)/kernel$", ("fsdp", "model")),
    (r"(up|gate)/bias$", ("model",)),
    (r"down/kernel$", ("model", "fsdp")),
    (r"project_(in|out)/kernel$", (None, "fsdp")),
    (r"(query|key|value)/transposed_kernel$", ("model", None, "fsdp")),  # for decoding; of query_key_value as well
    (r"attention/output/transposed_kernel$", ("fsdp", "model", None)),
    (r"(up|gate)/transposed_kernel$", ("model", "fsdp")),
    (r"down/transposed_kernel$", ("fsdp", "model")),
    (r"(query|key|value|up|gate)/lora_a$", ("fsdp", None)),  # a low-rank adapter attached to the kernels …
    (r"(query|key|value)/lora_b$", (None, "model", None)),
    (r"(up|gate)/lora_b$", (None, "model")),
    (r"attention/output/lora_a$", ("model", None, None)),
    (r"down/lora_a$", ("model", None)),
    (r"(output|down)/lora_b$", (None, "fsdp")),
    (r"/A$", (None, ("fsdp", "model"))),  # … and as it is trained: [rank, in], [out, rank]
    (r"/B$", (("fsdp", "model"), None)),
    (r"(scale|bias)$", ()),
)


def make_mesh(layout: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from "data:1,fsdp:-1,model:4"; one axis may be -1 (all remaining devices), absent axes are 1.

    Raises:
      UserError: an unknown axis, an invalid size, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, layout.replace(" ", "").split(",")):
        axis, _, size = part.partition(":")
        if axis not in AXES:
            raise UserError(f"mesh {layout!r}: no axis {axis!r}{suggest(axis, AXES)}")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"mesh {layout!r}: {axis} has size {size!r}, expected a positive number or -1")
        sizes[axis] = int(size)
    inferred = [axis for axis, size in sizes.items() if size == -1]
    if len(inferred) > 1:
        raise UserError(f"mesh {layout!r}: only one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if inferred and len(devices) % fixed == 0:
        sizes[inferred[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh {layout!r} needs a multiple of {fixed} devices, found {len(devices)}")
    shape = tuple(sizes[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if len(devices) == 1 or devices[0].platform == "cpu":  # no interconnect to optimise for
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)


def single_device_mesh() -> Mesh:
    """A mesh of the first local device."""
    return make_mesh("", [jax.local_devices()[0]])


def device_of(mesh: Mesh | None = None) -> Any:
    """The kind of device that the mesh's programs run on, with `platform` ("cpu", "gpu", "tpu") and `device_kind`.

    None: the mesh of `jax.set_mesh`, also within a trace; without one, the first device.
    """
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    return abstract.abstract_device or jax.devices()[0]


def path_string(path: tuple[Any, ...]) -> str:
    """A pytree path as a/b/c."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def param_shardings(tree: Any, mesh: Mesh, gather: bool = False, partial: bool = False) -> Any:
    """The tree's NamedShardings by `RULES`, for parameters and optimizer states that mirror them.

    tree: arrays or ShapeDtypeStructs. Dimensions that an axis does not divide are logged, once per shape.
    gather: do not split over `fsdp`, for a loop that would gather the parameters in every iteration.
    partial: the tree may lack parameters of its model, and with them all that an axis splits.

    Raises:
      UserError: an axis larger than 1 (fsdp, model) that splits nothing in the tree.
    """
    used: set[str] = set()

    def place(path, leaf):
        spec = _spec(path_string(path), leaf.shape, mesh)
        if gather:
            spec = PartitionSpec(*("model" if "model" in _names(axis) else None for axis in spec))
        used.update(name for axis in spec for name in _names(axis))
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    for axis in ("model",) if gather else ("fsdp", "model"):
        if mesh.shape[axis] > 1 and axis not in used and not partial:
            raise UserError(f"mesh: nothing of this model can be split {mesh.shape[axis]} ways over {axis!r}")
    return shardings


def num_shards(path: str, shape: Sequence[int], axis_sizes: Mapping[str, int]) -> int:
    """Into how many shards mesh axes of these sizes split an array by `RULES`."""
    shards = [math.prod(axis_sizes.get(name, 1) for name in _names(axis)) for axis in _axes(path, len(shape))]
    return math.prod(count for count, size in zip(shards, shape, strict=True) if size % count == 0)


def _names(axis: Axis) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,) if axis else ()


def _axes(path: str, ndim: int) -> tuple[Axis, ...]:
    """The mesh axis of each dimension, by `RULES`."""
    axes = next((axes for rule, axes in RULES if re.search(rule, path)), ())
    axes = axes[-ndim:] if ndim < len(axes) else axes
    return (None,) * (ndim - len(axes)) + tuple(axes)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec: list[Axis] = []
    for axis, size in zip(_axes(path, len(shape)), shape, strict=True):
        names = tuple(name for name in _names(axis) if mesh.shape[name] > 1)
        shards = math.prod(mesh.shape[name] for name in names)
        if size % shards:
            _log_whole(re.sub(r"\d+/", "", path), size, " and ".join(names), shards)
            names = ()
        spec.append(names if len(names) > 1 else names[0] if names else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


@functools.cache
def _log_whole(path: str, size: int, axis: str, count: int) -> None:
    logging.info("sharding: %s keeps its %d whole: %s has %d devices", path, size, axis, count)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def put(tree: Any, placement: NamedSharding) -> Any:
    """Host arrays, complete in every process, as global ones: each device receives only its shard."""

    def place(x):
        return jax.make_array_from_callback(np.shape(x), placement, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, tree)


def batch_shards(mesh: Mesh | None) -> int:
    """How many shards a batch is split into; its rows must be a multiple."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of a tree's arrays; None if they have none."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Shards x's dimensions over axes of the mesh of `jax.set_mesh`; without one, x itself.

    Axes that do not divide their dimension are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return x
    if any(mesh.axis_types[mesh.axis_names.index(axis)] != AxisType.Auto for axis in AXES):
        return x  # inside shard_map, where arrays are shards already

    def fits(axis, size):
        return axis if size % math.prod(mesh.shape[name] for name in _names(axis)) == 0 else None

    spec = PartitionSpec(*(fits(axis, size) for axis, size in zip(axes, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_batch(x: jax.Array, *axes: str | None) -> jax.Array:
    """`constrain` with the first dimension over the batch axes."""
    return constrain(x, BATCH, *axes)
