"""Text from one or several models: objectives (pure), warpers (pure), and `generate`, one compiled program."""

from unidetox_jax.decoding.generate import Generation, generate

__all__ = ["Generation", "generate"]
