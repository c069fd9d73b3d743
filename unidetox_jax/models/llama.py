"""LLaMA 1, 2, 3, 3.1, 3.2 (Touvron et al. 2023): rotary positions, RMS norm, gated feed-forward, grouped queries."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models.config import ROPE, ModelConfig, read_hf, token_ids, token_ids_to_hf
from unidetox_jax.models.layers import Attention, FeedForward, Head, embedding, rms_norm
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.weight_map import Key, heads_in, heads_out, linear, norm, reshaped, same

# What all families read that are made like this one.
SHARED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings initializer_range rms_norm_eps attention_dropout"
).split()
READ = (*SHARED, "hidden_act", "attention_bias", "mlp_bias", "head_dim")
PREFIX = "model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """LLaMA's own settings."""

    family: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    rotary: Rotary = Rotary()
    attention_bias: bool = False  # on query, key and value
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False  # of each head's queries and keys


def from_hf(config: dict[str, Any], where: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "llama", where, (*READ, *ROPE))
    return LlamaConfig(
        **fields(hf),
        activation=hf.hidden_act,
        head_size=hf.head_dim,
        rotary=Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where),
        attention_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )


def fields(hf: Any) -> dict[str, Any]:
    """The fields of a ModelConfig that `SHARED` options give."""
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "intermediate_size": hf.intermediate_size,
        "max_position_embeddings": hf.max_position_embeddings,
        "norm_epsilon": hf.rms_norm_eps,
        "tie_word_embeddings": hf.tie_word_embeddings,
        "initializer_range": hf.initializer_range,
        "attention_dropout": hf.attention_dropout or 0.0,
        **token_ids(hf),
    }


def to_hf(cfg: LlamaConfig) -> dict[str, Any]:
    """The Hugging Face config of a LlamaConfig."""
    return {
        **options(cfg),
        "hidden_act": cfg.activation,
        "head_dim": cfg.head_size,
        "attention_bias": cfg.attention_bias,
        "mlp_bias": cfg.mlp_bias,
        **cfg.rotary.to_hf(),
    }


def options(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `fields`."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        "rms_norm_eps": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "initializer_range": cfg.initializer_range,
        "attention_dropout": cfg.attention_dropout,
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
        attention = Attention(
            cfg, cfg.attention_bias, cfg.output_bias, dropout_rate=cfg.attention_dropout,
            norm=rms_norm if cfg.head_norms else None, name="attention",
        )  # fmt: skip
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
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return [*outer_keys(cfg), *layer_keys(norms), *attention_keys(cfg), *mlp_keys(cfg)]


LAYER, BLOCK = "model.layers.{layer}", "blocks"


def outer_keys(cfg: ModelConfig) -> list[Key]:
    """The embedding, the last norm and the head."""
    table = [same("model.embed_tokens.weight", "embed/tokens/embedding"), *norm("model.norm", "final/norm", bias=False)]
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]


def layer_keys(norms: dict[str, str]) -> list[Key]:
    """A layer's norms, by their names."""
    return [key for theirs, ours in norms.items() for key in norm(f"{LAYER}.{theirs}", f"{BLOCK}/{ours}", bias=False)]


def attention_keys(cfg: LlamaConfig) -> list[Key]:
    """Attention's projections, and norms of queries and keys."""
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
    """The feed-forward layer's."""
    table = []
    for part in ("gate", "up", "down"):
        table.append(linear(f"{LAYER}.mlp.{part}_proj.weight", f"{BLOCK}/mlp/{part}/kernel"))
        if cfg.mlp_bias:
            table.append(same(f"{LAYER}.mlp.{part}_proj.bias", f"{BLOCK}/mlp/{part}/bias"))
    return table
