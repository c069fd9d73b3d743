"""Falcon (Almazrouei et al. 2023): 7b, 40b, 180b, 11b, and rw-1b, which is a different architecture under one name.

7b: one key-value head, parallel attention and feed-forward under one norm. 40b and 180b: grouped key-value heads, a
norm each. 11b: grouped, one norm. rw-1b: ALiBi, multi-head attention, sequential, biases.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np

from unidetox_jax.errors import UserError
from unidetox_jax.models import layers
from unidetox_jax.models.config import ROPE, ModelConfig, from_options, head_size, read_hf, to_options
from unidetox_jax.models.key_tables import Key, heads_out, linear, norm, same
from unidetox_jax.models.layers import PROJECTIONS, Attention, FeedForward, layer_norm
from unidetox_jax.models.rotary import Rotary

OPTIONS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "activation": "activation",
    "layer_norm_epsilon": "norm_epsilon",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "residual_dropout",
    "alibi": "alibi",
    "new_decoder_architecture": "new_decoder",
    "multi_query": "multi_query",
    "parallel_attn": "parallel",
    "bias": "bias",
}
CLASSES = ("Falcon", "RW")
READ = (*OPTIONS, "num_ln_in_parallel_attn")
# Option names of Falcon's own code, which predates the family in transformers
RENAMED = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads",
           "n_embed": "hidden_size"}  # fmt: skip
PREFIX = "transformer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """Falcon's settings."""

    family: ClassVar[str] = "falcon"
    architecture: ClassVar[str] = "FalconForCausalLM"
    new_decoder: bool = False  # grouped key-value heads
    multi_query: bool = True
    parallel: bool = True  # attention and feed-forward read the same input
    separate_norms: bool = False  # parallel attention and feed-forward have a norm each
    bias: bool = False


def from_hf(config: dict[str, Any], where: str) -> FalconConfig:
    """FalconConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    if config["model_type"] != "falcon":
        config = {**_released(config), **config}
    hf = read_hf(config, "falcon", where, (*READ, *ROPE), renamed=RENAMED)
    if hf.new_decoder_architecture and not hf.parallel_attn:
        raise UserError(f"{where}: new_decoder_architecture without parallel_attn is not implemented")
    norms = hf.num_ln_in_parallel_attn
    if norms not in (None, 1, 2):
        raise UserError(f"{where}: num_ln_in_parallel_attn {norms!r} is not implemented (known: 1, 2)")
    if norms == 2 and not hf.new_decoder_architecture:
        raise UserError(f"{where}: num_ln_in_parallel_attn 2 needs new_decoder_architecture")
    fields = from_options(hf, OPTIONS)
    if not hf.new_decoder_architecture:
        fields["num_kv_heads"] = 1 if hf.multi_query else hf.num_attention_heads
    return FalconConfig(
        **fields,
        head_size=head_size(hf, where),
        rotary=None if hf.alibi else Rotary.from_hf(hf, where),
        separate_norms=hf.new_decoder_architecture and norms in (None, 2),
    )


def _released(config: dict[str, Any]) -> dict[str, Any]:
    """Defaults of Falcon's own code (RefinedWeb, RefinedWebModel), where n_head_kv implies the new decoder."""
    grouped = config.get("n_head_kv") is not None
    return {"new_decoder_architecture": grouped, "multi_query": False, "parallel_attn": grouped}


def to_hf(cfg: FalconConfig) -> dict[str, Any]:
    """The Hugging Face config of a FalconConfig."""
    norms = (2 if cfg.separate_norms else 1) if cfg.new_decoder else None
    rope = {} if cfg.rotary is None else cfg.rotary.to_hf()
    return {**to_options(cfg, OPTIONS), "num_ln_in_parallel_attn": norms, **rope}


Embed, Final = layers.Embed, layers.Final


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: FalconConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        # As released: dropout on attention probabilities with ALiBi only, and in the sequential form attention_dropout,
        # not hidden_dropout, on attention's output
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
        fused(cfg, f"{name}.query_key_value.weight", [f"{path}/{projection}/kernel" for projection in PROJECTIONS]),
        heads_out(f"{name}.dense.weight", f"{path}/output/kernel", cfg.num_heads, cfg.head_size),
        linear(f"{layer}.mlp.dense_h_to_4h.weight", f"{block}/mlp/up/kernel"),
        linear(f"{layer}.mlp.dense_4h_to_h.weight", f"{block}/mlp/down/kernel"),
    ]
    if cfg.bias:
        table += [
            fused(cfg, f"{name}.query_key_value.bias", [f"{path}/{projection}/bias" for projection in PROJECTIONS]),
            same(f"{name}.dense.bias", f"{path}/output/bias"),
            same(f"{layer}.mlp.dense_h_to_4h.bias", f"{block}/mlp/up/bias"),
            same(f"{layer}.mlp.dense_4h_to_h.bias", f"{block}/mlp/down/bias"),
        ]
    table += norm("transformer.ln_f", "final/norm")
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]


def fused(cfg: ModelConfig, hf: str, ours: list[str]) -> Key:
    """query_key_value [heads·size, in] or [heads·size]: for each key-value head its queries, its key, its value."""
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
