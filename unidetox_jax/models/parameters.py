"""A model's parameters: random initialisation, abstract shapes, preparation for decoding.

Axes: V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.models import local_attention
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.layers import fuse_attention, transpose_kernels
from unidetox_jax.models.registry import family

Params = dict[str, Any]


class Model(NamedTuple):
    """Parameters (a plain nested dict, layers stacked on axis 0) and their configuration."""

    params: Any
    cfg: ModelConfig


def init(cfg: ModelConfig, key: jax.Array, mesh: Mesh | None = None, param_dtype: str = "float32") -> Params:
    """Random parameters, initialised in place on the mesh (None: the first device)."""
    return _init_program(cfg, mesh or sharding.single_device_mesh(), param_dtype)(key)


@functools.cache
def _init_program(cfg: ModelConfig, mesh: Mesh, param_dtype: str) -> Callable[[jax.Array], Params]:
    shardings = sharding.param_shardings(abstract_params(cfg, param_dtype), mesh)
    return jax.jit(lambda key: _init(cfg, key, param_dtype), out_shardings=shardings)


def abstract_params(cfg: ModelConfig, param_dtype: str = "float32") -> Params:
    """The parameters as ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(cfg, param_dtype))  # copies the cached dictionaries


@functools.cache
def _abstract_params(cfg: ModelConfig, param_dtype: str) -> Params:
    return jax.eval_shape(lambda: _init(cfg, jax.random.key(0), param_dtype))


def num_params(cfg: ModelConfig) -> int:
    """The number of parameters; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))


def _init(cfg: ModelConfig, key: jax.Array, param_dtype: str) -> Params:
    module = family(cfg)
    embed_key, block_key, final_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, cfg.hidden_size), cfg.dtype)

    def init_block(key):
        rotary, _ = local_attention.rotary_pair(cfg, tokens)
        return module.Block(cfg).init(key, x, lambda query, key, value, dropout: (query, None), rotary, 0, True)[
            "params"
        ]

    params = {
        "embed": module.Embed(cfg).init(embed_key, tokens, tokens, True)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, cfg.num_layers)),
        "final": module.Final(cfg).init(final_key, x).get("params", {}),
    }
    params = {name: tree for name, tree in params.items() if tree}  # "final" is empty in OPT without a final norm
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def prepare(params: Params, cfg: ModelConfig, transpose: bool = False, fuse: bool = False) -> Params:
    """Parameters for a decoding loop, so that nothing is cast or sliced within it; all model functions accept them.

    Matrices are in the compute dtype; norms keep theirs, as in `forward`. For the unrolled layer loop, blocks are a
    tuple of layers.

    transpose: the layers' kernels (`layers.transpose_kernels`), which is faster on CPUs.
    fuse: fuse attention's projections (`layers.fuse_attention`) unless there is an adapter.
    """

    def cast(path, leaf):
        return leaf if "norm" in sharding.path_string(path) else leaf.astype(cfg.dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    blocks = params["blocks"]
    for wanted, arrange in ((fuse and not cfg.lora.rank, fuse_attention), (transpose, transpose_kernels)):
        if wanted:
            blocks = tuple(map(arrange, blocks)) if isinstance(blocks, tuple) else arrange(blocks)
    if cfg.layer_loop == "unroll" and not isinstance(blocks, tuple):
        blocks = tuple(one_layer(blocks, i) for i in range(cfg.num_layers))
    return {**params, "blocks": blocks}


def head(params: Params, cfg: ModelConfig) -> jax.Array:
    """The output matrix [V, width]: the token embedding if tied."""
    return params["embed"]["tokens"]["embedding"] if cfg.tie_word_embeddings else params["final"]["head"]["embedding"]


def one_layer(blocks: Params, index: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[index], blocks)
