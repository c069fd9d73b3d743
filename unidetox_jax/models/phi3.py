"""Phi-3 (Abdin et al. 2024) and Phi-4-mini: LLaMA with fused projections; Phi-4-mini rotates a part of each head.

Their rotary scaling, longrope, switches to other factors beyond the original length, which would invalidate what a
cache already holds. Longer inputs are refused.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from unidetox_jax.models import llama
from unidetox_jax.models.config import LOCAL, ROPE, from_options, head_size, read_hf, to_options, windows
from unidetox_jax.models.key_tables import Key, heads_out, linear
from unidetox_jax.models.llama import PREFIX, Block, Embed, Final
from unidetox_jax.models.rotary import Rotary

FORMER_TYPES = ("su", "yarn")  # earlier names of longrope
OPTIONS = {**llama.SHARED, "hidden_act": "activation", "resid_pdrop": "residual_dropout"}
CLASSES = ("Phi3",)
READ = (*OPTIONS, "sliding_window", "original_max_position_embeddings")

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(llama.LlamaConfig):
    """Phi-3's settings."""

    family: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> Phi3Config:
    """Phi3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("type") in FORMER_TYPES:
        config = {**config, "rope_scaling": {**scaling, "type": "longrope"}}
    hf = read_hf(config, "phi3", where, (*READ, *ROPE))
    return Phi3Config(
        **from_options(hf, OPTIONS),
        head_size=head_size(hf, where),
        **windows([LOCAL] * hf.num_hidden_layers, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf, where, partial=True),
    )


def to_hf(cfg: Phi3Config) -> dict[str, Any]:
    """The Hugging Face config of a Phi3Config."""
    return {
        **to_options(cfg, OPTIONS),
        "sliding_window": cfg.window or None,
        "original_max_position_embeddings": cfg.rotary.original_max_position_embeddings,
        "partial_rotary_factor": cfg.rotary.partial_rotary_factor,
        **cfg.rotary.to_hf(),
    }


def key_table(cfg: Phi3Config) -> list[Key]:
    """Hugging Face's tensors and ours."""
    layer, block, size = llama.LAYER, llama.BLOCK, cfg.head_size
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    boundaries = np.cumsum(heads)[:-1] * size
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return [
        *llama.outer_keys(cfg),
        *llama.layer_keys(norms),
        Key(
            f"{layer}.self_attn.qkv_proj.weight",
            tuple(f"{block}/attention/{name}/kernel" for name in ("query", "key", "value")),
            lambda x: tuple(
                part.reshape(count, size, -1).transpose(2, 0, 1)
                for part, count in zip(np.split(x, boundaries), heads, strict=True)
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
