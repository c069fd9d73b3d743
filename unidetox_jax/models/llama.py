"""LLaMA 1, 2, 3, 3.1, 3.2 (Touvron et al. 2023): rotary positions, RMS norm, gated feed-forward, grouped queries.

Families with the same skeleton reuse its blocks, options and rows of the key table.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models import layers
from unidetox_jax.models.config import ROPE, ModelConfig, from_options, read_hf, to_options
from unidetox_jax.models.key_tables import Key, heads_in, heads_out, linear, norm, reshaped, same
from unidetox_jax.models.layers import Attention, FeedForward, rms_norm
from unidetox_jax.models.rotary import Rotary

SHARED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "norm_epsilon",
    "attention_dropout": "attention_dropout",
}
OPTIONS = {
    **SHARED,
    "hidden_act": "activation",
    "head_dim": "head_size",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
CLASSES = ("Llama", "LLaMA")
READ = tuple(OPTIONS)
PREFIX = "model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """LLaMA's settings."""

    family: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    rotary: Rotary = Rotary()
    attention_bias: bool = False  # of query, key and value
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False  # norms on queries and keys


def from_hf(config: dict[str, Any], where: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "llama", where, (*READ, *ROPE))
    return LlamaConfig(**from_options(hf, OPTIONS), output_bias=hf.attention_bias, rotary=Rotary.from_hf(hf, where))


def to_hf(cfg: LlamaConfig) -> dict[str, Any]:
    """The Hugging Face config of a LlamaConfig."""
    return {**to_options(cfg, OPTIONS), **cfg.rotary.to_hf()}


Embed = layers.Embed
Final = functools.partial(layers.Final, norm=rms_norm)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        attention = Attention(
            cfg, cfg.attention_bias, cfg.output_bias, dropout_rate=cfg.attention_dropout,
            norm=rms_norm if cfg.head_norms else None, name="attention",
        )  # fmt: skip
        out, state = attention(rms_norm(cfg, "attention_norm")(x), attend, rotary, cfg.head_size**-0.5, deterministic)
        x = x + dropout(out)
        out = FeedForward(cfg, cfg.mlp_bias, gated=True, name="mlp")(rms_norm(cfg, "mlp_norm")(x))
        return x + dropout(out), state


def key_table(cfg: LlamaConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return [*outer_keys(cfg), *layer_keys(norms), *attention_keys(cfg), *mlp_keys(cfg)]


LAYER, BLOCK = "model.layers.{layer}", "blocks"


def outer_keys(cfg: ModelConfig) -> list[Key]:
    """The embedding, the final norm and the head."""
    table = [same("model.embed_tokens.weight", "embed/tokens/embedding"), *norm("model.norm", "final/norm", bias=False)]
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]


def layer_keys(norms: dict[str, str]) -> list[Key]:
    """The norms of a layer: {Hugging Face's name: ours}."""
    return [key for theirs, ours in norms.items() for key in norm(f"{LAYER}.{theirs}", f"{BLOCK}/{ours}", bias=False)]


def attention_keys(cfg: LlamaConfig) -> list[Key]:
    """Attention's projections and its norms of queries and keys."""
    norms = {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
    table, size = layer_keys(norms) if cfg.head_norms else [], cfg.head_size
    for theirs, ours, heads in (
        ("q_proj", "query", cfg.num_heads),
        ("k_proj", "key", cfg.num_kv_heads),
        ("v_proj", "value", cfg.num_kv_heads),
    ):
        name, path = f"{LAYER}.self_attn.{theirs}", f"{BLOCK}/attention/{ours}"
        table.append(heads_in(f"{name}.weight", f"{path}/kernel", heads, size))
        if cfg.attention_bias:
            table.append(reshaped(f"{name}.bias", f"{path}/bias", (-1,), (heads, size)))
    name, path = f"{LAYER}.self_attn.o_proj", f"{BLOCK}/attention/output"
    table.append(heads_out(f"{name}.weight", f"{path}/kernel", cfg.num_heads, size))
    return [*table, same(f"{name}.bias", f"{path}/bias")] if cfg.output_bias else table


def mlp_keys(cfg: LlamaConfig) -> list[Key]:
    """The feed-forward layer."""
    table = []
    for projection in ("gate", "up", "down"):
        table.append(linear(f"{LAYER}.mlp.{projection}_proj.weight", f"{BLOCK}/mlp/{projection}/kernel"))
        if cfg.mlp_bias:
            table.append(same(f"{LAYER}.mlp.{projection}_proj.bias", f"{BLOCK}/mlp/{projection}/bias"))
    return table
