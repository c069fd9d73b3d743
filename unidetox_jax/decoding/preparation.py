"""What a decoding loop reads: models' weights in the compute dtype, cut into layers, made once for many generations.

On a GPU, models of one configuration (base and toxic twin) stand side by side in one tree and run as one batched model:
half as many kernels, each with twice the work, take four fifths of the time.
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

GATHER_BYTES = 7 << 30  # a device's weights of all models that fit beside their caches on the smallest chip (16 GiB)


@dataclasses.dataclass(frozen=True)
class Form:
    """How weights are prepared.

    transpose_head, fuse: see `models.prepare`. gather: weights that are cut over `fsdp` are made whole; else the
    network carries all of them in every step, many times what the memory takes. side_by_side: all models in one tree.
    """

    configs: tuple[ModelConfig, ...]
    transpose_head: bool = False
    fuse: bool = False
    gather: bool = False
    side_by_side: bool = False


class Prepared(NamedTuple):
    """Weights for `generate`, in place of the parameters of every model that they were made of.

    trees: one for each model, or a single one whose leaves hold all models on axis 0. configs: of each model.
    """

    trees: tuple[Any, ...]
    configs: tuple[ModelConfig, ...]

    @property
    def side_by_side(self) -> bool:
        """Whether one tree holds all models, which then read the same prompts."""
        return len(self.trees) < len(self.configs)


def default_layer_loop() -> str:
    """The faster loop over layers in a decoding step: unrolled, measured 1.8 times as fast as scanned on CPU; on a GPU
    a scan copies every layer's weights before it reads them."""
    return "unroll"


def gathers(configs: Sequence[ModelConfig], ways: int) -> bool:
    """Whether weights are made whole over `fsdp`. ways: of the mesh's axis `model`."""
    return sum(costs.param_bytes(cfg, ways) for cfg in configs) <= GATHER_BYTES


def form(
    configs: Sequence[ModelConfig], mesh: Mesh | None, layer_loop: str | None = None, side_by_side: bool = True
) -> Form:
    """What is fastest on a mesh. side_by_side: whether the models may be, as those can that read the same prompts."""
    platform = sharding.device_of(mesh).platform
    ways = 1 if mesh is None else mesh.shape["model"]
    chosen = tuple(
        dataclasses.replace(
            cfg,
            layer_loop=layer_loop or default_layer_loop(),
            decode_kernel=models_.has_decode_kernel(cfg, mesh),
            wide_heads=models_.wide_heads.width(cfg, ways) if platform == "tpu" else 1,
        )
        for cfg in configs
    )
    return Form(
        chosen,
        transpose_head=platform == "cpu",
        fuse=platform == "gpu" and ways == 1 and not any(cfg.lora.rank for cfg in chosen),
        gather=gathers(chosen, ways),
        side_by_side=side_by_side and platform == "gpu" and len(chosen) > 1 and len(set(chosen)) == 1,
    )


def prepare(models: Sequence[Model], *, layer_loop: str | None = None, side_by_side: bool = True) -> list[Model]:
    """The same models, as many calls of `generate` want them: each has the `Prepared` of all as its parameters.

    What models have in common (a model, and the same with an adapter) is prepared once. The given ones stay as they
    are, and take their memory as long as somebody holds them.

    Args:
      layer_loop: "unroll" or "scan"; None: the faster one. side_by_side: whether all will read the same prompts, each
        with a cache of its own.

    Raises:
      UserError: models on different meshes.
    """
    mesh = mesh_of(models)
    chosen = form([model.cfg for model in models], mesh, layer_loop, side_by_side)
    with use(mesh):
        if chosen.side_by_side:
            trees = _program(chosen, mesh)(tuple(model.params for model in models))
        else:
            trees = _one_by_one([model.params for model in models], chosen, mesh)
    prepared = Prepared(trees, chosen.configs)
    return [Model(prepared, model.cfg) for model in models]


def _one_by_one(given: Sequence[Any], form: Form, mesh: Mesh | None) -> tuple[Any, ...]:
    """Each model's tree, in which an array that an earlier model has as well is that model's."""
    made: list[Any] = []
    for index, (params, cfg) in enumerate(zip(given, form.configs, strict=True)):
        ids = [{id(leaf) for leaf in jax.tree.leaves(earlier)} for earlier in given[:index]]
        mine = {id(leaf) for leaf in jax.tree.leaves(params)}
        first = max(range(index), key=lambda earlier: len(mine & ids[earlier]), default=None)
        shared = set() if first is None else mine & ids[first]
        own = jax.tree.map(lambda leaf, shared=shared: None if id(leaf) in shared else leaf, params)
        head = form.transpose_head and models_.head(own, cfg) is not None
        (tree,) = _program(dataclasses.replace(form, configs=(cfg,), transpose_head=head), mesh)((own,))
        made.append(_filled(tree, made[first]) if shared and first is not None else tree)
    return tuple(made)


def _filled(tree: Any, earlier: Any) -> Any:
    """The tree with what it lacks (None, or the transposed head) from an earlier one."""
    if tree is None:
        return earlier
    if isinstance(tree, tuple):
        return tuple(_filled(*parts) for parts in zip(tree, earlier, strict=False))  # of an early exit, fewer layers
    if isinstance(tree, dict):
        lacking = {"head": earlier["head"]} if "head" in earlier and "blocks" in tree and "head" not in tree else {}
        return {name: _filled(part, earlier.get(name)) for name, part in tree.items()} | lacking
    return tree


def abstract(form: Form, mesh: Mesh) -> tuple[Any, ...]:
    """The trees of a `Prepared`, as ShapeDtypeStructs with shardings."""
    given = tuple(models_.abstract_params(cfg) for cfg in form.configs)
    shapes = jax.eval_shape(functools.partial(_prepare, form=form), given)
    shardings = sharding.param_shardings(shapes, mesh, gather=form.gather)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def mesh_of(models: Sequence[Model]) -> Mesh | None:
    """The mesh that all models lie on; None where they have none. Raises UserError where they differ."""
    meshes = {mesh for model in models if (mesh := sharding.mesh_of(model.params)) is not None}
    if len(meshes) > 1:
        raise UserError("models: they lie on different meshes; load all of them with the same one")
    return meshes.pop() if meshes else None


def use(mesh: Mesh | None):
    """Context: programs run on that mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.lru_cache(maxsize=16)
def _program(form: Form, mesh: Mesh | None):
    make = functools.partial(_prepare, form=form)
    if mesh is None:
        return jax.jit(make)

    def placed(params):
        shardings = sharding.param_shardings(jax.eval_shape(make, params), mesh, gather=form.gather)
        return jax.tree.map(jax.lax.with_sharding_constraint, make(params), shardings)

    return jax.jit(placed)


def _prepare(params: tuple[Any, ...], form: Form) -> tuple[Any, ...]:
    trees = tuple(
        models_.prepare(tree, cfg, form.transpose_head, form.fuse)
        for tree, cfg in zip(params, form.configs, strict=True)
    )
    return (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),) if form.side_by_side else trees
