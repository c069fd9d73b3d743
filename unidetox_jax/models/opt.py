"""OPT (Zhang et al. 2022), 125m to 66b: learned positions with an offset of 2, ReLU.

350m differs: post-norm, a narrower embedding with projections in and out, no final norm.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models.config import ModelConfig, from_options, head_size, read_hf, to_options
from unidetox_jax.models.key_tables import Key, heads_in, heads_out, linear, norm, reshaped, same
from unidetox_jax.models.layers import Attention, FeedForward, Head, dense, embedding, layer_norm

OPTIONS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "ffn_dim": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "activation_function": "activation",
    "init_std": "initializer_range",
    "attention_dropout": "attention_dropout",
    "dropout": "residual_dropout",
    "do_layer_norm_before": "norm_first",
    "word_embed_proj_dim": "token_width",
    "enable_bias": "bias",
    "layer_norm_elementwise_affine": "norm_affine",
}
CLASSES = ("OPT",)
READ = (*OPTIONS, "_remove_final_layer_norm")
OFF = ("layerdrop",)
RENAMED = {"d_model": "hidden_size"}
PREFIX = "model."
OFFSET = 2  # the position table's first two entries are never used
NORM_EPSILON = 1e-5  # PyTorch's default, which OPT does not set


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """OPT's settings."""

    family: ClassVar[str] = "opt"
    architecture: ClassVar[str] = "OPTForCausalLM"
    norm_first: bool = True
    final_norm: bool = True
    token_width: int = 0  # of the token embedding and the head
    bias: bool = True
    norm_affine: bool = True

    @property
    def embedding_size(self) -> int:
        return self.token_width


def from_hf(config: dict[str, Any], where: str) -> OPTConfig:
    """OPTConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "opt", where, READ, OFF, RENAMED)
    return OPTConfig(
        **from_options(hf, OPTIONS),
        num_kv_heads=hf.num_attention_heads,
        head_size=head_size(hf, where),
        norm_epsilon=NORM_EPSILON,
        position_table=True,
        final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
    )


def to_hf(cfg: OPTConfig) -> dict[str, Any]:
    """The Hugging Face config of an OPTConfig."""
    return {**to_options(cfg, OPTIONS), "_remove_final_layer_norm": cfg.norm_first and not cfg.final_norm}


class Embed(nn.Module):
    """Token embeddings, projected if narrower, plus positions: tokens, positions int32 [B,T] -> [B,T,hidden]."""

    cfg: OPTConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        cfg = self.cfg
        x = embedding(cfg, cfg.vocab_size, cfg.token_width, "tokens")(tokens)
        if cfg.token_width != cfg.hidden_size:
            x = dense(cfg, cfg.hidden_size, "project_in", bias=False)(x)
        entries = cfg.max_position_embeddings + OFFSET
        return x + embedding(cfg, entries, cfg.hidden_size, "positions")(positions + OFFSET)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: OPTConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        attention = Attention(cfg, cfg.bias, cfg.bias, dropout_rate=cfg.attention_dropout, name="attention")
        attention_norm = layer_norm(cfg, "attention_norm", cfg.norm_affine)
        feed_forward = FeedForward(cfg, cfg.bias, name="mlp")
        mlp_norm = layer_norm(cfg, "mlp_norm", cfg.norm_affine)
        scale = cfg.head_size**-0.5
        if cfg.norm_first:
            out, state = attention(attention_norm(x), attend, rotary, scale, deterministic)
            x = x + dropout(out)
            return x + dropout(feed_forward(mlp_norm(x))), state
        out, state = attention(x, attend, rotary, scale, deterministic)
        x = attention_norm(x + dropout(out))
        return mlp_norm(x + dropout(feed_forward(x))), state


class Final(nn.Module):
    """The final norm and projection, if any: [B,T,hidden] -> [B,T,token width]."""

    cfg: OPTConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        if not cfg.tie_word_embeddings:
            Head(cfg, name="head")()
        if cfg.final_norm:
            x = layer_norm(cfg, "norm", cfg.norm_affine)(x)
        if cfg.token_width != cfg.hidden_size:
            x = dense(cfg, cfg.token_width, "project_out", bias=False)(x)
        return x


def key_table(cfg: OPTConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    decoder, layer, block = "model.decoder", "model.decoder.layers.{layer}", "blocks"
    heads, size = cfg.num_heads, cfg.head_size
    table = [
        same(f"{decoder}.embed_tokens.weight", "embed/tokens/embedding"),
        same(f"{decoder}.embed_positions.weight", "embed/positions/embedding"),
    ]
    if cfg.token_width != cfg.hidden_size:
        table.append(linear(f"{decoder}.project_in.weight", "embed/project_in/kernel"))
        table.append(linear(f"{decoder}.project_out.weight", "final/project_out/kernel"))
    if cfg.norm_affine:
        table += norm(f"{layer}.self_attn_layer_norm", f"{block}/attention_norm")
        table += norm(f"{layer}.final_layer_norm", f"{block}/mlp_norm")
        table += norm(f"{decoder}.final_layer_norm", "final/norm") if cfg.final_norm else []
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name, path = f"{layer}.self_attn.{theirs}", f"{block}/attention/{ours}"
        table.append(heads_in(f"{name}.weight", f"{path}/kernel", heads, size))
        if cfg.bias:
            table.append(reshaped(f"{name}.bias", f"{path}/bias", (-1,), (heads, size)))
    table.append(heads_out(f"{layer}.self_attn.out_proj.weight", f"{block}/attention/output/kernel", heads, size))
    table.append(linear(f"{layer}.fc1.weight", f"{block}/mlp/up/kernel"))
    table.append(linear(f"{layer}.fc2.weight", f"{block}/mlp/down/kernel"))
    if cfg.bias:
        table.append(same(f"{layer}.self_attn.out_proj.bias", f"{block}/attention/output/bias"))
        table.append(same(f"{layer}.fc1.bias", f"{block}/mlp/up/bias"))
        table.append(same(f"{layer}.fc2.bias", f"{block}/mlp/down/bias"))
    return table if cfg.tie_word_embeddings else [*table, same("lm_head.weight", "final/head/embedding")]
