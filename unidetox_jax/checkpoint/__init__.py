"""Models on disk: Hugging Face's layout and Orbax's, both streamed, both sharded."""

from unidetox_jax.checkpoint.orbax_io import Checkpointer
from unidetox_jax.checkpoint.peft import attach, save_adapter
from unidetox_jax.checkpoint.source import split
from unidetox_jax.checkpoint.store import load, load_all, load_config, save, save_hf
from unidetox_jax.checkpoint.tokenizer import load_tokenizer

__all__ = [
    "Checkpointer",
    "attach",
    "load",
    "load_all",
    "load_config",
    "load_tokenizer",
    "save",
    "save_adapter",
    "save_hf",
    "split",
]
