"""OLMo 2 (OLMo Team 2024): LLaMA with post-norms in place of pre-norms, and norms over all heads' queries and keys."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from unidetox_jax.models import llama
from unidetox_jax.models.config import ROPE, from_options, head_size, read_hf, to_options
from unidetox_jax.models.key_tables import Key, reshaped
from unidetox_jax.models.layers import Attention, FeedForward, rms_norm, rms_norm_of_heads
from unidetox_jax.models.llama import PREFIX, Embed, Final
from unidetox_jax.models.rotary import Rotary

OPTIONS = {**llama.SHARED, "hidden_act": "activation", "attention_bias": "attention_bias"}
CLASSES = ("Olmo2",)
READ = tuple(OPTIONS)

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(llama.LlamaConfig):
    """OLMo 2's settings."""

    family: ClassVar[str] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> Olmo2Config:
    """Olmo2Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "olmo2", where, (*READ, *ROPE))
    return Olmo2Config(**fields(hf, where), rotary=Rotary.from_hf(hf, where))


def fields(hf: Any, where: str) -> dict[str, Any]:
    """The fields that OLMo 2 and 3 share."""
    return {**from_options(hf, OPTIONS), "head_size": head_size(hf, where), "output_bias": hf.attention_bias}


def to_hf(cfg: Olmo2Config) -> dict[str, Any]:
    """The Hugging Face config of an Olmo2Config."""
    return {**to_options(cfg, OPTIONS), **cfg.rotary.to_hf()}


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: Olmo2Config

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        attention = Attention(
            cfg, cfg.attention_bias, cfg.output_bias, dropout_rate=cfg.attention_dropout,
            norm=rms_norm_of_heads, name="attention",
        )  # fmt: skip
        out, state = attention(x, attend, rotary, cfg.head_size**-0.5, deterministic)
        x = x + rms_norm(cfg, "attention_out_norm")(out)
        out = FeedForward(cfg, cfg.mlp_bias, gated=True, name="mlp")(x)
        return x + rms_norm(cfg, "mlp_out_norm")(out), state


def key_table(cfg: Olmo2Config) -> list[Key]:
    """Hugging Face's tensors and ours."""
    table = [*llama.outer_keys(cfg), *llama.attention_keys(cfg), *llama.mlp_keys(cfg)]
    norms = {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
    for theirs, ours, heads in (("q", "query", cfg.num_heads), ("k", "key", cfg.num_kv_heads)):
        name, path = f"{llama.LAYER}.self_attn.{theirs}_norm.weight", f"{llama.BLOCK}/attention/{ours}_norm/scale"
        table.append(reshaped(name, path, (-1,), (heads, cfg.head_size)))
    return [*table, *llama.layer_keys(norms)]
