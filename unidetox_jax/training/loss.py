"""Language-modelling loss: float32, masked, without ever holding the logits of a whole batch.

The head runs over chunks of positions. A chunk's gradient is computed in the forward pass from its logits, so that
logits are neither stored nor computed twice (the head is a third of GPT-2 small's FLOPs); the backward pass scales it.

Axes: B rows, T tokens, P positions of a chunk, V vocabulary, D width of the head's input.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax import models, sharding
from unidetox_jax.models import ModelConfig
from unidetox_jax.models.attention import soft_cap
from unidetox_jax.models.layers import precision

LOGITS_BYTES = 1 << 27  # maximum size of the float32 logits held at once, per device

Batch = dict[str, jax.Array]


def loss(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    *,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood of the targets, in nats.

    Args:
      params: the model's, prepared (`models.prepare`) or not.
      batch: {"tokens": int32 [B,T], "loss_mask": bool or int [B,T], 1 for targets} and, if rows hold several texts,
        {"segment_ids": int32 [B,T]}. A row's first token is never a target. Padding is on the right.
      dropout_key: None switches dropout off.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".

    Returns:
      The mean, float32, 0 without targets; {"total": the sum, "targets": their number}, float32.
    """
    total, targets = total_loss(params, batch, cfg, dropout_key=dropout_key, remat=remat)
    return total / jnp.maximum(targets, 1.0), {"total": total, "targets": targets}


def total_loss(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    *,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """The sum over targets and their number, float32; arguments as in `loss`."""
    hidden, matrix, targets, mask = _head_inputs(params, batch, cfg, dropout_key, remat)
    total = _head_loss(hidden, matrix, targets, mask, precision(cfg.dtype), cfg.logit_cap)
    return total, mask.sum(dtype=jnp.float32)


def target_losses(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    *,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> jax.Array:
    """Each target's loss, float32 [B,T] at the position before it, 0 elsewhere; arguments as in `loss`.

    Its derivative recomputes the logits chunk by chunk.
    """
    hidden, matrix, targets, mask = _head_inputs(params, batch, cfg, dropout_key, remat)

    @jax.checkpoint
    def losses(hidden, targets, mask):
        return _losses(*_log_softmax(hidden, matrix, targets, precision(cfg.dtype), cfg.logit_cap), mask)

    arrays = (hidden, targets, mask)
    return _over_chunks(lambda carry, chunk: (carry, losses(*chunk)), None, arrays, matrix.shape[0])[1]


def _head_inputs(params, batch: Batch, cfg: ModelConfig, dropout_key, remat: str):
    """The head's input [B,T,D], the head [V,D], the targets int32 [B,T] and their mask, bool [B,T]."""
    params = {**params, "embed": jax.tree_util.tree_map_with_path(_gather, params["embed"])}
    hidden = models.hidden_states(
        params,
        batch["tokens"],
        cfg,
        segment_ids=batch.get("segment_ids"),
        dropout_key=dropout_key,
        remat=remat,
    )
    matrix = sharding.constrain(models.head(params, cfg).astype(cfg.dtype), "model", None)
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    return hidden, matrix, targets, target_mask(batch)


def target_mask(batch: Batch) -> jax.Array:
    """Which positions predict a target, bool [B,T]: the loss mask shifted left by one."""
    return jnp.pad(batch["loss_mask"][:, 1:].astype(bool), ((0, 0), (0, 1)))


def _gather(path, leaf: jax.Array) -> jax.Array:
    """Gathers embedding tables over `fsdp`: with a sharded batch, lookups in tables of sharded width cost more."""
    name = sharding.path_string(path)
    if not name.endswith("embedding"):
        return leaf
    return sharding.constrain(leaf, "model" if name.startswith("tokens") else None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _head_loss(hidden, matrix, targets, mask, precision, cap) -> jax.Array:
    """Sum of -log softmax(hidden · matrixᵀ)[targets] over the mask, float32; hidden [B,T,D], matrix [V,D].

    cap: the logits' soft cap, or None.
    """

    def add(total, chunk):
        hidden, targets, mask = chunk
        logits, normalizer, is_target = _log_softmax(hidden, matrix, targets, precision, cap)
        return total + _sum_losses(logits, normalizer, is_target, mask), None

    total, _ = _over_chunks(add, jnp.zeros((), jnp.float32), (hidden, targets, mask), matrix.shape[0])
    return total


def _forward(hidden, matrix, targets, mask, precision, cap):
    def add(carry, chunk):
        total, matrix_gradient = carry
        hidden, targets, mask = chunk
        logits, normalizer, is_target = _log_softmax(hidden, matrix, targets, precision, cap)
        total += _sum_losses(logits, normalizer, is_target, mask)
        gradient = jnp.where(
            mask[..., None], jnp.exp(logits - normalizer[..., None]) - is_target.astype(jnp.float32), 0.0
        )
        if cap is not None:  # the derivative of cap · tanh(z / cap)
            gradient *= 1.0 - (logits / cap) ** 2
        gradient = gradient.astype(hidden.dtype)
        product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        matrix_gradient += sharding.constrain(product("bpv,bpd->vd", gradient, hidden), "model", "fsdp")
        hidden_gradient = product("bpv,vd->bpd", gradient, matrix)
        return (total, matrix_gradient), sharding.constrain_batch(hidden_gradient, None, None)

    zeros = sharding.constrain(jnp.zeros(matrix.shape, jnp.float32), "model", "fsdp")
    carry = (jnp.zeros((), jnp.float32), zeros)
    (total, matrix_gradient), hidden_gradient = _over_chunks(add, carry, (hidden, targets, mask), matrix.shape[0])
    return total, (hidden_gradient, matrix_gradient, jnp.zeros((0,), hidden.dtype))


def _backward(precision, cap, gradients, cotangent):
    hidden_gradient, matrix_gradient, like = gradients
    scale = functools.partial(jnp.multiply, cotangent)
    return scale(hidden_gradient).astype(like.dtype), scale(matrix_gradient).astype(like.dtype), None, None


_head_loss.defvjp(_forward, _backward)


def _log_softmax(hidden, matrix, targets, precision, cap) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits float32 [B,P,V], their logsumexp [B,P], and a one-hot mask of the targets, bool [B,P,V].

    A comparison, not an index, since the vocabulary may be split over devices.
    """
    logits = jnp.einsum("bpd,vd->bpv", hidden, matrix, precision=precision, preferred_element_type=jnp.float32)
    logits = soft_cap(sharding.constrain_batch(logits, None, "model"), cap)
    return logits, jax.nn.logsumexp(logits, axis=-1), jnp.arange(logits.shape[-1])[None, None] == targets[..., None]


def _losses(logits, normalizer, is_target, mask) -> jax.Array:
    values = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.where(mask, normalizer - values, 0.0)


def _sum_losses(logits, normalizer, is_target, mask) -> jax.Array:
    return jnp.sum(_losses(logits, normalizer, is_target, mask))


def _over_chunks(add, carry, arrays, vocabulary: int):
    """Scans add(carry, chunk) -> (carry, out [B,P,…] or None) over chunks [B,P,…] of the arrays [B,T,…]."""
    rows, length = arrays[0].shape[:2]
    chunks = _num_chunks(rows, length, vocabulary)
    if chunks == 1:
        return add(carry, arrays)
    size = -(-length // chunks)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size, *x.shape[3:])[:, :length]

    carry, out = jax.lax.scan(add, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)


def _num_chunks(rows: int, length: int, vocabulary: int) -> int:
    """How many chunks keep a device's share of the logits below LOGITS_BYTES."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in sharding.BATCH)
    rows = rows // shards if rows % shards == 0 else rows
    shards = mesh.shape.get("model", 1)
    vocabulary = vocabulary // shards if vocabulary % shards == 0 else vocabulary
    size = max(1, LOGITS_BYTES // (rows * vocabulary * 4))
    return -(-length // size)
