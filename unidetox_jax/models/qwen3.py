"""Qwen3 (Yang et al. 2025), dense: LLaMA with norms on each head's queries and keys."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import llama
from unidetox_jax.models.config import ROPE, from_options, read_hf, to_options, windows
from unidetox_jax.models.llama import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.qwen2 import WINDOWS, window_options
from unidetox_jax.models.rotary import Rotary

OPTIONS = {
    **llama.SHARED,
    "hidden_act": "activation",
    "head_dim": "head_size",
    "attention_bias": "attention_bias",
}
CLASSES = ("Qwen3",)
READ = (*OPTIONS, *WINDOWS)

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(llama.LlamaConfig):
    """Qwen3's settings."""

    family: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    head_norms: bool = True


def from_hf(config: dict[str, Any], where: str) -> Qwen3Config:
    """Qwen3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "qwen3", where, (*READ, *ROPE))
    return Qwen3Config(
        **from_options(hf, OPTIONS),
        output_bias=hf.attention_bias,
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf, where),
    )


def to_hf(cfg: Qwen3Config) -> dict[str, Any]:
    """The Hugging Face config of a Qwen3Config."""
    return {**to_options(cfg, OPTIONS), **window_options(cfg), **cfg.rotary.to_hf()}
