"""Weights cast to the compute dtype where a layer uses them, and gradients that are held in that dtype.

Cast before the layers, a copy of all weights would stand in memory; cast within them by `astype` alone, gradients would
leave in the weights' own dtype. So a derivative is taken with respect to a variable in the cast weight's place, whose
value nothing reads, so that it never exists. Weights in the compute dtype are their own variables.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig


class Late(NamedTuple):
    """A weight that is cast where it is used, and the variable that takes its gradient, in the compute dtype."""

    weight: jax.Array
    variable: jax.Array


def variables(params: Any, cfg: ModelConfig) -> Any:
    """What to differentiate by, a tree as `params`: gradients have these dtypes. Norms keep theirs, as in `forward`."""

    def variable(path, leaf):
        kept = leaf.dtype == cfg.dtype or "norm" in sharding.path_string(path)
        return leaf if kept else jnp.zeros(leaf.shape, cfg.dtype)

    return jax.tree_util.tree_map_with_path(variable, params)


def late(params: Any, variables: Any) -> Any:
    """Parameters for `hidden_states` and `head` whose derivatives by `variables` are those by the cast weights: the
    layers' to be cast one layer at a time, the others cast at once."""
    pairs = jax.tree.map(lambda leaf, own: own if leaf.dtype == own.dtype else Late(leaf, own), params, variables)
    return {name: part if name == "blocks" else read(part) for name, part in pairs.items()}


def read(tree: Any) -> Any:
    """The tree with its `Late` weights cast."""
    return jax.tree.map(lambda leaf: _cast(*leaf) if _is_late(leaf) else leaf, tree, is_leaf=_is_late)


def holds_late(tree: Any) -> bool:
    """Whether any weight of the tree is still to be cast."""
    return any(map(_is_late, jax.tree.leaves(tree, is_leaf=_is_late)))


def saveable(primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint` that keeps all but casts, among them a layer's weights."""
    return primitive.name != "convert_element_type"


def _is_late(leaf: Any) -> bool:
    return isinstance(leaf, Late)


@jax.custom_vjp
def _cast(weight, variable):
    return weight.astype(variable.dtype)


_cast.defvjp(lambda weight, variable: (_cast(weight, variable), None), lambda _, gradient: (None, gradient))
