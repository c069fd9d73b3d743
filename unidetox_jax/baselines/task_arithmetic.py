"""Task arithmetic: the target's weights, moved away from those of its toxic twin."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unidetox_jax.baselines.base import TOXIC, Baseline
from unidetox_jax.method import LanguageModel
from unidetox_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class TaskArithmetic(Baseline):
    """θ − λ (θ_toxic − θ), λ being `scale`.

    Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023), section 2, negation. λ is to be tuned.
    """

    needs: ClassVar[str] = "A toxic copy of every target, trained anew for it, and a scale that is tuned for it."

    scale: float = 0.5

    def twins(self) -> tuple[str, ...]:
        return (TOXIC,)

    def make(
        self,
        target: LanguageModel,
        twins: Mapping[str, LanguageModel],
        texts: Mapping[str, Sequence[str]],
        recipe: Recipe,
        **where: Any,
    ) -> LanguageModel:
        return target._replace(params=moved(target.params, twins[TOXIC].params, -self.scale))


def moved(params: Any, towards: Any, share: float) -> Any:
    """θ + share · (θ′ − θ), leaf by leaf in float32, in θ's dtype; what does not change stays to the bit. Tied weights
    are one leaf, and so moved once."""

    @jax.jit
    def move(leaf, other):
        change = share * (other.astype(jnp.float32) - leaf.astype(jnp.float32))
        return jnp.where(change == 0, leaf, (leaf.astype(jnp.float32) + change).astype(leaf.dtype))

    return jax.tree.map(move, params, towards)
