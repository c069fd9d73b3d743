"""What training makes smaller, and which parameters it changes for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from unidetox_jax import models
from unidetox_jax.models import ModelConfig, lora
from unidetox_jax.training.loss import Batch, total_loss


@dataclasses.dataclass(frozen=True)
class Criterion:
    """The language-modelling loss, of the whole model or, with `cfg.lora`, of an adapter of it.

    Another loss, or other parameters to train, are a subclass: a frozen dataclass, since programs are kept by it.
    Weights are a model's own parameters, `params` what is trained, `base` the weights that stay as they are, prepared
    for the compute dtype, or None.
    """

    def keeps_base(self, cfg: ModelConfig) -> bool:
        """Whether there are weights that stay beside what is trained."""
        return bool(cfg.lora.rank)

    def abstract(self, cfg: ModelConfig, param_dtype: str) -> Any:
        """Shapes and dtypes of what is trained."""
        return lora.abstract(cfg) if cfg.lora.rank else models.abstract_params(cfg, param_dtype)

    def initial(self, cfg: ModelConfig, weights: Callable[[], Any], seed: int, mesh: Mesh) -> Any:
        """What training begins with, on the mesh; `weights` gives arrays that may be taken over."""
        return lora.init(cfg, jax.random.key(seed), mesh) if cfg.lora.rank else weights()

    def count(self, batch: Batch, targets: jax.Array) -> jax.Array:
        """What `total` is divided by, float32; targets: the number of the batch's."""
        return targets

    def total(
        self, params: Any, base: Any, batch: Batch, cfg: ModelConfig, *, dropout_key: jax.Array | None, remat: str
    ) -> jax.Array:
        """The loss summed over what `count` counts, float32; the arguments are those of `training.loss`."""
        return total_loss(self.model(base, params, cfg), batch, cfg, dropout_key=dropout_key, remat=remat)[0]

    def model(self, base: Any, params: Any, cfg: ModelConfig) -> Any:
        """The weights of the model that was trained."""
        return lora.attach(base, params, cfg) if cfg.lora.rank else params


LANGUAGE_MODELLING = Criterion()
