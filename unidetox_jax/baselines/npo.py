"""NPO: toxic text is made less likely than the target finds it, more gently the less likely it is already."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unidetox_jax import method, training
from unidetox_jax.baselines.base import TOXIC, Baseline, Given
from unidetox_jax.method import LanguageModel
from unidetox_jax.models import ModelConfig
from unidetox_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Npo(Baseline):
    """Negative preference optimisation on toxic text alone, the target itself being the reference.

    Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning" (2024), eq. 3.
    learning_rate, steps: 0 takes the twins'.
    """

    needs: ClassVar[str] = "Its own training on every target, with the target itself beside it at every step."
    texts: ClassVar[tuple[str, ...]] = (TOXIC,)

    beta: float = 0.1
    learning_rate: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", self.beta > 0, "more than 0")
        self.check("learning_rate", self.learning_rate >= 0, "at least 0")
        self.check("steps", self.steps >= 0, "at least 0")

    def recipe(self, given: Given) -> Given | None:
        return dataclasses.replace(
            given, learning_rate=self.learning_rate or given.learning_rate, steps=self.steps or given.steps
        )

    def make(
        self,
        target: LanguageModel,
        twins: Mapping[str, LanguageModel],
        texts: Mapping[str, Sequence[str]],
        recipe: Recipe,
        **where: Any,
    ) -> LanguageModel:
        return method.finetune(target, texts[TOXIC], recipe, criterion=NegativePreference(self.beta), **where)


@dataclasses.dataclass(frozen=True)
class NegativePreference(training.Criterion):
    """−(2/β) E log σ(−β log(π(y) / π_ref(y))) over texts y, π_ref being the weights that stay."""

    beta: float

    def has_base(self, cfg: ModelConfig) -> bool:
        return True

    def count(self, batch: training.Batch, targets: jax.Array) -> jax.Array:
        return jnp.sum(_by_text(training.target_mask(batch), batch) > 0, dtype=jnp.float32)

    def total(
        self,
        params: Any,
        base: Any,
        batch: training.Batch,
        cfg: ModelConfig,
        *,
        dropout_key: jax.Array | None,
        remat: str,
    ) -> jax.Array:
        own = self.model(base, params, cfg)
        losses = training.target_losses(own, batch, cfg, dropout_key=dropout_key, remat=remat)
        log_ratio = _by_text(training.target_losses(base, batch, cfg) - losses, batch)
        there = _by_text(training.target_mask(batch), batch) > 0
        return jnp.sum(jnp.where(there, 2 / self.beta * jax.nn.softplus(self.beta * log_ratio), 0.0))


def _by_text(values: jax.Array, batch: training.Batch) -> jax.Array:
    """Sums of [B,T] over each row's texts, float32 [B,T+1]: the i-th text's at i, 0 where there is none. A row without
    segments is one text."""
    rows = batch.get("segment_ids", jnp.ones(values.shape, jnp.int32))
    add = jax.vmap(lambda row, texts: jax.ops.segment_sum(row, texts, values.shape[1] + 1))
    return add(values.astype(jnp.float32), rows)
