"""Linen modules that families share: embeddings, attention projections, feed-forward layers, norms.

A block receives attention as a function `attend(query, key, value, dropout) -> (output, state)`, so that the same block
trains, prefills and decodes. `state` belongs to the caller (a cache, say); blocks pass it through.
"""

from collections.abc import Callable, Sequence
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
    """Matmul precision: accelerators would otherwise multiply float32 matrices in bfloat16 or TF32."""
    return "highest" if dtype == "float32" else None


PROJECTIONS = ("query", "key", "value")
FUSED = "query_key_value"
TRANSPOSED = "transposed_kernel"


def weights_first(weights: jax.Array, x: jax.Array, axes: int, precision, dtype=None) -> jax.Array:
    """x Wᵀ computed as (W xᵀ)ᵀ: weights [*out, *in], x [..., *in], `axes` of which are *in -> [..., *out].

    XLA's CPU library copies the right operand of a product into its own layout, in every step: in x Wᵀ all weights,
    here the activations, which are smaller as long as there are few rows. The barriers keep XLA from turning one into
    the other. dtype: of the result.
    """
    x = jax.lax.optimization_barrier(jnp.moveaxis(x, range(-axes, 0), range(axes)))
    out = jnp.tensordot(weights, x, axes, precision=precision, preferred_element_type=dtype)
    outputs = weights.ndim - axes
    return jnp.moveaxis(jax.lax.optimization_barrier(out), range(outputs), range(-outputs, 0))


class Dense(nn.DenseGeneral):
    """A linear layer, plus a low-rank adapter if its parameters hold one: x W + scale · (dropout(x) A) B.

    lora_a [*in, rank] and lora_b [rank, *out] lie beside the kernel, where `models.lora` puts them.
    """

    lora: Lora = Lora()

    def __call__(self, inputs):
        """[..., *in] -> [..., *out]."""
        out = self._transposed(inputs) if self.has_variable("params", TRANSPOSED) else super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        x, a, b = (
            jnp.asarray(leaf, self.dtype)
            for leaf in (inputs, self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b"))
        )
        if self.lora.dropout and self.has_rng("dropout"):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.lora.dropout), 0)
        x = jnp.tensordot(x, a, axes=a.ndim - 1, precision=self.precision)
        return out + jnp.tensordot(x, b, axes=1, precision=self.precision) * self.lora.scale

    def _transposed(self, inputs):
        kernel = jnp.asarray(self.get_variable("params", TRANSPOSED), self.dtype)
        axes = len(self.axis) if isinstance(self.axis, Sequence) else 1
        out = weights_first(kernel, inputs.astype(self.dtype), axes, self.precision)
        if not self.use_bias:
            return out
        bias = jnp.asarray(self.get_variable("params", "bias"), self.dtype)
        return out + jnp.expand_dims(bias, range(out.ndim - bias.ndim))  # users may forbid to promote ranks


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
    """Layer norm; statistics in float32, with PyTorch's two-pass variance."""
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
    """RMS norm over all heads together, i.e. the last two axes."""
    axes = (-2, -1)
    return nn.RMSNorm(
        cfg.norm_epsilon, dtype=cfg.dtype, use_fast_variance=False, reduction_axes=axes, feature_axes=axes, name=name
    )


class OffsetRMSNorm(nn.Module):
    """RMS norm with a scale of 1 + weight, as in Gemma."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.cfg.norm_epsilon)
        scale = jnp.expand_dims(1.0 + scale.astype(jnp.float32), range(x.ndim - 1))
        return (x * scale).astype(self.cfg.dtype)


def offset_rms_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """Gemma's norm."""
    return OffsetRMSNorm(cfg, name=name)


def embedding(cfg: ModelConfig, entries: int, width: int, name: str) -> nn.Module:
    """An embedding table [entries, width]; lookups are in the compute dtype."""
    init = nn.initializers.normal(cfg.initializer_range)
    return nn.Embed(entries, width, dtype=cfg.dtype, embedding_init=init, name=name)


class Embed(nn.Module):
    """Token embeddings: tokens int32 [B,T] -> [B,T,hidden]; for families whose positions enter in attention."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        x = embedding(self.cfg, self.cfg.vocab_size, self.cfg.hidden_size, "tokens")(tokens)
        return nn.Dropout(self.cfg.embedding_dropout)(x, deterministic=deterministic)


class Final(nn.Module):
    """The final norm, [B,T,hidden] -> [B,T,hidden]; also holds the head's matrix unless that is tied."""

    cfg: ModelConfig
    norm: Callable[[ModelConfig, str], nn.Module] = layer_norm

    @nn.compact
    def __call__(self, x):
        if not self.cfg.tie_word_embeddings:
            Head(self.cfg, name="head")()
        return self.norm(self.cfg, "norm")(x)


def transpose_kernels(tree: Any, name: str = "") -> Any:
    """A layer's parameters (or all layers', stacked) with kernels [*in, *out] as [*out, *in]; `Dense` accepts both.

    name: of the module whose parameters these are.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {child: transpose_kernels(leaf, child) for child, leaf in tree.items()}
    if "kernel" in tree:  # `Attention` has kernels with two axes of outputs, or of inputs; all others have one of each
        inputs = 2 if name == "output" else 1
        outputs = 2 if name in (*PROJECTIONS, FUSED) else 1
        axes = range(-outputs, 0), range(-inputs - outputs, -inputs)
        tree[TRANSPOSED] = jax.tree.map(lambda kernel: jnp.moveaxis(kernel, *axes), tree.pop("kernel"))
    return tree


def fuse_attention(block: Any) -> Any:
    """A layer's parameters (or all layers', stacked) with the query, key and value projections fused into one matrix.

    `Attention` accepts both forms.
    """
    attention = dict(block["attention"])
    projections = [attention.pop(name) for name in PROJECTIONS]
    attention[FUSED] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-2), *projections)
    return {**block, "attention": attention}


class Attention(nn.Module):
    """The projections around `attend`: x [B,T,hidden] -> ([B,T,hidden], state)."""

    cfg: ModelConfig
    bias: bool
    output_bias: bool
    output_stddev: float | None = None
    dropout_rate: float = 0.0
    norm: Callable[[ModelConfig, str], nn.Module] | None = None  # of queries and keys, before rotation

    @nn.compact
    def __call__(self, x, attend: Attend, rotary, scale, deterministic: bool):
        cfg = self.cfg
        heads = {"query": cfg.num_heads, "key": cfg.num_kv_heads, "value": cfg.num_kv_heads}
        if self.has_variable("params", FUSED):
            fused = dense(cfg, (sum(heads.values()), cfg.head_size), FUSED, self.bias)(x)
            query, key, value = jnp.split(fused, [cfg.num_heads, cfg.num_heads + cfg.num_kv_heads], axis=-2)
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
    """down(activation(up(x))), or if gated down(activation(gate(x)) * up(x)); [B,T,hidden] -> [B,T,hidden]."""

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
    """The output matrix [V, width] of a model whose head is not tied; `parameters.head` reads it."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        return self.param("embedding", init, (cfg.vocab_size, cfg.embedding_size), jnp.float32)
