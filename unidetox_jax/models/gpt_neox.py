"""GPT-NeoX (Black et al. 2022), the architecture of Pythia: layer norms, partially rotated heads, attention and
feed-forward in parallel or in sequence."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models import layers
from unidetox_jax.models.config import ROPE, ModelConfig, from_options, head_size, read_hf, to_options
from unidetox_jax.models.falcon import fused
from unidetox_jax.models.key_tables import Key, heads_out, linear, norm, same
from unidetox_jax.models.layers import PROJECTIONS, Attention, FeedForward, layer_norm
from unidetox_jax.models.rotary import Rotary

OPTIONS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_epsilon",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "residual_dropout",
    "use_parallel_residual": "parallel",
    "attention_bias": "attention_bias",
}
CLASSES = ("GPTNeoX",)
READ = tuple(OPTIONS)
FORMER = ("rotary_pct", "rotary_emb_base")  # transformers reads them into rope_parameters
PREFIX = "gpt_neox."
IGNORED = (r".*\.attention\.(bias|masked_bias)",)  # constants of older checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """GPT-NeoX's settings."""

    family: ClassVar[str] = "gpt_neox"
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    rotary: Rotary = Rotary()
    parallel: bool = True  # attention and feed-forward read the same input, with a norm each
    attention_bias: bool = True


def from_hf(config: dict[str, Any], where: str) -> GPTNeoXConfig:
    """GPTNeoXConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gpt_neox", where, (*READ, *FORMER, *ROPE))
    return GPTNeoXConfig(
        **from_options(hf, OPTIONS),
        num_kv_heads=hf.num_attention_heads,
        head_size=head_size(hf, where),
        embedding_dropout=hf.hidden_dropout,
        rotary=Rotary.from_hf(hf, where, partial=True),
    )


def to_hf(cfg: GPTNeoXConfig) -> dict[str, Any]:
    """The Hugging Face config of a GPTNeoXConfig."""
    rope = cfg.rotary.to_hf()
    return {
        **to_options(cfg, OPTIONS),
        "rotary_pct": cfg.rotary.partial_rotary_factor,
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
    }


Embed, Final = layers.Embed, layers.Final


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


def key_table(cfg: GPTNeoXConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block = "gpt_neox.layers.{layer}", "blocks"
    name, path = f"{layer}.attention", f"{block}/attention"
    table = [
        same("gpt_neox.embed_in.weight", "embed/tokens/embedding"),
        *norm(f"{layer}.input_layernorm", f"{block}/attention_norm"),
        *norm(f"{layer}.post_attention_layernorm", f"{block}/mlp_norm"),
        fused(cfg, f"{name}.query_key_value.weight", [f"{path}/{projection}/kernel" for projection in PROJECTIONS]),
        heads_out(f"{name}.dense.weight", f"{path}/output/kernel", cfg.num_heads, cfg.head_size),
    ]
    if cfg.attention_bias:
        table.append(
            fused(cfg, f"{name}.query_key_value.bias", [f"{path}/{projection}/bias" for projection in PROJECTIONS])
        )
        table.append(same(f"{name}.dense.bias", f"{path}/output/bias"))
    for theirs, ours in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
        table.append(linear(f"{layer}.mlp.{theirs}.weight", f"{block}/mlp/{ours}/kernel"))
        table.append(same(f"{layer}.mlp.{theirs}.bias", f"{block}/mlp/{ours}/bias"))
    table += norm("gpt_neox.final_layer_norm", "final/norm")
    return table if cfg.tie_word_embeddings else [*table, same("embed_out.weight", "final/head/embedding")]
