"""LLaMA 1, 2, 3, 3.1, 3.2 (Touvron et al. 2023): rotary positions, RMS norm, gated feed-forward, grouped queries."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models.config import ROPE, ModelConfig, Rotary, read_hf, token_ids, token_ids_to_hf
from unidetox_jax.models.layers import Attention, FeedForward, Head, embedding, rms_norm
from unidetox_jax.models.weight_map import Key, heads_in, heads_out, linear, norm, reshaped, same

READ = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps attention_bias attention_dropout mlp_bias head_dim"
).split()
PREFIX = "model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """LLaMA's own settings."""

    family: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    attention_bias: bool = False  # on query, key, value and output alike
    mlp_bias: bool = False


def from_hf(config: dict[str, Any], where: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "llama", where, (*READ, *ROPE))
    return LlamaConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_size=hf.head_dim,
        intermediate_size=hf.intermediate_size,
        max_position_embeddings=hf.max_position_embeddings,
        activation=hf.hidden_act,
        norm_epsilon=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        initializer_range=hf.initializer_range,
        attention_dropout=hf.attention_dropout,
        rotary=Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where),
        attention_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
        **token_ids(hf),
    )


def to_hf(cfg: LlamaConfig) -> dict[str, Any]:
    """The Hugging Face config of a LlamaConfig."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        "hidden_act": cfg.activation,
        "rms_norm_eps": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "initializer_range": cfg.initializer_range,
        "attention_dropout": cfg.attention_dropout,
        "attention_bias": cfg.attention_bias,
        "mlp_bias": cfg.mlp_bias,
        **(cfg.rotary.to_hf() if cfg.rotary else {}),
        **token_ids_to_hf(cfg),
    }


class Embed(nn.Module):
    """Token embeddings: tokens int32 [B,T] -> [B,T,hidden]; positions enter by rotation."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        return embedding(self.cfg, self.cfg.vocab_size, self.cfg.hidden_size, "tokens")(tokens)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        bias = cfg.attention_bias
        attention = Attention(cfg, bias, bias, dropout_rate=cfg.attention_dropout, name="attention")
        out, state = attention(rms_norm(cfg, "attention_norm")(x), attend, rotary, cfg.head_size**-0.5, deterministic)
        x = x + out
        return x + FeedForward(cfg, cfg.mlp_bias, gated=True, name="mlp")(rms_norm(cfg, "mlp_norm")(x)), state


class Final(nn.Module):
    """What follows the last layer: [B,T,hidden] -> [B,T,hidden]."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x):
        if not self.cfg.tie_word_embeddings:
            Head(self.cfg, name="head")()
        return rms_norm(self.cfg, "norm")(x)


def key_table(cfg: LlamaConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block, size = "model.layers.{layer}", "blocks", cfg.head_size
    table = [
        same("model.embed_tokens.weight", "embed/tokens/embedding"),
        *norm(f"{layer}.input_layernorm", f"{block}/attention_norm", bias=False),
        *norm(f"{layer}.post_attention_layernorm", f"{block}/mlp_norm", bias=False),
        *norm("model.norm", "final/norm", bias=False),
    ]
    for theirs, ours, heads in (
        ("q_proj", "query", cfg.num_heads),
        ("k_proj", "key", cfg.num_kv_heads),
        ("v_proj", "value", cfg.num_kv_heads),
    ):
        name, path = f"{layer}.self_attn.{theirs}", f"{block}/attention/{ours}"
        table.append(heads_in(f"{name}.weight", f"{path}/kernel", heads, size))
        if cfg.attention_bias:
            table.append(reshaped(f"{name}.bias", f"{path}/bias", (-1,), (heads, size)))
    name, path = f"{layer}.self_attn.o_proj", f"{block}/attention/output"
    table.append(heads_out(f"{name}.weight", f"{path}/kernel", cfg.num_heads, size))
    if cfg.attention_bias:
        table.append(same(f"{name}.bias", f"{path}/bias"))
    for part in ("gate", "up", "down"):
        table.append(linear(f"{layer}.mlp.{part}_proj.weight", f"{block}/mlp/{part}/kernel"))
        if cfg.mlp_bias:
            table.append(same(f"{layer}.mlp.{part}_proj.bias", f"{block}/mlp/{part}/bias"))
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]
