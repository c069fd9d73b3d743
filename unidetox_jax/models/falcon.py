"""Falcon (Almazrouei et al. 2023): 7b, 40b, 180b, 11b, and rw-1b, which is a different transformer under one name.

7b: one key-value head, attention and feed-forward side by side under one norm. 40b and 180b: grouped key-value heads,
a norm each. 11b: grouped, one norm. rw-1b: ALiBi, all heads, one part after the other, biases.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np

from unidetox_jax.errors import UserError
from unidetox_jax.models.config import ROPE, ModelConfig, head_size, read_hf, token_ids, token_ids_to_hf
from unidetox_jax.models.layers import Attention, FeedForward, Head, embedding, layer_norm
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.weight_map import Key, heads_out, linear, norm, same

READ = (
    "hidden_size num_hidden_layers num_attention_heads num_ln_in_parallel_attn layer_norm_epsilon initializer_range "
    "hidden_dropout attention_dropout num_kv_heads alibi new_decoder_architecture multi_query parallel_attn bias "
    "max_position_embeddings ffn_hidden_size activation"
).split()
# The names of Falcon's own code, from before transformers had the family.
OLDER = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads",
         "n_embed": "hidden_size"}  # fmt: skip
PREFIX = "transformer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """Falcon's own settings."""

    family: ClassVar[str] = "falcon"
    architecture: ClassVar[str] = "FalconForCausalLM"
    new_decoder: bool = False  # the fused weights hold groups of queries with their key and value
    multi_query: bool = True
    parallel: bool = True  # attention and feed-forward read the same input
    separate_norms: bool = False  # parallel parts with a norm each
    bias: bool = False


def from_hf(config: dict[str, Any], where: str) -> FalconConfig:
    """FalconConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    if config["model_type"] != "falcon":
        config = {**_released(config), **config}
    hf = read_hf(config, "falcon", where, (*READ, *ROPE), older=OLDER)
    if hf.new_decoder_architecture and not hf.parallel_attn:
        raise UserError(f"{where}: new_decoder_architecture without parallel_attn is not implemented")
    norms = hf.num_ln_in_parallel_attn
    if norms not in (None, 1, 2):
        raise UserError(f"{where}: num_ln_in_parallel_attn {norms!r} is not implemented (known: 1, 2)")
    if norms == 2 and not hf.new_decoder_architecture:
        raise UserError(f"{where}: num_ln_in_parallel_attn 2 needs new_decoder_architecture")
    if hf.new_decoder_architecture:
        kv_heads = hf.num_kv_heads
    else:
        kv_heads = 1 if hf.multi_query else hf.num_attention_heads
    return FalconConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=kv_heads,
        head_size=head_size(hf, where),
        intermediate_size=hf.ffn_hidden_size,
        max_position_embeddings=hf.max_position_embeddings,
        activation=hf.activation,
        norm_epsilon=hf.layer_norm_epsilon,
        tie_word_embeddings=hf.tie_word_embeddings,
        initializer_range=hf.initializer_range,
        attention_dropout=hf.attention_dropout,
        residual_dropout=hf.hidden_dropout,
        alibi=hf.alibi,
        rotary=None if hf.alibi else Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where),
        new_decoder=hf.new_decoder_architecture,
        multi_query=hf.multi_query,
        parallel=hf.parallel_attn,
        separate_norms=hf.new_decoder_architecture and norms in (None, 2),
        bias=hf.bias,
        **token_ids(hf),
    )


def _released(config: dict[str, Any]) -> dict[str, Any]:
    """What a config of Falcon's own code (RefinedWeb, RefinedWebModel) means beyond its keys: grouped key-value heads
    come with the new decoder, and what is not said is off."""
    grouped = config.get("n_head_kv") is not None
    return {"new_decoder_architecture": grouped, "multi_query": False, "parallel_attn": grouped}


def to_hf(cfg: FalconConfig) -> dict[str, Any]:
    """The Hugging Face config of a FalconConfig."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_kv_heads": cfg.num_kv_heads,
        "ffn_hidden_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        "activation": cfg.activation,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "initializer_range": cfg.initializer_range,
        "attention_dropout": cfg.attention_dropout,
        "hidden_dropout": cfg.residual_dropout,
        "alibi": cfg.alibi,
        "new_decoder_architecture": cfg.new_decoder,
        "multi_query": cfg.multi_query,
        "parallel_attn": cfg.parallel,
        "num_ln_in_parallel_attn": (2 if cfg.separate_norms else 1) if cfg.new_decoder else None,
        "bias": cfg.bias,
        **({} if cfg.rotary is None else cfg.rotary.to_hf()),
        **token_ids_to_hf(cfg),
    }


class Embed(nn.Module):
    """Token embeddings: tokens int32 [B,T] -> [B,T,hidden]; positions enter by rotation or ALiBi."""

    cfg: FalconConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        return embedding(self.cfg, self.cfg.vocab_size, self.cfg.hidden_size, "tokens")(tokens)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: FalconConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        # The released model has dropout on attention's probabilities with ALiBi only, and lets the sequential form's
        # attention output have attention_dropout, not hidden_dropout.
        rate = cfg.attention_dropout if cfg.alibi else 0.0
        attention = Attention(cfg, cfg.bias, cfg.bias, dropout_rate=rate, name="attention")
        feed_forward = FeedForward(cfg, cfg.bias, name="mlp")
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        normed = layer_norm(cfg, "attention_norm")(x)
        out, state = attention(normed, attend, rotary, cfg.head_size**-0.5, deterministic)
        if cfg.parallel:
            mlp_input = layer_norm(cfg, "mlp_norm")(x) if cfg.separate_norms else normed
            return x + dropout(feed_forward(mlp_input) + out), state
        x = x + nn.Dropout(cfg.attention_dropout, deterministic=deterministic)(out)
        return x + dropout(feed_forward(layer_norm(cfg, "mlp_norm")(x))), state


class Final(nn.Module):
    """What follows the last layer: [B,T,hidden] -> [B,T,hidden]."""

    cfg: FalconConfig

    @nn.compact
    def __call__(self, x):
        if not self.cfg.tie_word_embeddings:
            Head(self.cfg, name="head")()
        return layer_norm(self.cfg, "norm")(x)


def key_table(cfg: FalconConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block = "transformer.h.{layer}", "blocks"
    name, path = f"{layer}.self_attention", f"{block}/attention"
    table = [same("transformer.word_embeddings.weight", "embed/tokens/embedding")]
    if cfg.separate_norms:
        table += norm(f"{layer}.ln_attn", f"{block}/attention_norm")
        table += norm(f"{layer}.ln_mlp", f"{block}/mlp_norm")
    else:
        table += norm(f"{layer}.input_layernorm", f"{block}/attention_norm")
        if not cfg.parallel:
            table += norm(f"{layer}.post_attention_layernorm", f"{block}/mlp_norm")
    table += [
        fused(cfg, f"{name}.query_key_value.weight", [f"{path}/{part}/kernel" for part in FUSED]),
        heads_out(f"{name}.dense.weight", f"{path}/output/kernel", cfg.num_heads, cfg.head_size),
        linear(f"{layer}.mlp.dense_h_to_4h.weight", f"{block}/mlp/up/kernel"),
        linear(f"{layer}.mlp.dense_4h_to_h.weight", f"{block}/mlp/down/kernel"),
    ]
    if cfg.bias:
        table += [
            fused(cfg, f"{name}.query_key_value.bias", [f"{path}/{part}/bias" for part in FUSED]),
            same(f"{name}.dense.bias", f"{path}/output/bias"),
            same(f"{layer}.mlp.dense_h_to_4h.bias", f"{block}/mlp/up/bias"),
            same(f"{layer}.mlp.dense_4h_to_h.bias", f"{block}/mlp/down/bias"),
        ]
    table += norm("transformer.ln_f", "final/norm")
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]


FUSED = ("query", "key", "value")


def fused(cfg: ModelConfig, hf: str, ours: list[str]) -> Key:
    """query_key_value [rows·size, in] or [rows·size]: groups of (queries of a key-value head, its key, its value)."""
    groups, size = cfg.num_kv_heads, cfg.head_size
    queries = cfg.num_heads // groups

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        rest = x.shape[1:]
        grouped = x.reshape(groups, queries + 2, size, *rest)
        query = grouped[:, :queries].reshape(groups * queries, size, *rest)
        parts = (query, grouped[:, queries], grouped[:, queries + 1])
        return tuple(np.moveaxis(part, -1, 0) if rest else part for part in parts)

    def join(*parts: np.ndarray) -> np.ndarray:
        query, key, value = (np.moveaxis(part, 0, -1) if part.ndim == 3 else part for part in parts)
        rest = query.shape[2:]
        grouped = [query.reshape(groups, queries, size, *rest), key[:, None], value[:, None]]
        return np.concatenate(grouped, axis=1).reshape(groups * (queries + 2) * size, *rest)

    return Key(hf, tuple(ours), split, join)
