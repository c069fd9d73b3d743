"""Gemma 3, text (Gemma Team 2025): five sliding-window layers to one global layer, each kind with its own rotary base,
and norms of queries and keys."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.errors import UserError
from unidetox_jax.models import gemma
from unidetox_jax.models.config import GLOBAL, LOCAL, ROPE, from_options, read_hf, to_options, windows, windows_to_hf
from unidetox_jax.models.gemma import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

OPTIONS = {
    **gemma.SHARED,
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_size",
    "final_logit_softcapping": "logit_cap",
}
CLASSES = ("Gemma3",)
READ = (*OPTIONS, "sliding_window", "layer_types")
# transformers reads these into layer_types and rope_parameters
FORMER = ("sliding_window_pattern", "rope_local_base_freq")
OFF = ("use_bidirectional_attention", "attn_logit_softcapping")

__all__ = ["OFF", "PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(gemma.GemmaConfig):
    """Gemma 3's settings."""

    family: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    local_rotary: Rotary = Rotary()
    post_norms: bool = True
    head_norms: bool = True


def from_hf(config: dict[str, Any], where: str) -> Gemma3Config:
    """Gemma3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma3_text", where, (*READ, *FORMER, *ROPE), OFF)
    rotary, local_rotary = (Rotary.from_hf(hf, where, layer_type) for layer_type in (GLOBAL, LOCAL))
    if local_rotary.kind != "default":
        raise UserError(f"{where}: rope_type {local_rotary.kind!r} of {LOCAL} is not implemented (known: default)")
    return Gemma3Config(
        **from_options(hf, OPTIONS),
        output_bias=hf.attention_bias,
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=rotary,
        local_rotary=local_rotary,
    )


def to_hf(cfg: Gemma3Config) -> dict[str, Any]:
    """The Hugging Face config of a Gemma3Config."""
    return {
        **to_options(cfg, OPTIONS),
        **windows_to_hf(cfg),
        **cfg.rotary.to_hf(),
        "rope_local_base_freq": cfg.local_rotary.theta,
    }
