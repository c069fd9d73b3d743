"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, fused query-key-value weights.

Its linear layers are stored [in, out] (Conv1D), unlike those of all other families.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from unidetox_jax.models import layers
from unidetox_jax.models.config import ModelConfig, from_options, head_size, read_hf, to_options
from unidetox_jax.models.key_tables import Key, norm, reshaped, same
from unidetox_jax.models.layers import Attention, FeedForward, embedding, layer_norm

OPTIONS = {
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "activation",
    "layer_norm_epsilon": "norm_epsilon",
    "initializer_range": "initializer_range",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "residual_dropout",
    "scale_attn_by_inverse_layer_idx": "scale_by_layer",
    "scale_attn_weights": "scale_by_head_size",
}
CLASSES = ("GPT2",)
READ = (*OPTIONS, "reorder_and_upcast_attn")
OFF = ("add_cross_attention",)
PREFIX = "transformer."
IN_OUT = True  # linear layers are stored [in, out]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2's settings."""

    family: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    scale_by_layer: bool = False  # attention scores are also divided by the layer's number, from 1
    scale_by_head_size: bool = True


def from_hf(config: dict[str, Any], where: str) -> GPT2Config:
    """GPT2Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gpt2", where, READ, OFF)
    fields = from_options(hf, OPTIONS)
    fields["intermediate_size"] = hf.n_inner or 4 * hf.n_embd
    return GPT2Config(**fields, num_kv_heads=hf.n_head, head_size=head_size(hf, where), position_table=True)


def to_hf(cfg: GPT2Config) -> dict[str, Any]:
    """The Hugging Face config of a GPT2Config."""
    return to_options(cfg, OPTIONS)


class Embed(nn.Module):
    """Token and position embeddings: tokens, positions int32 [B,T] -> [B,T,hidden]."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        cfg = self.cfg
        x = embedding(cfg, cfg.vocab_size, cfg.hidden_size, "tokens")(tokens)
        x = x + embedding(cfg, cfg.max_position_embeddings, cfg.hidden_size, "positions")(positions)
        return nn.Dropout(cfg.embedding_dropout)(x, deterministic=deterministic)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        residual_stddev = cfg.initializer_range / math.sqrt(2 * cfg.num_layers)
        scale = cfg.head_size**-0.5 if cfg.scale_by_head_size else 1.0
        if cfg.scale_by_layer:
            scale = scale / jnp.asarray(layer + 1, jnp.float32)
        attention = Attention(cfg, True, True, residual_stddev, cfg.attention_dropout, name="attention")
        out, state = attention(layer_norm(cfg, "attention_norm")(x), attend, rotary, scale, deterministic)
        x = x + dropout(out)
        feed_forward = FeedForward(cfg, bias=True, output_stddev=residual_stddev, name="mlp")
        return x + dropout(feed_forward(layer_norm(cfg, "mlp_norm")(x))), state


Final = layers.Final


def key_table(cfg: GPT2Config) -> list[Key]:
    """Hugging Face's tensors and ours."""
    heads, size = cfg.num_heads, cfg.head_size
    fused = ("query", "key", "value")
    layer, block = "transformer.h.{layer}", "blocks"
    table = [
        same("transformer.wte.weight", "embed/tokens/embedding"),
        same("transformer.wpe.weight", "embed/positions/embedding"),
        *norm(f"{layer}.ln_1", f"{block}/attention_norm"),
        Key(
            f"{layer}.attn.c_attn.weight",
            tuple(f"{block}/attention/{name}/kernel" for name in fused),
            lambda x: tuple(x.reshape(-1, 3, heads, size)[:, i] for i in range(3)),
            lambda *xs: np.stack(xs, axis=1).reshape(xs[0].shape[0], -1),
        ),
        Key(
            f"{layer}.attn.c_attn.bias",
            tuple(f"{block}/attention/{name}/bias" for name in fused),
            lambda x: tuple(x.reshape(3, heads, size)),
            lambda *xs: np.stack(xs).reshape(-1),
        ),
        reshaped(
            f"{layer}.attn.c_proj.weight",
            f"{block}/attention/output/kernel",
            (heads * size, -1),
            (heads, size, -1),
        ),
        same(f"{layer}.attn.c_proj.bias", f"{block}/attention/output/bias"),
        *norm(f"{layer}.ln_2", f"{block}/mlp_norm"),
        same(f"{layer}.mlp.c_fc.weight", f"{block}/mlp/up/kernel"),
        same(f"{layer}.mlp.c_fc.bias", f"{block}/mlp/up/bias"),
        same(f"{layer}.mlp.c_proj.weight", f"{block}/mlp/down/kernel"),
        same(f"{layer}.mlp.c_proj.bias", f"{block}/mlp/down/bias"),
        *norm("transformer.ln_f", "final/norm"),
    ]
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]
