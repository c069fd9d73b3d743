"""Mistral (Jiang et al. 2023): LLaMA with sliding-window attention in all layers, or in none."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import llama
from unidetox_jax.models.config import LOCAL, ROPE, from_options, read_hf, to_options, windows
from unidetox_jax.models.llama import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

OPTIONS = {**llama.SHARED, "hidden_act": "activation", "head_dim": "head_size"}
CLASSES = ("Mistral",)
READ = (*OPTIONS, "sliding_window")

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(llama.LlamaConfig):
    """Mistral's settings."""

    family: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> MistralConfig:
    """MistralConfig of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "mistral", where, (*READ, *ROPE))
    return MistralConfig(
        **from_options(hf, OPTIONS),
        **windows([LOCAL] * hf.num_hidden_layers, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf, where),
    )


def to_hf(cfg: MistralConfig) -> dict[str, Any]:
    """The Hugging Face config of a MistralConfig."""
    return {**to_options(cfg, OPTIONS), "sliding_window": cfg.window or None, **cfg.rotary.to_hf()}
