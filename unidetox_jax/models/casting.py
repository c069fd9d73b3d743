"""Casts weights to the compute dtype layer by layer, with gradients in that dtype.

Casting all weights before the layers would hold a copy of them in memory; `astype` within the layers would give
gradients in the weights' own dtype. So derivatives are taken with respect to a placeholder for the cast weight, whose
value nothing reads, so that it is never allocated. Weights already in the compute dtype are their own placeholders.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig


class DeferredCast(NamedTuple):
    """A weight to be cast where it is used, and the placeholder in the compute dtype that receives its gradient."""

    weight: jax.Array
    placeholder: jax.Array


def placeholders(params: Any, cfg: ModelConfig) -> Any:
    """The tree to differentiate with respect to: it sets the gradients' dtypes. Norms keep theirs, as in `forward`."""

    def placeholder(path, leaf):
        uncast = leaf.dtype == cfg.dtype or "norm" in sharding.path_string(path)
        return leaf if uncast else jnp.zeros(leaf.shape, cfg.dtype)

    return jax.tree_util.tree_map_with_path(placeholder, params)


def defer(params: Any, placeholders: Any) -> Any:
    """Parameters for `hidden_states` and `head`, to be differentiated with respect to `placeholders`.

    Blocks are cast one layer at a time, all other weights at once.
    """
    pairs = jax.tree.map(
        lambda leaf, placeholder: placeholder if leaf.dtype == placeholder.dtype else DeferredCast(leaf, placeholder),
        params,
        placeholders,
    )
    return {name: tree if name == "blocks" else resolve(tree) for name, tree in pairs.items()}


def resolve(tree: Any) -> Any:
    """The tree with its deferred casts done."""
    return jax.tree.map(lambda leaf: _cast(*leaf) if _is_deferred(leaf) else leaf, tree, is_leaf=_is_deferred)


def has_deferred(tree: Any) -> bool:
    """Whether any weight of the tree is still to be cast."""
    return any(map(_is_deferred, jax.tree.leaves(tree, is_leaf=_is_deferred)))


def save_all_but_casts(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: cast weights are recomputed, everything else is saved."""
    return primitive.name != "convert_element_type"


def _is_deferred(leaf: Any) -> bool:
    return isinstance(leaf, DeferredCast)


@jax.custom_vjp
def _cast(weight, placeholder):
    return weight.astype(placeholder.dtype)


_cast.defvjp(lambda weight, placeholder: (_cast(weight, placeholder), None), lambda _, gradient: (None, gradient))
