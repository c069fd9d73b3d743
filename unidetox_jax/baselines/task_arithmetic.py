"""Task arithmetic: the target's weights, shifted away from those of its toxic twin."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unidetox_jax.baselines.base import TOXIC, Baseline, Corpora, Twins
from unidetox_jax.method import LanguageModel
from unidetox_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class TaskArithmetic(Baseline):
    """θ − λ (θ_toxic − θ), where λ is `scale`, to be tuned.

    Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023), section 2, negation.
    """

    needs: ClassVar[str] = "A toxic copy trained for every target, and a scale tuned for it."

    scale: float = 0.5

    def twins(self) -> tuple[str, ...]:
        return (TOXIC,)

    def make(self, target: LanguageModel, twins: Twins, texts: Corpora, recipe: Recipe, **where: Any) -> LanguageModel:
        return target._replace(params=extrapolate(target.params, twins[TOXIC].params, -self.scale))


def extrapolate(params: Any, other_params: Any, scale: float) -> Any:
    """θ + scale · (θ′ − θ), computed in float32 and returned in θ's dtype; weights without change stay identical. Tied
    weights are a single leaf, so they change once."""

    @jax.jit
    def shift(leaf, other):
        change = scale * (other.astype(jnp.float32) - leaf.astype(jnp.float32))
        return jnp.where(change == 0, leaf, (leaf.astype(jnp.float32) + change).astype(leaf.dtype))

    return jax.tree.map(shift, params, other_params)
