"""Phi-3 (Abdin et al. 2024) and Phi-4-mini: LLaMA with fused projections, the latter with a part of each head rotated.

Their rotary scaling, longrope, has one set of factors up to the original length and another beyond, which would change
what is in a cache already: beyond it is refused.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np

from unidetox_jax.models import llama
from unidetox_jax.models.config import LOCAL, ROPE, head_size, read_hf, windows
from unidetox_jax.models.layers import Attention, FeedForward, rms_norm
from unidetox_jax.models.llama import PREFIX, Embed, Final
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.weight_map import Key, heads_out, linear

OLDER_KINDS = ("su", "yarn")  # what longrope was called
READ = (*llama.SHARED, *"hidden_act resid_pdrop sliding_window original_max_position_embeddings".split())

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(llama.LlamaConfig):
    """Phi-3's own settings."""

    family: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> Phi3Config:
    """Phi3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("type") in OLDER_KINDS:
        config = {**config, "rope_scaling": {**scaling, "type": "longrope"}}
    hf = read_hf(config, "phi3", where, (*READ, *ROPE))
    length, original = hf.max_position_embeddings, hf.original_max_position_embeddings
    return Phi3Config(
        **llama.fields(hf),
        activation=hf.hidden_act,
        head_size=head_size(hf, where),
        residual_dropout=hf.resid_pdrop,
        **windows([LOCAL] * hf.num_hidden_layers, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf.rope_parameters, length, where, original=original, partial=True),
    )


def to_hf(cfg: Phi3Config) -> dict[str, Any]:
    """The Hugging Face config of a Phi3Config."""
    return {
        **llama.options(cfg),
        "hidden_act": cfg.activation,
        "resid_pdrop": cfg.residual_dropout,
        "sliding_window": cfg.window or None,
        "original_max_position_embeddings": cfg.rotary.original_length,
        "partial_rotary_factor": cfg.rotary.share,
        **cfg.rotary.to_hf(),
    }


class Block(nn.Module):
    """One layer: [B,T,hidden] -> ([B,T,hidden], state of attend)."""

    cfg: Phi3Config

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=deterministic)
        attention = Attention(cfg, False, False, dropout_rate=cfg.attention_dropout, name="attention")
        out, state = attention(rms_norm(cfg, "attention_norm")(x), attend, rotary, cfg.head_size**-0.5, deterministic)
        x = x + dropout(out)
        out = FeedForward(cfg, False, gated=True, name="mlp")(rms_norm(cfg, "mlp_norm")(x))
        return x + dropout(out), state


def key_table(cfg: Phi3Config) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block, size = llama.LAYER, llama.BLOCK, cfg.head_size
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    ends = np.cumsum(heads)[:-1] * size
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return [
        *llama.outer_keys(cfg),
        *llama.layer_keys(norms),
        Key(
            f"{layer}.self_attn.qkv_proj.weight",
            tuple(f"{block}/attention/{part}/kernel" for part in ("query", "key", "value")),
            lambda x: tuple(
                part.reshape(count, size, -1).transpose(2, 0, 1)
                for part, count in zip(np.split(x, ends), heads, strict=True)
            ),
            lambda *xs: np.concatenate([x.transpose(1, 2, 0).reshape(-1, x.shape[0]) for x in xs]),
        ),
        heads_out(f"{layer}.self_attn.o_proj.weight", f"{block}/attention/output/kernel", cfg.num_heads, size),
        Key(
            f"{layer}.mlp.gate_up_proj.weight",
            (f"{block}/mlp/gate/kernel", f"{block}/mlp/up/kernel"),
            lambda x: tuple(part.T for part in np.split(x, 2)),
            lambda *xs: np.concatenate([x.T for x in xs]),
        ),
        linear(f"{layer}.mlp.down_proj.weight", f"{block}/mlp/down/kernel"),
    ]
