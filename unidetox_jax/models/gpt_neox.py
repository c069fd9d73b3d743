"""GPT-NeoX (Black et al. 2022), Pythia's code: layer norms, a part of each head rotated, attention and feed-forward
side by side or one after the other."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models.config import ROPE, ModelConfig, head_size, read_hf, token_ids, token_ids_to_hf
from unidetox_jax.models.falcon import FUSED, fused
from unidetox_jax.models.layers import Attention, FeedForward, Head, embedding, layer_norm
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.weight_map import Key, heads_out, linear, norm, same

READ = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act attention_dropout hidden_dropout "
    "max_position_embeddings initializer_range layer_norm_eps use_parallel_residual attention_bias"
).split()
FORMER = ("rotary_pct", "rotary_emb_base")  # transformers still reads them, but has them no more
PREFIX = "gpt_neox."
IGNORED = (r".*\.attention\.(bias|masked_bias)",)  # constants of older checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """GPT-NeoX's own settings."""

    family: ClassVar[str] = "gpt_neox"
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    rotary: Rotary = Rotary()
    parallel: bool = True  # attention and feed-forward read the same input, each by its norm
    attention_bias: bool = True


def from_hf(config: dict[str, Any], where: str) -> GPTNeoXConfig:
    """GPTNeoXConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gpt_neox", where, (*READ, *FORMER, *ROPE))
    return GPTNeoXConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_size=head_size(hf, where),
        intermediate_size=hf.intermediate_size,
        max_position_embeddings=hf.max_position_embeddings,
        activation=hf.hidden_act,
        norm_epsilon=hf.layer_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        initializer_range=hf.initializer_range,
        embedding_dropout=hf.hidden_dropout,
        attention_dropout=hf.attention_dropout,
        residual_dropout=hf.hidden_dropout,
        rotary=Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where, partial=True),
        parallel=hf.use_parallel_residual,
        attention_bias=hf.attention_bias,
        **token_ids(hf),
    )


def to_hf(cfg: GPTNeoXConfig) -> dict[str, Any]:
    """The Hugging Face config of a GPTNeoXConfig."""
    rope = cfg.rotary.to_hf()
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        "hidden_act": cfg.activation,
        "layer_norm_eps": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "initializer_range": cfg.initializer_range,
        "attention_dropout": cfg.attention_dropout,
        "hidden_dropout": cfg.residual_dropout,
        "use_parallel_residual": cfg.parallel,
        "attention_bias": cfg.attention_bias,
        "rotary_pct": cfg.rotary.share,
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
        **token_ids_to_hf(cfg),
    }


class Embed(nn.Module):
    """Token embeddings: tokens int32 [B,T] -> [B,T,hidden]; positions enter by rotation."""

    cfg: GPTNeoXConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        x = embedding(self.cfg, self.cfg.vocab_size, self.cfg.hidden_size, "tokens")(tokens)
        return nn.Dropout(self.cfg.embedding_dropout)(x, deterministic=deterministic)


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: GPTNeoXConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        bias, dropout = cfg.attention_bias, nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        attention = Attention(cfg, bias, bias, dropout_rate=cfg.attention_dropout, name="attention")
        out, state = attention(layer_norm(cfg, "attention_norm")(x), attend, rotary, cfg.head_size**-0.5, deterministic)
        after = x + dropout(out)
        normed = layer_norm(cfg, "mlp_norm")(x if cfg.parallel else after)
        return after + dropout(FeedForward(cfg, bias=True, name="mlp")(normed)), state


class Final(nn.Module):
    """What follows the last layer: [B,T,hidden] -> [B,T,hidden]."""

    cfg: GPTNeoXConfig

    @nn.compact
    def __call__(self, x):
        if not self.cfg.tie_word_embeddings:
            Head(self.cfg, name="head")()
        return layer_norm(self.cfg, "norm")(x)


def key_table(cfg: GPTNeoXConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block = "gpt_neox.layers.{layer}", "blocks"
    name, path = f"{layer}.attention", f"{block}/attention"
    table = [
        same("gpt_neox.embed_in.weight", "embed/tokens/embedding"),
        *norm(f"{layer}.input_layernorm", f"{block}/attention_norm"),
        *norm(f"{layer}.post_attention_layernorm", f"{block}/mlp_norm"),
        fused(cfg, f"{name}.query_key_value.weight", [f"{path}/{part}/kernel" for part in FUSED]),
        heads_out(f"{name}.dense.weight", f"{path}/output/kernel", cfg.num_heads, cfg.head_size),
    ]
    if cfg.attention_bias:
        table.append(fused(cfg, f"{name}.query_key_value.bias", [f"{path}/{part}/bias" for part in FUSED]))
        table.append(same(f"{name}.dense.bias", f"{path}/output/bias"))
    for theirs, ours in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
        table.append(linear(f"{layer}.mlp.{theirs}.weight", f"{block}/mlp/{ours}/kernel"))
        table.append(same(f"{layer}.mlp.{theirs}.bias", f"{block}/mlp/{ours}/bias"))
    table += norm("gpt_neox.final_layer_norm", "final/norm")
    return table if cfg.tie_word_embeddings else [*table, same("embed_out.weight", "final/head/embedding")]
