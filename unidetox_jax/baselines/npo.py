"""NPO: makes toxic text less likely than under the target, with a weight that vanishes as it becomes unlikely."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unidetox_jax import method, training
from unidetox_jax.baselines.base import TOXIC, AnyRecipe, Baseline, Corpora, Twins
from unidetox_jax.method import LanguageModel
from unidetox_jax.models import ModelConfig
from unidetox_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Npo(Baseline):
    """Negative preference optimisation on toxic text, with the target as reference model.

    Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning" (2024), eq. 3.
    learning_rate, steps: 0 means those of the twins.
    """

    needs: ClassVar[str] = "Separate training on every target, with the target as reference at every step."
    texts: ClassVar[tuple[str, ...]] = (TOXIC,)

    beta: float = 0.1
    learning_rate: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", self.beta > 0, "more than 0")
        self.check("learning_rate", self.learning_rate >= 0, "at least 0")
        self.check("steps", self.steps >= 0, "at least 0")

    def recipe(self, default: AnyRecipe) -> AnyRecipe | None:
        return dataclasses.replace(
            default, learning_rate=self.learning_rate or default.learning_rate, steps=self.steps or default.steps
        )

    def make(self, target: LanguageModel, twins: Twins, texts: Corpora, recipe: Recipe, **where: Any) -> LanguageModel:
        return method.finetune(target, texts[TOXIC], recipe, criterion=NegativePreference(self.beta), **where)


@dataclasses.dataclass(frozen=True)
class NegativePreference(training.Criterion):
    """−(2/β) E log σ(−β log(π(y) / π_ref(y))) over texts y, with the frozen base weights as π_ref."""

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
        trained = self.model(base, params, cfg)
        losses = training.target_losses(trained, batch, cfg, dropout_key=dropout_key, remat=remat)
        log_ratio = _by_text(training.target_losses(base, batch, cfg) - losses, batch)
        has_targets = _by_text(training.target_mask(batch), batch) > 0
        return jnp.sum(jnp.where(has_targets, 2 / self.beta * jax.nn.softplus(self.beta * log_ratio), 0.0))


def _by_text(values: jax.Array, batch: training.Batch) -> jax.Array:
    """Sums of [B,T] over each text of a row, float32 [B,T+1]: column i is the text of segment i, 0 if there is none.
    Without segment ids, a row is one text."""
    segments = batch.get("segment_ids", jnp.ones(values.shape, jnp.int32))
    sum_segments = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, values.shape[1] + 1))
    return sum_segments(values.astype(jnp.float32), segments)
