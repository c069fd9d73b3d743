"""One optimizer step as one compiled, sharded program that donates its state.

It can be lowered from `abstract_state` and an abstract batch, also for devices that are not here. Derivatives are with
respect to the weights in the compute dtype, without a copy of the weights in it (`models.casting`). Layers are always
scanned: unrolled, a step of GPT-2 small on two CPU cores took 6 to 13 % more processor time, and compilation three
times as long.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.models import ModelConfig, casting
from unidetox_jax.training.criterion import LANGUAGE_MODELLING, Criterion
from unidetox_jax.training.loss import target_mask, total_loss
from unidetox_jax.training.optimizer import Optimizer, global_norm, make_optimizer


class TrainState(NamedTuple):
    """What a step updates. step: int32, updates so far; params: in `Optimizer.param_dtype`."""

    step: Any
    params: Any
    opt_state: Any


Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def init_state(params: Any, optimizer: Optimizer) -> TrainState:
    """The state before the first step, on the parameters' mesh. The first step donates the parameters' memory."""
    mesh = sharding.mesh_of(params) or sharding.single_device_mesh()
    shardings = sharding.param_shardings(params, mesh)
    params = jax.tree.map(
        lambda leaf, place: jax.device_put(jnp.asarray(leaf, optimizer.param_dtype), place), params, shardings
    )
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, params, _init_optimizer(params, optimizer.static, mesh))


@functools.partial(jax.jit, static_argnames=("optimizer", "mesh"))
def _init_optimizer(params: Any, optimizer: Optimizer, mesh: Mesh) -> Any:
    state = make_optimizer(optimizer).init(params)
    return jax.lax.with_sharding_constraint(state, sharding.param_shardings(state, mesh))


def abstract_state(
    cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None, criterion: Criterion = LANGUAGE_MODELLING
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; mesh None: the first device."""
    mesh = mesh or sharding.single_device_mesh()
    params = criterion.abstract(cfg, optimizer.param_dtype)
    opt_state = jax.eval_shape(make_optimizer(optimizer).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    shardings = TrainState(
        sharding.replicated(mesh), sharding.param_shardings(params, mesh), sharding.param_shardings(opt_state, mesh)
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted, lowered or compiled step with its optimizer and seed bound; other attributes are the program's.

    Called or lowered with a state, a batch and, if the criterion has any, the frozen weights.
    """

    program: Any
    optimizer: Optimizer
    dropout_seed: Any  # int32 or None

    def __call__(self, *arguments: Any) -> tuple[TrainState, Metrics]:
        return self.program(self.optimizer, self.dropout_seed, *arguments)

    def lower(self, *arguments: Any) -> "TrainStep":
        """Lowered for arguments of these shapes, which may be abstract."""
        lowered = self.program.lower(self.optimizer, self.dropout_seed, *arguments)
        return dataclasses.replace(self, program=lowered)

    def compile(self, **options: Any) -> "TrainStep":
        """Compiled, after `lower`."""
        return dataclasses.replace(self, program=self.program.compile(**options))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.program, name)


def make_train_step(
    cfg: ModelConfig,
    optimizer: Optimizer,
    mesh: Mesh | None = None,
    *,
    accumulation: int = 1,
    remat: str = "none",
    dropout_seed: int | None = None,
    criterion: Criterion = LANGUAGE_MODELLING,
) -> TrainStep:
    """A jitted step(state, batch) -> (state, metrics) that donates the state.

    Steps that differ only in the learning rate, its schedule or the dropout seed share one program. With `cfg.lora` the
    state's parameters are the adapter (`models.lora`) and the model's frozen parameters are a third argument, as for
    any criterion with a base.

    Args:
      cfg: its dtype is the compute dtype (bfloat16 in precision "release").
      mesh: None is the first device.
      accumulation: microbatches that the rows are split into; the loss is the mean over all targets. Rows must be a
        multiple of it times the mesh's batch axes.
      remat: what the backward pass recomputes: "none", "dots", "full".
      dropout_seed: a step's noise depends only on it and on the step's number; None: no dropout.
      criterion: the loss and the parameters that are trained.

    The batch is as in `loss`, with rows over the mesh's batch axes. Metrics are float32 scalars: "loss" (by default in
    nats per target), "grad_norm" (before clipping), "learning_rate", "targets".
    """
    cfg = dataclasses.replace(cfg, layer_loop="scan", dtype=optimizer.compute_dtype or cfg.dtype)
    mesh = mesh or sharding.single_device_mesh()
    program = _program(cfg, optimizer.static, mesh, accumulation, remat, criterion)
    seed = None if dropout_seed is None else np.asarray(dropout_seed).astype(np.int32)[()]
    return TrainStep(program, dataclasses.replace(optimizer, seed=optimizer.static.seed), seed)


@functools.cache
def _program(
    cfg: ModelConfig, static: Optimizer, mesh: Mesh, accumulation: int, remat: str, criterion: Criterion
) -> jax.stages.Wrapped:
    """The jitted step(optimizer, dropout_seed, state, batch[, base]) of optimizers with these static settings."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, static, mesh, criterion))
    numbers = sharding.replicated(mesh)
    frozen = (None,) if criterion.has_base(cfg) else ()  # any sharding

    @functools.partial(
        jax.jit,
        donate_argnums=2,
        in_shardings=(numbers, numbers, state_shardings, sharding.batch_sharding(mesh), *frozen),
        out_shardings=(state_shardings, numbers),
    )
    def step(
        optimizer: Optimizer, dropout_seed: Any, state: TrainState, batch: Batch, base: Any = None
    ) -> tuple[TrainState, Metrics]:
        transformation = make_optimizer(optimizer)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            key = None
            if dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
            loss, targets, gradients = _gradients(criterion, state.params, base, batch, cfg, accumulation, key, remat)
            gradients = jax.tree.map(lambda leaf: leaf.astype(optimizer.gradient_dtype), gradients)
            gradients = jax.lax.with_sharding_constraint(gradients, state_shardings.params)
            with jax.numpy_dtype_promotion("standard"):  # optax needs it; user code may have set another
                updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": global_norm(gradients),
            "learning_rate": optimizer.learning_rate_at(state.step),
            "targets": targets,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


@functools.cache
def make_eval_step(cfg: ModelConfig, mesh: Mesh | None = None) -> Callable[[Any, Batch], Metrics]:
    """A jitted (params, batch) -> {"total": summed nats, "targets": their number}, float32, without dropout."""
    mesh = mesh or sharding.single_device_mesh()
    cfg = dataclasses.replace(cfg, layer_loop="scan")

    @functools.partial(
        jax.jit,
        in_shardings=(None, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
    def step(params: Any, batch: Batch) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            total, targets = total_loss(models.prepare(params, cfg), batch, cfg)
        return {"total": total, "targets": targets}

    return step


def _gradients(criterion: Criterion, params, base, batch: Batch, cfg: ModelConfig, accumulation: int, key, remat: str):
    """The batch's mean loss, its number of targets, and the gradients: in the compute dtype, or in float32 if they are
    accumulated."""
    targets = target_mask(batch).sum(dtype=jnp.float32)
    count = criterion.count(batch, targets)
    placeholders = casting.placeholders(params, cfg)
    frozen = None if base is None else models.prepare(base, cfg)

    def mean(placeholders, batch, key):
        total = criterion.total(casting.defer(params, placeholders), frozen, batch, cfg, dropout_key=key, remat=remat)
        return total / jnp.maximum(count, 1.0)

    if accumulation == 1:
        loss, gradients = jax.value_and_grad(mean)(placeholders, batch, key)
        return loss, targets, gradients

    def add(carry, inputs):
        microbatch, index = inputs
        microbatch_key = None if key is None else jax.random.fold_in(key, index)
        loss, gradients = jax.value_and_grad(mean)(placeholders, microbatch, microbatch_key)
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    inputs = jax.tree.map(functools.partial(_microbatches, number=accumulation), batch), jnp.arange(accumulation)
    (loss, gradients), _ = jax.lax.scan(add, (jnp.zeros((), jnp.float32), zeros), inputs)
    return loss, targets, gradients


def _microbatches(rows: jax.Array, number: int) -> jax.Array:
    """[R,T] -> [number, R/number, T]: every number-th row, so that each device keeps its own rows."""
    if rows.shape[0] % number:
        raise ValueError(f"a batch of {rows.shape[0]} rows cannot be computed in {number} parts")
    split = rows.reshape(rows.shape[0] // number, number, *rows.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(split, None, sharding.BATCH, *(None,) * (rows.ndim - 1))
