"""Gemma (Gemma Team 2024): LLaMA with scaled embeddings, norms with a scale of 1 + weight, and its own head size.

Also implements, as settings, what Gemma 2 and 3 add to blocks: post-norms and norms of queries and keys.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from unidetox_jax.models import layers, llama
from unidetox_jax.models.config import ROPE, from_options, read_hf, to_options
from unidetox_jax.models.key_tables import Key
from unidetox_jax.models.layers import Attention, FeedForward, embedding, offset_rms_norm
from unidetox_jax.models.rotary import Rotary

SHARED = {**llama.SHARED, "head_dim": "head_size", "attention_bias": "attention_bias"}
OPTIONS = {**SHARED, "hidden_act": "activation"}
CLASSES = ("Gemma",)
READ = tuple(OPTIONS)
OFF = ("use_bidirectional_attention",)
PREFIX = "model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(llama.LlamaConfig):
    """Gemma's settings."""

    family: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"
    query_size: float = 0.0  # attention scores are divided by its square root
    post_norms: bool = False  # norms on the outputs of attention and feed-forward, before they are added


def from_hf(config: dict[str, Any], where: str) -> GemmaConfig:
    """GemmaConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma", where, (*READ, *ROPE), OFF)
    return GemmaConfig(
        **from_options(hf, OPTIONS),
        output_bias=hf.attention_bias,
        query_size=hf.head_dim,
        rotary=Rotary.from_hf(hf, where),
    )


def to_hf(cfg: GemmaConfig) -> dict[str, Any]:
    """The Hugging Face config of a GemmaConfig."""
    return {**to_options(cfg, OPTIONS), **cfg.rotary.to_hf()}


class Embed(nn.Module):
    """Token embeddings times the square root of their width: tokens int32 [B,T] -> [B,T,hidden]."""

    cfg: GemmaConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        cfg = self.cfg
        x = embedding(cfg, cfg.vocab_size, cfg.hidden_size, "tokens")(tokens)
        return x * jnp.asarray(cfg.hidden_size**0.5, x.dtype)  # in the compute dtype, as in training


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: GemmaConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg

        def post_norm(name, x):
            return offset_rms_norm(cfg, name)(x) if cfg.post_norms else x

        attention = Attention(
            cfg, cfg.attention_bias, cfg.output_bias, dropout_rate=cfg.attention_dropout,
            norm=offset_rms_norm if cfg.head_norms else None, name="attention",
        )  # fmt: skip
        normed = offset_rms_norm(cfg, "attention_norm")(x)
        out, state = attention(normed, attend, rotary, cfg.query_size**-0.5, deterministic)
        x = x + post_norm("attention_out_norm", out)
        out = FeedForward(cfg, cfg.mlp_bias, gated=True, name="mlp")(offset_rms_norm(cfg, "mlp_norm")(x))
        return x + post_norm("mlp_out_norm", out), state


Final = functools.partial(layers.Final, norm=offset_rms_norm)


def key_table(cfg: GemmaConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    norms = {"input_layernorm": "attention_norm"}
    if cfg.post_norms:
        norms |= {
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        }
    else:
        norms |= {"post_attention_layernorm": "mlp_norm"}
    return [*llama.outer_keys(cfg), *llama.layer_keys(norms), *llama.attention_keys(cfg), *llama.mlp_keys(cfg)]
