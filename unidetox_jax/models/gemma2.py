"""Gemma 2 (Gemma Team 2024): a sliding window in every other layer, soft-capped scores and logits, post-norms."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import gemma
from unidetox_jax.models.config import ROPE, from_options, read_hf, to_options, windows, windows_to_hf
from unidetox_jax.models.gemma import OFF, PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

OPTIONS = {
    **gemma.SHARED,
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_size",
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "logit_cap",
}
CLASSES = ("Gemma2",)
READ = (*OPTIONS, "sliding_window", "layer_types")

__all__ = ["OFF", "PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(gemma.GemmaConfig):
    """Gemma 2's settings."""

    family: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    post_norms: bool = True


def from_hf(config: dict[str, Any], where: str) -> Gemma2Config:
    """Gemma2Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma2", where, (*READ, *ROPE), OFF)
    return Gemma2Config(
        **from_options(hf, OPTIONS),
        output_bias=hf.attention_bias,
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf, where),
    )


def to_hf(cfg: Gemma2Config) -> dict[str, Any]:
    """The Hugging Face config of a Gemma2Config."""
    return {**to_options(cfg, OPTIONS), **windows_to_hf(cfg), **cfg.rotary.to_hf()}
