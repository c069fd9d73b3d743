"""The parts that families share, as Linen modules: attention's projections, feed-forward layers, norms.

A block receives attention as a function `attend(query, key, value, dropout) -> (output, state)`, so the same block
trains, prefills and decodes; `state` is what the caller keeps of keys and values, passed through untouched.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.rotary import rotate
from unidetox_jax.recipe import Lora
from unidetox_jax.sharding import constrain_batch

Attend = Callable[..., tuple[jax.Array, Any]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def precision(dtype: str) -> str | None:
    """float32 means float32: accelerators would otherwise multiply in bfloat16 or TF32."""
    return "highest" if dtype == "float32" else None


class Dense(nn.DenseGeneral):
    """A linear layer and, where its parameters hold one, a low-rank adapter: x W + scale · (dropout(x) A) B.

    lora_a [*in, rank], lora_b [rank, *out], beside the kernel; `models.lora` puts them there.
    """

    lora: Lora = Lora()

    def __call__(self, inputs):
        """[..., *in] -> [..., *out]."""
        out = super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        x, a, b = (
            jnp.asarray(leaf, self.dtype)
            for leaf in (inputs, self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b"))
        )
        if self.lora.dropout and self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora.dropout), 0)
        x = jnp.tensordot(x, a, axes=a.ndim - 1, precision=self.precision)
        return out + jnp.tensordot(x, b, axes=1, precision=self.precision) * self.lora.scale


def dense(cfg: ModelConfig, features, name: str, bias: bool, axis=-1, stddev: float | None = None) -> nn.Module:
    """A linear layer in the compute dtype; kernel [*in, *out], bias [*out]."""
    return Dense(
        features,
        axis=axis,
        use_bias=bias,
        dtype=cfg.dtype,
        precision=precision(cfg.dtype),
        kernel_init=nn.initializers.normal(stddev or cfg.initializer_range),
        lora=cfg.lora,
        name=name,
    )


def layer_norm(cfg: ModelConfig, name: str, affine: bool = True) -> nn.Module:
    """Layer norm; statistics in float32, by the two-pass variance that PyTorch uses."""
    return nn.LayerNorm(
        cfg.norm_epsilon,
        dtype=cfg.dtype,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        name=name,
    )


def rms_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """Root-mean-square norm (Zhang and Sennrich 2019)."""
    return nn.RMSNorm(cfg.norm_epsilon, dtype=cfg.dtype, use_fast_variance=False, name=name)


def rms_norm_of_heads(cfg: ModelConfig, name: str) -> nn.Module:
    """As `rms_norm`, over all heads together: the last two axes."""
    axes = (-2, -1)
    return nn.RMSNorm(
        cfg.norm_epsilon, dtype=cfg.dtype, use_fast_variance=False, reduction_axes=axes, feature_axes=axes, name=name
    )


class OffsetRMSNorm(nn.Module):
    """Root-mean-square norm whose weights are stored less 1, as Gemma's are."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.cfg.norm_epsilon)
        return (x * (1.0 + scale.astype(jnp.float32))).astype(self.cfg.dtype)


def offset_rms_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """As `rms_norm`, of Gemma."""
    return OffsetRMSNorm(cfg, name=name)


def embedding(cfg: ModelConfig, entries: int, width: int, name: str) -> nn.Module:
    """A table [entries, width], read in the compute dtype."""
    init = nn.initializers.normal(cfg.initializer_range)
    return nn.Embed(entries, width, dtype=cfg.dtype, embedding_init=init, name=name)


FUSED = "query_key_value"


def fuse_attention(block: Any) -> Any:
    """A layer's parameters (or all layers', stacked) with the kernels of queries, keys and values as one, which
    `Attention` takes as well: one matrix product in place of three."""
    attention = dict(block["attention"])
    parts = [attention.pop(name) for name in ("query", "key", "value")]
    attention[FUSED] = {name: jnp.concatenate([part[name] for part in parts], axis=-2) for name in parts[0]}
    return {**block, "attention": attention}


class Attention(nn.Module):
    """Projections around `attend`. x [B,T,hidden] -> ([B,T,hidden], state)."""

    cfg: ModelConfig
    bias: bool
    output_bias: bool
    output_stddev: float | None = None
    dropout_rate: float = 0.0
    norm: Callable[[ModelConfig, str], nn.Module] | None = None  # of queries and keys, before they are rotated

    @nn.compact
    def __call__(self, x, attend: Attend, rotary, scale, deterministic: bool):
        cfg = self.cfg
        heads = {"query": cfg.num_heads, "key": cfg.num_kv_heads, "value": cfg.num_kv_heads}
        if self.has_variable("params", FUSED):
            together = dense(cfg, (sum(heads.values()), cfg.head_size), FUSED, self.bias)(x)
            query, key, value = jnp.split(together, [cfg.num_heads, cfg.num_heads + cfg.num_kv_heads], axis=-2)
        else:
            query, key, value = (
                dense(cfg, (count, cfg.head_size), name, self.bias)(x) for name, count in heads.items()
            )
        if self.norm is not None:
            query, key = self.norm(cfg, "query_norm")(query), self.norm(cfg, "key_norm")(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        query = constrain_batch(query * jnp.asarray(scale, query.dtype), None, "model", None)
        dropout = None
        if self.dropout_rate and not deterministic:
            dropout = (self.make_rng("dropout"), self.dropout_rate)
        out, state = attend(query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), dropout)
        project = dense(cfg, cfg.hidden_size, "output", self.output_bias, (-2, -1), self.output_stddev)
        return project(out), state


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where gated. [B,T,hidden] -> [B,T,hidden]."""

    cfg: ModelConfig
    bias: bool
    gated: bool = False
    output_stddev: float | None = None

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        activation = ACTIVATIONS[cfg.activation]
        hidden = dense(cfg, cfg.intermediate_size, "up", self.bias)(x)
        if self.gated:
            hidden = activation(dense(cfg, cfg.intermediate_size, "gate", self.bias)(x)) * hidden
        else:
            hidden = activation(hidden)
        hidden = constrain_batch(hidden, None, "model")
        return dense(cfg, cfg.hidden_size, "down", self.bias, stddev=self.output_stddev)(hidden)


class Head(nn.Module):
    """The output matrix [V, width] of a model whose head is not tied to its embedding; used by `transformer.head`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        return self.param("embedding", init, (cfg.vocab_size, cfg.embedding_size), jnp.float32)
