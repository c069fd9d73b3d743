"""AdamW with a linear decay, exactly as transformers.Trainer with torch.optim.AdamW takes its steps.

Pure bfloat16 (`reproduce_release`) is torch's arithmetic, one rounding after each of its operations. At a learning rate
of 1e-5 most of those updates round to nothing; it is here to reproduce the released code.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unidetox_jax import sharding


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW's settings.

    learning_rate: the highest; 0 at first and rising for `warmup_steps`, then falling linearly to 0 at `steps`.
    weight_decay: on matrices and embeddings, not on biases and norms.
    clip_norm: of the global gradient norm; 0 switches clipping off.
    reproduce_release: weights, moments and gradients in bfloat16, as in the released code.
    """

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    reproduce_release: bool = False

    @property
    def param_dtype(self) -> str:
        """What the weights are kept in."""
        return "bfloat16" if self.reproduce_release else "float32"

    def learning_rate_at(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of the update number `step`, from 0; float32."""
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, self.warmup_steps)
        falling = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * jnp.where(step < self.warmup_steps, rising, jnp.maximum(falling, 0.0))


def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule, to be used with `optax.apply_updates`; its state mirrors the parameters."""
    parts = [_clip(settings.clip_norm)] if settings.clip_norm else []
    if settings.reproduce_release:
        return optax.chain(*parts, _bfloat16_adamw(settings))
    parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon))
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=decayed))
    return optax.chain(*parts, optax.scale_by_learning_rate(settings.learning_rate_at))


def decayed(params: Any) -> Any:
    """Which leaves decay, as the Trainer decides it: all but biases and norms."""

    def decays(path, leaf):
        return sharding.path_string(path).rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def _clip(norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: times norm / (global norm + 1e-6) where that is less than 1."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda update: (update * scale).astype(update.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(gradients: Any) -> jax.Array:
    """The norm over all leaves, float32."""
    return optax.global_norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients))


class Bfloat16State(NamedTuple):
    """The number of updates, and both moments in bfloat16."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, and of checkpoints; a tuple has a method of it
    mu: Any
    nu: Any


def _bfloat16_adamw(settings: Optimizer) -> optax.GradientTransformation:
    """torch.optim.AdamW on bfloat16 tensors: each operation in float32, its result rounded to bfloat16."""

    def rounded(x):  # not a cast there and back, which XLA may drop
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def init(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), params)
        return Bfloat16State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(gradients, state, params):
        count = state.count + 1
        rate = settings.learning_rate_at(state.count)
        bias1 = 1 - settings.b1**count
        bias2 = jnp.sqrt(1 - settings.b2**count)

        def leaf(gradient, mu, nu, param, decays):
            gradient, mu, nu, param = (x.astype(jnp.float32) for x in (gradient, mu, nu, param))
            kept = rounded(param * (1 - rate * settings.weight_decay)) if decays and settings.weight_decay else param
            mu = rounded(mu + (1 - settings.b1) * (gradient - mu))
            nu = rounded(rounded(nu * settings.b2) + (1 - settings.b2) * gradient * gradient)
            denominator = rounded(rounded(rounded(jnp.sqrt(nu)) / bias2) + settings.epsilon)
            change = kept - param - rate / bias1 * (mu / denominator)
            return change, mu.astype(jnp.bfloat16), nu.astype(jnp.bfloat16)

        found = jax.tree.map(leaf, gradients, state.mu, state.nu, params, decayed(params))
        changes, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), found)
        return changes, Bfloat16State(count, mu, nu)

    return optax.GradientTransformation(init, update)
