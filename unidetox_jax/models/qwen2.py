"""Qwen2 and 2.5 (Yang et al. 2024), and 1.5: LLaMA with biases on queries, keys and values."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.models import llama
from unidetox_jax.models.config import LOCAL, ROPE, from_options, head_size, read_hf, to_options, windows, windows_to_hf
from unidetox_jax.models.llama import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
OPTIONS = {**llama.SHARED, "hidden_act": "activation"}
CLASSES = ("Qwen2",)
READ = (*OPTIONS, *WINDOWS)

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(llama.LlamaConfig):
    """Qwen2's settings."""

    family: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    attention_bias: bool = True


def from_hf(config: dict[str, Any], where: str) -> Qwen2Config:
    """Qwen2Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "qwen2", where, (*READ, *ROPE))
    return Qwen2Config(
        **from_options(hf, OPTIONS),
        head_size=head_size(hf, where),
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=Rotary.from_hf(hf, where),
    )


def to_hf(cfg: Qwen2Config) -> dict[str, Any]:
    """The Hugging Face config of a Qwen2Config."""
    return {**to_options(cfg, OPTIONS), **window_options(cfg), **cfg.rotary.to_hf()}


def window_options(cfg: llama.LlamaConfig) -> dict[str, Any]:
    """Qwen's options of local layers; older versions know max_window_layers in place of layer_types."""
    options = windows_to_hf(cfg)
    first = options["layer_types"].index(LOCAL) if cfg.window else cfg.num_layers
    return {"use_sliding_window": bool(cfg.window), "max_window_layers": first, **options}
