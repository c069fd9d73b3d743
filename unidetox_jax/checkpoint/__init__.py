"""Models on disk in Hugging Face's and Orbax's formats, streamed to and from sharded devices."""

from unidetox_jax.checkpoint.model_io import load, load_all, load_config, save, save_hf
from unidetox_jax.checkpoint.orbax_io import Checkpointer
from unidetox_jax.checkpoint.peft import attach, save_adapter
from unidetox_jax.checkpoint.source import split_adapter
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
    "split_adapter",
]
