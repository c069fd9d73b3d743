"""A model's parameters: made at random, described without memory, prepared for decoding.

Letters: V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.models import kinds
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.layers import fuse_attention
from unidetox_jax.models.registry import family

Params = dict[str, Any]


class Model(NamedTuple):
    """Parameters (a plain nested dict, layers stacked on axis 0) and what they mean."""

    params: Any
    cfg: ModelConfig


def init(cfg: ModelConfig, key: jax.Array, mesh: Mesh | None = None, param_dtype: str = "float32") -> Params:
    """Random parameters as the family initialises them, made in place on the mesh (None: the first device)."""
    return _init_program(cfg, mesh or sharding.single_device_mesh(), param_dtype)(key)


@functools.cache
def _init_program(cfg: ModelConfig, mesh: Mesh, param_dtype: str) -> Callable[[jax.Array], Params]:
    shardings = sharding.param_shardings(abstract_params(cfg, param_dtype), mesh)
    return jax.jit(lambda key: _init(cfg, key, param_dtype), out_shardings=shardings)


def abstract_params(cfg: ModelConfig, param_dtype: str = "float32") -> Params:
    """The parameters' shapes and dtypes, without any memory."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(cfg, param_dtype))  # a tree of the caller's own


@functools.cache
def _abstract_params(cfg: ModelConfig, param_dtype: str) -> Params:
    return jax.eval_shape(lambda: _init(cfg, jax.random.key(0), param_dtype))


def num_params(cfg: ModelConfig) -> int:
    """How many parameters the model has; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))


def _init(cfg: ModelConfig, key: jax.Array, param_dtype: str) -> Params:
    parts = family(cfg)
    embed_key, block_key, final_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, cfg.hidden_size), cfg.dtype)

    def init_block(key):
        return parts.Block(cfg).init(
            key, x, lambda query, key, value, dropout: (query, None), kinds.rotaries(cfg, tokens)[0], 0, True
        )["params"]

    params = {
        "embed": parts.Embed(cfg).init(embed_key, tokens, tokens, True)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, cfg.num_layers)),
        "final": parts.Final(cfg).init(final_key, x).get("params", {}),
    }
    params = {name: part for name, part in params.items() if part}  # OPT without a final norm has nothing there
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def prepare(params: Params, cfg: ModelConfig, transpose_head: bool = False, fuse: bool = False) -> Params:
    """Parameters as a decoding loop wants them: matrices in the compute dtype, and for the unrolled layer loop the
    blocks as a tuple of layers, so that nothing is cast or sliced within the loop. Every function here takes both
    forms. Norms keep their dtype, as in `forward`.

    transpose_head: add the output matrix as `head`, [width, V]: a copy, and what XLA's products on CPU are fast with.
    fuse: see `layers.fuse_attention`; not where there are adapters.
    """

    def cast(path, leaf):
        return leaf if "norm" in sharding.path_string(path) else leaf.astype(cfg.dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    if fuse and not cfg.lora.rank:
        params = {**params, "blocks": fuse_attention(params["blocks"])}
    if cfg.layer_loop == "unroll" and not isinstance(params["blocks"], tuple):
        params = {**params, "blocks": tuple(one_layer(params["blocks"], i) for i in range(cfg.num_layers))}
    return {**params, "head": head(params, cfg).T} if transpose_head else params


def head(params: Params, cfg: ModelConfig) -> jax.Array:
    """The output matrix [V, width]: the embedding where tied."""
    return params["embed"]["tokens"]["embedding"] if cfg.tie_word_embeddings else params["final"]["head"]["embedding"]


def one_layer(blocks: Params, index: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[index], blocks)
