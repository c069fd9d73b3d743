"""What training minimises, and the parameters that it changes."""

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
    """The language-modelling loss, as a function of all weights or, with `cfg.lora`, of an adapter.

    A subclass defines another loss or other trained parameters; it must be a frozen dataclass, since compiled programs
    are cached by it. In its methods, `weights` are a model's parameters, `params` what is trained, and `base` the
    frozen weights in the compute dtype, or None.
    """

    def has_base(self, cfg: ModelConfig) -> bool:
        """Whether there are frozen weights beside the trained parameters."""
        return bool(cfg.lora.rank)

    def abstract(self, cfg: ModelConfig, param_dtype: str) -> Any:
        """The trained parameters as ShapeDtypeStructs."""
        return lora.abstract(cfg) if cfg.lora.rank else models.abstract_params(cfg, param_dtype)

    def initial(self, cfg: ModelConfig, weights: Callable[[], Any], seed: int, mesh: Mesh) -> Any:
        """The initial parameters, on the mesh; `weights()` gives arrays that may be donated."""
        return lora.init(cfg, jax.random.key(seed), mesh) if cfg.lora.rank else weights()

    def count(self, batch: Batch, targets: jax.Array) -> jax.Array:
        """The divisor of `total`, float32; targets: how many the batch has."""
        return targets

    def total(
        self, params: Any, base: Any, batch: Batch, cfg: ModelConfig, *, dropout_key: jax.Array | None, remat: str
    ) -> jax.Array:
        """The summed loss, float32; arguments as in `training.loss`."""
        return total_loss(self.model(base, params, cfg), batch, cfg, dropout_key=dropout_key, remat=remat)[0]

    def model(self, base: Any, params: Any, cfg: ModelConfig) -> Any:
        """The weights of the trained model."""
        return lora.attach(base, params, cfg) if cfg.lora.rank else params


LANGUAGE_MODELLING = Criterion()
