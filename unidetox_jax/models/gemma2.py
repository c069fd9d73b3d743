"""Gemma 2 (Gemma Team 2024): every other layer sees a window, scores and logits are capped softly, and what attention
and feed-forward give is normed too."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import gemma, llama
from unidetox_jax.models.config import ROPE, layer_types, read_hf, windows
from unidetox_jax.models.gemma import OFF, PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

READ = (
    *llama.SHARED,
    *"head_dim attention_bias hidden_activation query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping "
    "sliding_window layer_types".split(),
)

__all__ = ["OFF", "PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(gemma.GemmaConfig):
    """Gemma 2's own settings."""

    family: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    norms_after: bool = True


def from_hf(config: dict[str, Any], where: str) -> Gemma2Config:
    """Gemma2Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma2", where, (*READ, *ROPE), OFF)
    return Gemma2Config(
        **gemma.fields(hf),
        activation=hf.hidden_activation,
        query_size=hf.query_pre_attn_scalar,
        attention_cap=hf.attn_logit_softcapping,
        logit_cap=hf.final_logit_softcapping,
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where),
    )


def to_hf(cfg: Gemma2Config) -> dict[str, Any]:
    """The Hugging Face config of a Gemma2Config."""
    return {
        **gemma.options(cfg),
        "hidden_activation": cfg.activation,
        "query_pre_attn_scalar": cfg.query_size,
        "attn_logit_softcapping": cfg.attention_cap,
        "final_logit_softcapping": cfg.logit_cap,
        "sliding_window": cfg.window or None,
        "layer_types": layer_types(cfg),
        **cfg.rotary.to_hf(),
    }
