"""Gemma (Gemma Team 2024): LLaMA's parts with scaled embeddings, norms of 1 + w, a head size of its own.

What Gemma 2 and 3 add stands here as well, as settings: norms after each part too, norms of queries and keys.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from unidetox_jax.models import llama
from unidetox_jax.models.config import ROPE, read_hf
from unidetox_jax.models.layers import Attention, FeedForward, Head, embedding, offset_rms_norm
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.weight_map import Key

READ = (*llama.SHARED, "hidden_act", "head_dim", "attention_bias")
OFF = ("use_bidirectional_attention",)
PREFIX = "model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(llama.LlamaConfig):
    """Gemma's own settings."""

    family: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"
    query_size: float = 0.0  # scores are divided by its square root
    norms_after: bool = False  # of what attention and feed-forward give, before it is added


def from_hf(config: dict[str, Any], where: str) -> GemmaConfig:
    """GemmaConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma", where, (*READ, *ROPE), OFF)
    rotary = Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where)
    return GemmaConfig(**fields(hf), activation=hf.hidden_act, query_size=hf.head_dim, rotary=rotary)


def fields(hf: Any) -> dict[str, Any]:
    """The fields that the options of every Gemma give."""
    bias = hf.attention_bias
    return {**llama.fields(hf), "head_size": hf.head_dim, "attention_bias": bias, "output_bias": bias}


def to_hf(cfg: GemmaConfig) -> dict[str, Any]:
    """The Hugging Face config of a GemmaConfig."""
    return {**options(cfg), "hidden_act": cfg.activation, **cfg.rotary.to_hf()}


def options(cfg: GemmaConfig) -> dict[str, Any]:
    """The inverse of `fields`."""
    return {**llama.options(cfg), "head_dim": cfg.head_size, "attention_bias": cfg.attention_bias}


class Embed(nn.Module):
    """Token embeddings times the root of their width: tokens int32 [B,T] -> [B,T,hidden]."""

    cfg: GemmaConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        cfg = self.cfg
        x = embedding(cfg, cfg.vocab_size, cfg.hidden_size, "tokens")(tokens)
        return x * jnp.asarray(cfg.hidden_size**0.5, x.dtype)  # rounded to the compute dtype, as it was in training


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: GemmaConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg

        def after(name, x):
            return offset_rms_norm(cfg, name)(x) if cfg.norms_after else x

        attention = Attention(
            cfg, cfg.attention_bias, cfg.output_bias, dropout_rate=cfg.attention_dropout,
            norm=offset_rms_norm if cfg.head_norms else None, name="attention",
        )  # fmt: skip
        normed = offset_rms_norm(cfg, "attention_norm")(x)
        out, state = attention(normed, attend, rotary, cfg.query_size**-0.5, deterministic)
        x = x + after("attention_out_norm", out)
        out = FeedForward(cfg, cfg.mlp_bias, gated=True, name="mlp")(offset_rms_norm(cfg, "mlp_norm")(x))
        return x + after("mlp_out_norm", out), state


class Final(nn.Module):
    """What follows the last layer: [B,T,hidden] -> [B,T,hidden]."""

    cfg: GemmaConfig

    @nn.compact
    def __call__(self, x):
        if not self.cfg.tie_word_embeddings:
            Head(self.cfg, name="head")()
        return offset_rms_norm(self.cfg, "norm")(x)


def key_table(cfg: GemmaConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    norms = {"input_layernorm": "attention_norm"}
    if cfg.norms_after:
        norms |= {
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        }
    else:
        norms |= {"post_attention_layernorm": "mlp_norm"}
    return [*llama.outer_keys(cfg), *llama.layer_keys(norms), *llama.attention_keys(cfg), *llama.mlp_keys(cfg)]
