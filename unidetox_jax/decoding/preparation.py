"""Prepares weights for decoding, once for many generations: cast to the compute dtype and split into layers.

On a CPU, the layers' kernels are transposed (`layers.weights_first` says why). There and on a GPU, query, key and value
are one matrix, unless there is an adapter or heads are split over the mesh.
On a GPU, models of one configuration (base and toxic twin) are stacked side by side in one tree and run as one batched
model: half as many kernels of twice the work take four fifths of the time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unidetox_jax import models as models_
from unidetox_jax import sharding
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig, costs
from unidetox_jax.models.layers import PROJECTIONS

GATHER_BYTES = 7 << 30  # weights of all models per device that leave room for caches on the smallest chip (16 GiB)
CPU_ROWS = 32  # above which products take longer than reading the weights, and larger ones leave a CPU's caches
LAYER_LOOP = "unroll"  # 1.2 to 1.4 times as fast as scan, measured on CPU; on a GPU a scan copies each layer's weights


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """How weights are prepared.

    transpose, fuse: see `models.prepare`. gather: all-gather weights sharded over `fsdp` once, as otherwise every
    step sends all of them over the network, far slower than memory. side_by_side: stack all models in one tree.
    """

    configs: tuple[ModelConfig, ...]
    transpose: bool = False
    fuse: bool = False
    gather: bool = False
    side_by_side: bool = False


class Prepared(NamedTuple):
    """Weights for `generate`; every prepared model has them in place of its parameters.

    trees: one per model, or a single one with all models stacked on axis 0. configs: one per model.
    """

    trees: tuple[Any, ...]
    configs: tuple[ModelConfig, ...]

    @property
    def side_by_side(self) -> bool:
        """Whether one tree holds all models, which must then read the same prompts."""
        return len(self.trees) < len(self.configs)


def gather_fits(configs: Sequence[ModelConfig], model_shards: int) -> bool:
    """Whether weights may be gathered over `fsdp`. model_shards: size of the mesh axis `model`."""
    return sum(costs.param_bytes(cfg, model_shards) for cfg in configs) <= GATHER_BYTES


def choose_layout(
    configs: Sequence[ModelConfig], mesh: Mesh | None, layer_loop: str | None = None, side_by_side: bool = True
) -> WeightLayout:
    """The fastest layout on a mesh. side_by_side: allowed, since the models will read the same prompts."""
    platform = sharding.device_of(mesh).platform
    model_shards = 1 if mesh is None else mesh.shape["model"]
    configs = tuple(
        dataclasses.replace(
            cfg,
            layer_loop=layer_loop or LAYER_LOOP,
            decode_kernel=models_.has_decode_kernel(cfg, mesh),
            wide_heads=models_.wide_heads.width(cfg, model_shards) if platform == "tpu" else 1,
        )
        for cfg in configs
    )
    return WeightLayout(
        configs,
        transpose=platform == "cpu",
        fuse=platform in ("cpu", "gpu") and model_shards == 1 and not any(cfg.lora.rank for cfg in configs),
        gather=gather_fits(configs, model_shards),
        side_by_side=side_by_side and platform == "gpu" and len(configs) > 1 and len(set(configs)) == 1,
    )


def prepare(models: Sequence[Model], *, layer_loop: str | None = None, side_by_side: bool = True) -> list[Model]:
    """Models for repeated calls of `generate`: their parameters are replaced by the `Prepared` weights of all of them.

    Arrays that models share (a model with and without an adapter) are prepared once. The original parameters are
    neither changed nor freed.

    Args:
      layer_loop: "unroll" or "scan"; None: the faster one. side_by_side: whether all models will read the same prompts,
        each with its own cache.

    Raises:
      UserError: models on different meshes.
    """
    mesh = mesh_of(models)
    layout = choose_layout([model.cfg for model in models], mesh, layer_loop, side_by_side)
    with mesh_context(mesh):
        if layout.side_by_side:
            trees = _program(layout, mesh)(tuple(model.params for model in models))
        else:
            trees = _prepare_separately([model.params for model in models], layout, mesh)
    prepared = Prepared(trees, layout.configs)
    return [Model(prepared, model.cfg) for model in models]


def can_be_read_as_one(prepared: Prepared, rows: int, mesh: Mesh | None) -> bool:
    """Whether several models are one (one model under several prompts) and are faster read once, with all their rows.

    rows: of each model.
    """
    ids = [[id(leaf) for leaf in jax.tree.leaves(tree)] for tree in prepared.trees]
    same = len(ids) > 1 and all(other == ids[0] for other in ids) and len(set(prepared.configs)) == 1
    return same and (sharding.device_of(mesh).platform != "cpu" or rows * len(ids) <= CPU_ROWS)


def _prepare_separately(all_params: Sequence[Any], layout: WeightLayout, mesh: Mesh | None) -> tuple[Any, ...]:
    """One tree per model; arrays that an earlier model has too are taken from that model's tree."""
    trees: list[Any] = []
    for index, (params, cfg) in enumerate(zip(all_params, layout.configs, strict=True)):
        earlier_ids = [{id(leaf) for leaf in jax.tree.leaves(earlier)} for earlier in all_params[:index]]
        ids = {id(leaf) for leaf in jax.tree.leaves(params)}
        nearest = max(range(index), key=lambda earlier: len(ids & earlier_ids[earlier]), default=None)
        shared = set() if nearest is None else ids & earlier_ids[nearest]
        if layout.fuse and shared:
            shared -= _fused_with_others(params, shared)
        unshared = jax.tree.map(lambda leaf, shared=shared: None if id(leaf) in shared else leaf, params)
        (tree,) = _program(dataclasses.replace(layout, configs=(cfg,)), mesh)((unshared,))
        trees.append(_fill_missing(tree, trees[nearest]) if shared and nearest is not None else tree)
    return tuple(trees)


def _fused_with_others(params: Any, shared: set[int]) -> set[int]:
    """Ids of projections that become one matrix with others that are not shared."""
    blocks, found = params["blocks"], set()
    for block in blocks if isinstance(blocks, tuple) else (blocks,):
        groups = zip(*(jax.tree.leaves(block["attention"][name]) for name in PROJECTIONS), strict=True)
        found |= {id(leaf) for group in groups if not shared.issuperset(map(id, group)) for leaf in group}
    return found


def _fill_missing(tree: Any, earlier: Any) -> Any:
    """The tree with its missing leaves (None) taken from an earlier one."""
    if tree is None:
        return earlier
    if isinstance(tree, tuple):
        return tuple(_fill_missing(*pair) for pair in zip(tree, earlier, strict=False))  # an early exit has fewer
    if isinstance(tree, dict):
        return {name: _fill_missing(child, earlier.get(name)) for name, child in tree.items()}
    return tree


def abstract(layout: WeightLayout, mesh: Mesh) -> tuple[Any, ...]:
    """The trees of a `Prepared`, as ShapeDtypeStructs with shardings."""
    params = tuple(models_.abstract_params(cfg) for cfg in layout.configs)
    shapes = jax.eval_shape(functools.partial(_prepare, layout=layout), params)
    shardings = sharding.param_shardings(shapes, mesh, gather=layout.gather)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def mesh_of(models: Sequence[Model]) -> Mesh | None:
    """The mesh of all models; None for models on a single device. Raises UserError if meshes differ."""
    meshes = {mesh for model in models if (mesh := sharding.mesh_of(model.params)) is not None}
    if len(meshes) > 1:
        raise UserError("models: they are on different meshes; load all of them with the same one")
    return meshes.pop() if meshes else None


def mesh_context(mesh: Mesh | None):
    """Context manager that runs programs on the mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.lru_cache(maxsize=16)
def _program(layout: WeightLayout, mesh: Mesh | None):
    prepare = functools.partial(_prepare, layout=layout)
    if mesh is None:
        return jax.jit(prepare)

    def sharded(params):
        shardings = sharding.param_shardings(jax.eval_shape(prepare, params), mesh, layout.gather, partial=True)
        return jax.tree.map(jax.lax.with_sharding_constraint, prepare(params), shardings)

    return jax.jit(sharded)


def _prepare(params: tuple[Any, ...], layout: WeightLayout) -> tuple[Any, ...]:
    trees = tuple(
        models_.prepare(tree, cfg, layout.transpose, layout.fuse)
        for tree, cfg in zip(params, layout.configs, strict=True)
    )
    return (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),) if layout.side_by_side else trees
