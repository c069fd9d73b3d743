"""Low-rank adapters (Hu et al. 2022): stored and trained in PEFT's layout, applied beside any family's kernels.

An adapter is {module: {"A": [L, rank, in], "B": [L, out, rank]}}, float32. Modules have their transformers names, with
{layer}, so that a fused projection has one A and training takes the same steps as PEFT. Outside the blocks (OPT-350m's
projections) there is no axis L. `attach` adds the adapter to a model's parameters, as leaves `lora_a` and `lora_b`
beside each kernel; all model functions accept such parameters, with their `cfg.lora`.
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
from unidetox_jax.models.key_tables import Key
from unidetox_jax.models.parameters import Model, abstract_params
from unidetox_jax.models.registry import key_table, stored_in_out
from unidetox_jax.recipe import Recipe

Adapter = dict[str, dict[str, Any]]
WEIGHT = ".weight"
LEAVES = ("lora_a", "lora_b")


def modules(cfg: ModelConfig) -> dict[str, Key]:
    """The linear layers that `cfg.lora` adapts: name in transformers → row of the key table.

    Raises:
      UserError: a target that matches no linear layer.
    """
    linear = linear_layers(cfg)
    if not cfg.lora.targets:
        return {name: key for name, key in linear.items() if is_per_layer(name)}
    for target in cfg.lora.targets:
        if not any(matches(name, target) for name in linear):
            known = {name.rpartition(".")[2] for name in linear}
            raise UserError(f"lora.targets: no linear layer {target!r}{suggest(target, known)}")
    return {name: key for name, key in linear.items() if any(matches(name, target) for target in cfg.lora.targets)}


def linear_layers(cfg: ModelConfig) -> dict[str, Key]:
    """All linear layers that can be adapted: name in transformers → row of the key table."""
    return {
        key.hf.removesuffix(WEIGHT): key
        for key in key_table(cfg)
        if key.hf.endswith(WEIGHT) and all(path.endswith("/kernel") for path in key.ours)
    }


def is_per_layer(name: str) -> bool:
    """Whether every layer has such a module."""
    return "{layer}" in name


def short_name(name: str) -> str:
    """A module's name within its layer."""
    return name.rpartition("{layer}.")[2]


def matches(name: str, target: str) -> bool:
    """Whether PEFT would adapt the module for this target."""
    return name == target or name.endswith(f".{target}")


def abstract(cfg: ModelConfig) -> Adapter:
    """The adapter as ShapeDtypeStructs.

    Raises:
      UserError: an unknown target, or a rank that is not between 1 and the smaller side of a matrix.
    """
    by_path = _by_path(abstract_params(cfg))
    rank, adapter = cfg.lora.rank, {}
    for name, key in modules(cfg).items():
        layers = (cfg.num_layers,) if is_per_layer(name) else ()
        shapes = [by_path[path].shape[len(layers) :] for path in key.ours]
        input_axes = 2 if _input_is_heads(key) else 1
        inputs = math.prod(shapes[0][:input_axes])
        outputs = sum(math.prod(shape[input_axes:]) for shape in shapes)
        if not 1 <= rank <= min(inputs, outputs):
            raise UserError(
                f"lora.rank: found {rank}, but {short_name(name)!r} is a matrix of {inputs} by {outputs}; "
                f"expected 1 to {min(inputs, outputs)}"
            )
        adapter[name] = {
            "A": jax.ShapeDtypeStruct((*layers, rank, inputs), jnp.float32),
            "B": jax.ShapeDtypeStruct((*layers, outputs, rank), jnp.float32),
        }
    return adapter


def init(cfg: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Adapter:
    """A new adapter as in PEFT, on the mesh (None: the first device): A uniform within ±1/√in, B zero."""
    return _init_program(cfg, mesh or sharding.single_device_mesh())(key)


@functools.cache
def _init_program(cfg: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Adapter]:
    shapes = abstract(cfg)

    def initialise(key):
        adapter = {}
        for name, pair in shapes.items():
            module_key, bound = jax.random.fold_in(key, zlib.crc32(name.encode())), pair["A"].shape[-1] ** -0.5
            a = jax.random.uniform(module_key, pair["A"].shape, jnp.float32, -bound, bound)
            adapter[name] = {"A": a, "B": jnp.zeros(pair["B"].shape, jnp.float32)}
        return adapter

    return jax.jit(initialise, out_shardings=sharding.param_shardings(shapes, mesh))


def attach(params: Any, adapter: Adapter, cfg: ModelConfig) -> Any:
    """The parameters with the adapter's leaves beside the kernels; differentiable. All other leaves are shared.

    params: the model's, with stacked blocks, neither fused nor transposed.
    """
    return _with_leaves(params, _leaves(adapter, cfg))


@functools.partial(jax.jit, static_argnames="cfg")
def _leaves(adapter: Adapter, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Path → leaf: lora_a [L, *in, rank] and lora_b [L, rank, *out] for each kernel."""
    leaves: dict[str, jax.Array] = {}
    for name, key in modules(cfg).items():
        lay_out = functools.partial(_lay_out, key, stored_in_out(cfg))
        lay_out = jax.vmap(lay_out) if is_per_layer(name) else lay_out
        for path, pair in zip(key.ours, lay_out(adapter[name]["A"], adapter[name]["B"]), strict=True):
            leaves |= {_beside(path, end): leaf for end, leaf in zip(LEAVES, pair, strict=True)}
    return leaves


def detach(params: Any, cfg: ModelConfig, fetch: Callable[[jax.Array], np.ndarray] = np.asarray) -> Adapter:
    """The inverse of `attach`, bit for bit: the adapter in host memory."""
    by_path = _by_path(params)
    adapter = {}
    for name, key in modules(cfg).items():
        pairs = [[fetch(by_path[_beside(path, leaf)]) for leaf in LEAVES] for path in key.ours]
        if is_per_layer(name):
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
    """Raises UserError for an adapter that does not fit the model, or a recipe that cannot train one."""
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
    """The model with its adapter merged into the weights: W + scale · B A in float32, rounded to W's dtype."""
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
        placement = getattr(tree["kernel"], "sharding", None)  # NumPy arrays have none
        return {**rest, "kernel": jax.device_put(kernel, placement)}

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


def _input_is_heads(key: Key) -> bool:
    """Whether a kernel is [heads, size, out]. All others have one input axis."""
    return key.ours[0].endswith("attention/output/kernel")


def _lay_out(key: Key, in_out: bool, a: Any, b: Any) -> list[tuple[Any, Any]]:
    """(lora_a, lora_b) of each kernel that one layer's weight fills.

    A is converted like a weight with `rank` outputs, B like one with `rank` inputs.
    """
    if _input_is_heads(key):
        return [(key.split(a.T if in_out else a)[0], b.T)]
    return [(a.T, part) for part in key.split(b.T if in_out else b)]


def _collect(key: Key, in_out: bool, pairs: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_lay_out`."""
    if _input_is_heads(key):
        a, b = key.join(pairs[0][0]), pairs[0][1].T
        return (a.T if in_out else a), b
    b = key.join(*(b for _, b in pairs))
    return pairs[0][0].T, (b.T if in_out else b)


def _beside(path: str, leaf: str) -> str:
    return f"{path.removesuffix('kernel')}{leaf}"


def _with_leaves(params: Mapping[str, Any], leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The parameters with leaves added by path; dictionaries are copied, arrays are not."""
    copy = dict(params)
    for path, leaf in leaves.items():
        name, slash, rest = path.partition("/")
        copy[name] = _with_leaves(copy[name], {rest: leaf}) if slash else leaf
    return copy


def _by_path(tree: Any) -> dict[str, Any]:
    return {sharding.path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
