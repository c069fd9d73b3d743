"""Gemma 3, text (Gemma Team 2025): five layers that see a window to one that sees all, each kind with its rotary base,
and norms of queries and keys."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.errors import UserError
from unidetox_jax.models import gemma, llama
from unidetox_jax.models.config import GLOBAL, LOCAL, ROPE, layer_types, read_hf, windows
from unidetox_jax.models.gemma import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

READ = (
    *llama.SHARED,
    *"head_dim attention_bias hidden_activation query_pre_attn_scalar final_logit_softcapping sliding_window "
    "layer_types".split(),
)
FORMER = (
    "sliding_window_pattern",
    "rope_local_base_freq",
)  # transformers still reads them, but has them no more
OFF = ("use_bidirectional_attention", "attn_logit_softcapping")

__all__ = ["OFF", "PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(gemma.GemmaConfig):
    """Gemma 3's own settings."""

    family: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    local_rotary: Rotary = Rotary()
    norms_after: bool = True
    head_norms: bool = True


def from_hf(config: dict[str, Any], where: str) -> Gemma3Config:
    """Gemma3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "gemma3_text", where, (*READ, *FORMER, *ROPE), OFF)
    rotary, local_rotary = (
        Rotary.from_hf(hf.rope_parameters[kind], hf.max_position_embeddings, where) for kind in (GLOBAL, LOCAL)
    )
    if local_rotary.kind != "default":
        raise UserError(f"{where}: rope_type {local_rotary.kind!r} of {LOCAL} is not implemented (known: default)")
    return Gemma3Config(
        **gemma.fields(hf),
        activation=hf.hidden_activation,
        query_size=hf.query_pre_attn_scalar,
        logit_cap=hf.final_logit_softcapping,
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=rotary,
        local_rotary=local_rotary,
    )


def to_hf(cfg: Gemma3Config) -> dict[str, Any]:
    """The Hugging Face config of a Gemma3Config."""
    return {
        **gemma.options(cfg),
        "hidden_activation": cfg.activation,
        "query_pre_attn_scalar": cfg.query_size,
        "final_logit_softcapping": cfg.logit_cap,
        "sliding_window": cfg.window or None,
        "layer_types": layer_types(cfg),
        **cfg.rotary.to_hf(),
        "rope_local_base_freq": cfg.local_rotary.theta,
    }
