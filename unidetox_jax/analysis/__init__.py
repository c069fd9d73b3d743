"""What sets of text are like, side by side: their words, their leaning, what they copy. Pure functions over texts."""

from unidetox_jax.analysis import bootstrap, copying, description, keywords, leaning

__all__ = ["bootstrap", "copying", "description", "keywords", "leaning"]
