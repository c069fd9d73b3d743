"""AdamW with linear decay, equal to transformers.Trainer with torch.optim.AdamW, in three precisions.

float32: weights, moments and arithmetic. bfloat16: weights and moments; steps are computed in float32 and rounded
stochastically, so that on average no update is lost. release: PyTorch's arithmetic on bfloat16 tensors, which rounds
after every operation, to reproduce the released code; at a learning rate of 1e-5 most of its updates round to zero.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unidetox_jax import sharding
from unidetox_jax.training import rounding

PRECISIONS = ("float32", "bfloat16", "release")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["learning_rate", "steps", "warmup_steps"],
    meta_fields=["decay", "weight_decay", "clip_norm", "b1", "b2", "epsilon", "precision", "seed"],
)
@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW's settings; a pytree whose leaves are the schedule's numbers, which programs take as arguments.

    learning_rate: the peak: it rises linearly from 0 over `warmup_steps`, then falls linearly to 0 at `steps`, or stays
      constant without `decay`.
    weight_decay: on matrices and embeddings, not on biases and norms.
    clip_norm: maximum global gradient norm; 0 switches clipping off.
    precision: one of PRECISIONS. seed: of stochastic rounding.
    """

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    decay: bool = True
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    precision: str = "float32"
    seed: int = 0

    @property
    def static(self) -> "Optimizer":
        """Equal for all settings that share a compiled program."""
        seed = self.seed if self.precision == "bfloat16" else 0  # unused in the other precisions
        return dataclasses.replace(self, learning_rate=0.0, steps=1, warmup_steps=0, seed=seed)

    @property
    def param_dtype(self) -> str:
        """The dtype of the weights."""
        return "float32" if self.precision == "float32" else "bfloat16"

    @property
    def gradient_dtype(self) -> str:
        """The dtype of gradients in the update."""
        return "bfloat16" if self.precision == "release" else "float32"

    @property
    def compute_dtype(self) -> str | None:
        """The dtype that the model computes in; None: its configuration's."""
        return "bfloat16" if self.precision == "release" else None

    def learning_rate_at(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of update `step`, counted from 0; float32."""
        step = jnp.asarray(step, jnp.float32)
        # By reciprocals, as XLA divides by constants, so that results do not depend on whether these are arguments
        rising = step * (1.0 / jnp.maximum(1, self.warmup_steps))
        falling = (self.steps - step) * (1.0 / jnp.maximum(1, self.steps - self.warmup_steps))
        warms_up = step < self.warmup_steps
        return self.learning_rate * jnp.where(warms_up, rising, jnp.maximum(falling, 0.0) if self.decay else 1.0)


def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule, for use with `optax.apply_updates`; its state mirrors the parameters."""
    transforms = [_clip(settings.clip_norm)] if settings.clip_norm else []
    if settings.precision != "float32":
        return optax.chain(*transforms, _bfloat16_adamw(settings))
    transforms.append(optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon))
    if settings.weight_decay:
        transforms.append(optax.add_decayed_weights(settings.weight_decay, mask=decay_mask))
    return optax.chain(*transforms, optax.scale_by_learning_rate(settings.learning_rate_at))


def decay_mask(params: Any) -> Any:
    """Which leaves decay, as in transformers.Trainer: all but biases and norms."""

    def decays(path, leaf):
        return sharding.path_string(path).rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def _clip(norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: scales by norm / (global norm + 1e-6) if that is less than 1."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda update: (update * scale).astype(update.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(gradients: Any) -> jax.Array:
    """The norm over all leaves, computed in float32."""
    return optax.global_norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients))


class Bfloat16State(NamedTuple):
    """The number of updates, and both moments in bfloat16."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, used in checkpoints; shadows a method of tuple
    mu: Any
    nu: Any


def _bfloat16_adamw(settings: Optimizer) -> optax.GradientTransformation:
    """AdamW with bfloat16 weights and moments."""
    step = _release_step if settings.precision == "release" else _stochastic_step

    def init(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), params)
        return Bfloat16State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(gradients, state, params):
        def leaf(path, *arrays):
            return step(settings, state.count, sharding.path_string(path), *arrays)

        triples = jax.tree_util.tree_map_with_path(leaf, gradients, state.mu, state.nu, params, decay_mask(params))
        changes, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), triples)
        return changes, Bfloat16State(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def _release_step(settings: Optimizer, count, path, gradient, mu, nu, param, decays):
    """A leaf's change and moments as by torch.optim.AdamW on bfloat16 tensors: float32 operations, each rounded."""

    def rounded(x):  # XLA may remove a cast to bfloat16 and back
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    rate = settings.learning_rate_at(count)
    bias1 = 1 - settings.b1 ** (count + 1)
    bias2 = jnp.sqrt(1 - settings.b2 ** (count + 1))
    gradient, mu, nu, param = (x.astype(jnp.float32) for x in (gradient, mu, nu, param))
    shrunk = rounded(param * (1 - rate * settings.weight_decay)) if decays and settings.weight_decay else param
    mu = rounded(mu + (1 - settings.b1) * (gradient - mu))
    nu = rounded(rounded(nu * settings.b2) + (1 - settings.b2) * gradient * gradient)
    denominator = rounded(rounded(rounded(jnp.sqrt(nu)) / bias2) + settings.epsilon)
    change = shrunk - param - rate / bias1 * (mu / denominator)
    return change, mu.astype(jnp.bfloat16), nu.astype(jnp.bfloat16)


def _stochastic_step(settings: Optimizer, count, path, gradient, mu, nu, param, decays):
    """A leaf's change and moments, computed in float32 and rounded stochastically; param + change is a bfloat16 number.

    Rounded to nearest, the second moment would never change with b2 = 0.999.
    """
    rate = settings.learning_rate_at(count)
    mu = settings.b1 * mu.astype(jnp.float32) + (1 - settings.b1) * gradient
    nu = settings.b2 * nu.astype(jnp.float32) + (1 - settings.b2) * gradient * gradient
    direction = mu / (1 - settings.b1 ** (count + 1))
    direction /= jnp.sqrt(nu / (1 - settings.b2 ** (count + 1))) + settings.epsilon
    if decays and settings.weight_decay:
        direction += settings.weight_decay * param.astype(jnp.float32)
    for_param, for_moments = rounding.random_bits(settings.seed, count, path, param.shape)
    updated = rounding.add(param, -rate * direction, for_param)
    change = updated.astype(jnp.float32) - param.astype(jnp.float32)
    return change, rounding.to_bfloat16(mu, for_moments), rounding.to_bfloat16(nu, for_moments >> 16)
