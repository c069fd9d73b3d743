"""Mistral (Jiang et al. 2023): LLaMA whose layers all see a window, or none of them."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import llama
from unidetox_jax.models.config import LOCAL, ROPE, read_hf, windows
from unidetox_jax.models.llama import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

READ = (*llama.SHARED, "hidden_act", "head_dim", "sliding_window")

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(llama.LlamaConfig):
    """Mistral's own settings."""

    family: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> MistralConfig:
    """MistralConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "mistral", where, (*READ, *ROPE))
    return MistralConfig(
        **llama.fields(hf),
        activation=hf.hidden_act,
        head_size=hf.head_dim,
        **windows([LOCAL] * hf.num_hidden_layers, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf.rope_parameters, hf.max_position_embeddings, where),
    )


def to_hf(cfg: MistralConfig) -> dict[str, Any]:
    """The Hugging Face config of a MistralConfig."""
    return {
        **llama.options(cfg),
        "hidden_act": cfg.activation,
        "head_dim": cfg.head_size,
        "sliding_window": cfg.window or None,
        **cfg.rotary.to_hf(),
    }
