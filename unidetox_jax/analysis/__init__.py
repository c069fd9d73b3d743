"""What sets of text are like, side by side: their words, their leaning, what they copy. Pure functions over texts."""

from unidetox_jax.analysis import copying, description, keywords, leaning

__all__ = ["copying", "description", "keywords", "leaning"]
