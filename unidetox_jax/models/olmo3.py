"""OLMo 3 (OLMo Team 2025): OLMo 2 with a sliding window in three of four layers; only global layers scale rotary."""

import dataclasses
from typing import Any, ClassVar

from unidetox_jax.errors import UserError
from unidetox_jax.models import olmo2
from unidetox_jax.models.config import GLOBAL, LOCAL, ROPE, read_hf, windows, windows_to_hf
from unidetox_jax.models.olmo2 import PREFIX, Block, Embed, Final, key_table
from unidetox_jax.models.rotary import Rotary

CLASSES = ("Olmo3",)
READ = (*olmo2.READ, "sliding_window", "layer_types")

__all__ = ["PREFIX", "READ", "Block", "Embed", "Final", "from_hf", "key_table", "to_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo3Config(olmo2.Olmo2Config):
    """OLMo 3's settings."""

    family: ClassVar[str] = "olmo3"
    architecture: ClassVar[str] = "Olmo3ForCausalLM"


def from_hf(config: dict[str, Any], where: str) -> Olmo3Config:
    """Olmo3Config of a Hugging Face config. Raises UserError on an option that is not implemented."""
    hf = read_hf(config, "olmo3", where, (*READ, *ROPE))
    rotary, local_rotary = (Rotary.from_hf(hf, where, layer_type) for layer_type in (GLOBAL, LOCAL))
    if local_rotary != Rotary(rotary.theta, original_max_position_embeddings=hf.max_position_embeddings):
        raise UserError(f"{where}: rope_parameters of {LOCAL} are not implemented (known: the base of {GLOBAL} alone)")
    return Olmo3Config(
        **olmo2.fields(hf, where),
        **windows(hf.layer_types, hf.sliding_window, where),
        rotary=rotary,
        local_rotary=local_rotary,
    )


def to_hf(cfg: Olmo3Config) -> dict[str, Any]:
    """The Hugging Face config of an Olmo3Config."""
    return {**olmo2.to_hf(cfg), **windows_to_hf(cfg)}
