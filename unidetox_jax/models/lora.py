"""Low-rank adapters (Hu et al. 2022), kept as PEFT keeps them and computed beside any family's kernels.

An adapter is {module: {"A": [L, rank, in], "B": [L, out, rank]}}, float32, by the modules' names in transformers with
{layer} in them, so that a fused projection has one A and training takes PEFT's steps. `attach` lays it out as the
leaves `lora_a` and `lora_b` beside each kernel that it belongs to; all that takes a model's parameters takes such a
tree, with `cfg.lora` saying what the leaves mean. Outside the blocks (OPT-350m's projections) there is no axis L.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.parameters import Model, abstract_params
from unidetox_jax.models.registry import key_table, stored_in_out
from unidetox_jax.models.weight_map import Key
from unidetox_jax.recipe import Recipe

Adapter = dict[str, dict[str, Any]]
WEIGHT = ".weight"
LEAVES = ("lora_a", "lora_b")


def modules(cfg: ModelConfig) -> dict[str, Key]:
    """The linear layers that `cfg.lora` adapts: name in transformers → its row of the key table.

    Raises:
      UserError: a target that is the end of no linear layer's name.
    """
    every = linear_layers(cfg)
    if not cfg.lora.targets:
        return {name: key for name, key in every.items() if is_stacked(name)}
    for target in cfg.lora.targets:
        if not any(ends_with(name, target) for name in every):
            known = {name.rpartition(".")[2] for name in every}
            raise UserError(f"lora.targets: no linear layer {target!r}{suggest(target, known)}")
    return {name: key for name, key in every.items() if any(ends_with(name, target) for target in cfg.lora.targets)}


def linear_layers(cfg: ModelConfig) -> dict[str, Key]:
    """Every linear layer that an adapter may be for: name in transformers → its row of the key table."""
    return {
        key.hf.removesuffix(WEIGHT): key
        for key in key_table(cfg)
        if key.hf.endswith(WEIGHT) and all(path.endswith("/kernel") for path in key.ours)
    }


def is_stacked(name: str) -> bool:
    """Whether a module stands once a layer."""
    return "{layer}" in name


def short_name(name: str) -> str:
    """A module's name within its layer."""
    return name.rpartition("{layer}.")[2]


def ends_with(name: str, target: str) -> bool:
    """Whether PEFT takes a module for one of the target's."""
    return name == target or name.endswith(f".{target}")


def abstract(cfg: ModelConfig) -> Adapter:
    """The adapter's shapes and dtypes, without any memory.

    Raises:
      UserError: an unknown target, or a rank that is not within 1 and the smaller side of a matrix.
    """
    by_path = _by_path(abstract_params(cfg))
    rank, adapter = cfg.lora.rank, {}
    for name, key in modules(cfg).items():
        layers = (cfg.num_layers,) if is_stacked(name) else ()
        shapes = [by_path[path].shape[len(layers) :] for path in key.ours]
        inputs = 2 if _reads_heads(key) else 1
        wide = math.prod(shapes[0][:inputs]), sum(math.prod(shape[inputs:]) for shape in shapes)
        if not 1 <= rank <= min(wide):
            raise UserError(
                f"lora.rank: found {rank}, but {short_name(name)!r} is a matrix of {wide[0]} by {wide[1]}; "
                f"expected 1 to {min(wide)}"
            )
        adapter[name] = {
            "A": jax.ShapeDtypeStruct((*layers, rank, wide[0]), jnp.float32),
            "B": jax.ShapeDtypeStruct((*layers, wide[1], rank), jnp.float32),
        }
    return adapter


def init(cfg: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Adapter:
    """An adapter as PEFT begins one, on the mesh (None: the first device): A uniform within ±1/√in, B zero."""
    return _init_program(cfg, mesh or sharding.single_device_mesh())(key)


@functools.cache
def _init_program(cfg: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Adapter]:
    shapes = abstract(cfg)

    def make(key):
        made = {}
        for name, pair in shapes.items():
            own, bound = jax.random.fold_in(key, zlib.crc32(name.encode())), pair["A"].shape[-1] ** -0.5
            a = jax.random.uniform(own, pair["A"].shape, jnp.float32, -bound, bound)
            made[name] = {"A": a, "B": jnp.zeros(pair["B"].shape, jnp.float32)}
        return made

    return jax.jit(make, out_shardings=sharding.param_shardings(shapes, mesh))


def attach(params: Any, adapter: Adapter, cfg: ModelConfig) -> Any:
    """The parameters with the adapter's leaves beside the kernels; differentiable, and the rest are the same arrays.

    params: the model's, or what `prepare` made of them for the scanned layer loop.
    """
    return _with_leaves(params, leaves(adapter, cfg))


@functools.partial(jax.jit, static_argnames="cfg")
def leaves(adapter: Adapter, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Path of a kernel's neighbour → lora_a [L, *in, rank] or lora_b [L, rank, *out]."""
    found: dict[str, jax.Array] = {}
    for name, key in modules(cfg).items():
        lay_out = functools.partial(_lay_out, key, stored_in_out(cfg))
        lay_out = jax.vmap(lay_out) if is_stacked(name) else lay_out
        for path, pair in zip(key.ours, lay_out(adapter[name]["A"], adapter[name]["B"]), strict=True):
            found |= {_neighbour(path, leaf): array for leaf, array in zip(LEAVES, pair, strict=True)}
    return found


def detach(params: Any, cfg: ModelConfig, fetch: Callable[[jax.Array], np.ndarray] = np.asarray) -> Adapter:
    """The adapter of parameters that hold one, in host memory: what `attach` was given, bit for bit."""
    by_path = _by_path(params)
    adapter = {}
    for name, key in modules(cfg).items():
        pairs = [[fetch(by_path[_neighbour(path, leaf)]) for leaf in LEAVES] for path in key.ours]
        if is_stacked(name):
            layers = [
                _collect(key, stored_in_out(cfg), [[leaf[i] for leaf in pair] for pair in pairs])
                for i in range(cfg.num_layers)
            ]
            a, b = map(np.stack, zip(*layers, strict=True))
        else:
            a, b = _collect(key, stored_in_out(cfg), pairs)
        adapter[name] = {"A": a, "B": b}
    return adapter


def check(cfg: ModelConfig, recipe: Recipe) -> None:
    """Raises UserError for an adapter that the model cannot have, or a recipe that cannot train one."""
    if not recipe.lora.rank:
        return
    abstract(dataclasses.replace(cfg, lora=recipe.lora))
    if not 0 < recipe.lora.alpha < math.inf:
        raise UserError(f"lora.alpha: found {recipe.lora.alpha}, expected a number above 0")
    if not 0 <= recipe.lora.dropout < 1:
        raise UserError(f"lora.dropout: found {recipe.lora.dropout}, expected at least 0 and less than 1")
    if recipe.lora.dropout and not recipe.dropout:
        raise UserError(f"lora.dropout: found {recipe.lora.dropout}, but dropout is off; one of the two must change")
    if recipe.reproduce_release:
        raise UserError("lora.rank: reproduce_release trains all weights, in bfloat16; switch one of the two off")
    if recipe.precision != "float32":
        raise UserError(f"precision: found {recipe.precision!r}, but an adapter (lora.rank) is trained in float32")


def merge(model: Model) -> Model:
    """The same model without an adapter: W + scale · B A in float32, rounded to W's dtype."""
    params, cfg = model
    if not cfg.lora.rank:
        return model

    def walk(tree: Mapping[str, Any], stacked: bool) -> dict[str, Any]:
        if LEAVES[0] not in tree:
            return {
                name: walk(node, stacked or name == "blocks") if isinstance(node, dict) else node
                for name, node in tree.items()
            }
        kernel = _merged(tree["kernel"], *(tree[leaf] for leaf in LEAVES), cfg.lora.scale, stacked)
        rest = {name: leaf for name, leaf in tree.items() if name not in LEAVES}
        place = getattr(tree["kernel"], "sharding", None)  # NumPy's arrays have none
        return {**rest, "kernel": jax.device_put(kernel, place)}

    return Model(walk(params, False), dataclasses.replace(cfg, lora=type(cfg.lora)()))


@functools.partial(jax.jit, static_argnames="stacked")
def _merged(kernel, a, b, scale, stacked: bool):
    layers = kernel.shape[:1] if stacked else ()
    product = jnp.matmul(
        a.reshape(*layers, -1, a.shape[-1]).astype(jnp.float32),
        b.reshape(*layers, a.shape[-1], -1).astype(jnp.float32),
        precision="highest",
    )
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def _reads_heads(key: Key) -> bool:
    """Whether the input side of a kernel is [heads, size]; of all others it is one axis, and the output side may be."""
    return key.ours[0].endswith("attention/output/kernel")


def _lay_out(key: Key, in_out: bool, a: Any, b: Any) -> list[tuple[Any, Any]]:
    """(lora_a, lora_b) of each kernel that one layer's weight fills: A read as a weight with `rank` outputs, B as one
    with `rank` inputs."""
    if _reads_heads(key):
        return [(key.split(a.T if in_out else a)[0], b.T)]
    return [(a.T, part) for part in key.split(b.T if in_out else b)]


def _collect(key: Key, in_out: bool, pairs: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_lay_out`."""
    if _reads_heads(key):
        a, b = key.join(pairs[0][0]), pairs[0][1].T
        return (a.T if in_out else a), b
    b = key.join(*(b for _, b in pairs))
    return pairs[0][0].T, (b.T if in_out else b)


def _neighbour(path: str, leaf: str) -> str:
    return f"{path.removesuffix('kernel')}{leaf}"


def _with_leaves(params: Mapping[str, Any], found: Mapping[str, jax.Array]) -> dict[str, Any]:
    """A copy of the dictionaries, not of the arrays, with leaves added by path."""
    below: dict[str, dict[str, jax.Array]] = {}
    here = dict(params)
    for path, leaf in found.items():
        first, slash, rest = path.partition("/")
        if slash:
            below.setdefault(first, {})[rest] = leaf
        else:
            here[first] = leaf
    return {**here, **{name: _with_leaves(params[name], inner) for name, inner in below.items()}}


def _by_path(tree: Any) -> dict[str, Any]:
    return {sharding.path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
