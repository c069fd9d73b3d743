"""Language-modelling loss: float32, masked, never the logits of a whole batch at once.

The head runs over pieces of the positions. A piece's gradient is made in the forward pass, while its logits are at
hand, so nothing of the vocabulary's size is stored or computed twice (the head is a third of GPT-2 small's work); the
backward pass only scales it.

Axes: B rows, T tokens, P positions of a piece, V vocabulary, D width of what meets the head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax import models, sharding
from unidetox_jax.models import ModelConfig
from unidetox_jax.models.attention import soft_capped
from unidetox_jax.models.layers import precision

LOGITS_BYTES = 1 << 27  # float32 logits held at once, per device

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
      params: the model's, or what `models.prepare` made of them.
      batch: {"tokens": int32 [B,T], "loss_mask": bool or int [B,T], 1 for targets} and, where a row holds several
        texts, {"segment_ids": int32 [B,T]}. A row's first token is never a target. Padding stands on the right.
      dropout_key: None switches dropout off.
      remat: what the backward pass computes again: "none", "dots" (all but matrix products), "full".

    Returns:
      The mean, float32, 0 where there is no target; {"total": the sum, "targets": their number}, float32.
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
    """The sum over targets and their number, float32; the arguments are those of `loss`."""
    hidden, matrix, targets, mask = _before_head(params, batch, cfg, dropout_key, remat)
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
    """Each target's loss, float32 [B,T] at the position before it, 0 elsewhere; the arguments are those of `loss`. Its
    derivative makes the logits once more, a piece at a time."""
    hidden, matrix, targets, mask = _before_head(params, batch, cfg, dropout_key, remat)

    @jax.checkpoint
    def losses(hidden, targets, mask):
        return _losses(*_log_softmax(hidden, matrix, targets, precision(cfg.dtype), cfg.logit_cap), mask)

    arrays = (hidden, targets, mask)
    return _over_pieces(lambda carry, piece: (carry, losses(*piece)), None, arrays, matrix.shape[0])[1]


def _before_head(params, batch: Batch, cfg: ModelConfig, dropout_key, remat: str):
    """What meets the head [B,T,D], the head [V,D], the targets int32 [B,T] and which of them count, bool [B,T]."""
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
    """Which positions predict a target, bool [B,T]: the mask one to the left, without a row's last position."""
    return jnp.pad(batch["loss_mask"][:, 1:].astype(bool), ((0, 0), (0, 1)))


def _gather(path, leaf: jax.Array) -> jax.Array:
    """A table of embeddings whole over `fsdp`: looked up by a split batch, a split width costs the compiler more."""
    name = sharding.path_string(path)
    if not name.endswith("embedding"):
        return leaf
    return sharding.constrain(leaf, "model" if name.startswith("tokens") else None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _head_loss(hidden, matrix, targets, mask, precision, cap) -> jax.Array:
    """Summed -log softmax(hidden · matrixᵀ)[targets] where mask, the logits capped softly at `cap` unless that is None;
    hidden [B,T,D], matrix [V,D] -> float32."""

    def add(total, piece):
        hidden, targets, mask = piece
        logits, normalizer, chosen = _log_softmax(hidden, matrix, targets, precision, cap)
        return total + _sum_losses(logits, normalizer, chosen, mask), None

    total, _ = _over_pieces(add, jnp.zeros((), jnp.float32), (hidden, targets, mask), matrix.shape[0])
    return total


def _forward(hidden, matrix, targets, mask, precision, cap):
    def add(carry, piece):
        total, matrix_gradient = carry
        hidden, targets, mask = piece
        logits, normalizer, chosen = _log_softmax(hidden, matrix, targets, precision, cap)
        total += _sum_losses(logits, normalizer, chosen, mask)
        gradient = jnp.where(mask[..., None], jnp.exp(logits - normalizer[..., None]) - chosen.astype(jnp.float32), 0.0)
        if cap is not None:  # the derivative of cap · tanh(z / cap)
            gradient *= 1.0 - (logits / cap) ** 2
        gradient = gradient.astype(hidden.dtype)
        product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        matrix_gradient += sharding.constrain(product("bpv,bpd->vd", gradient, hidden), "model", "fsdp")
        hidden_gradient = product("bpv,vd->bpd", gradient, matrix)
        return (total, matrix_gradient), sharding.constrain_batch(hidden_gradient, None, None)

    zeros = sharding.constrain(jnp.zeros(matrix.shape, jnp.float32), "model", "fsdp")
    carry = (jnp.zeros((), jnp.float32), zeros)
    (total, matrix_gradient), hidden_gradient = _over_pieces(add, carry, (hidden, targets, mask), matrix.shape[0])
    return total, (hidden_gradient, matrix_gradient, jnp.zeros((0,), hidden.dtype))


def _backward(precision, cap, gradients, cotangent):
    hidden_gradient, matrix_gradient, like = gradients
    scale = functools.partial(jnp.multiply, cotangent)
    return scale(hidden_gradient).astype(like.dtype), scale(matrix_gradient).astype(like.dtype), None, None


_head_loss.defvjp(_forward, _backward)


def _log_softmax(hidden, matrix, targets, precision, cap) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits float32 [B,P,V], their logsumexp [B,P], and which are the targets', bool [B,P,V]: by comparison, not by
    indexing, since the vocabulary may be split over devices."""
    logits = jnp.einsum("bpd,vd->bpv", hidden, matrix, precision=precision, preferred_element_type=jnp.float32)
    logits = soft_capped(sharding.constrain_batch(logits, None, "model"), cap)
    return logits, jax.nn.logsumexp(logits, axis=-1), jnp.arange(logits.shape[-1])[None, None] == targets[..., None]


def _losses(logits, normalizer, chosen, mask) -> jax.Array:
    values = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return jnp.where(mask, normalizer - values, 0.0)


def _sum_losses(logits, normalizer, chosen, mask) -> jax.Array:
    return jnp.sum(_losses(logits, normalizer, chosen, mask))


def _over_pieces(add, carry, arrays, vocabulary: int):
    """Scans add(carry, piece) -> (carry, out [B,P,…] or None) over pieces [B,P,…] of the arrays [B,T,…]."""
    rows, length = arrays[0].shape[:2]
    pieces = _num_pieces(rows, length, vocabulary)
    if pieces == 1:
        return add(carry, arrays)
    size = -(-length // pieces)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, pieces, size, *x.shape[2:]), 1, 0)

    carry, out = jax.lax.scan(add, carry, jax.tree.map(split, arrays))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, pieces * size, *x.shape[3:])[:, :length]  # noqa: E731
    return carry, jax.tree.map(join, out)


def _num_pieces(rows: int, length: int, vocabulary: int) -> int:
    """How many pieces keep a device's share of the logits below LOGITS_BYTES."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape.get(axis, 1) for axis in sharding.BATCH)
    rows = rows // ways if rows % ways == 0 else rows
    ways = mesh.shape.get("model", 1)
    vocabulary = vocabulary // ways if vocabulary % ways == 0 else vocabulary
    size = max(1, LOGITS_BYTES // (rows * vocabulary * 4))
    return -(-length // size)
