"""A text generator: models, the objective over their logits, and an optional prefix for each.

A `Generator` is accepted wherever a model generates or scores text; a plain `Model` is one with the objective `base`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from unidetox_jax.data import tokens as data_tokens
from unidetox_jax.decoding import objectives
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.text_sampling import common_vocabulary
from unidetox_jax.models import Model, ModelConfig


class Generator(NamedTuple):
    """Models in the order of the objective's arguments.

    prefixes: token ids that each model reads before a text, after `begin`. begin: the tokens with which the tokenizer
    begins a text. vocab_size: number of tokens that all models share; None: all of the only model.
    """

    models: tuple[Model, ...]
    objective: Objective = objectives.get("base")
    prefixes: tuple[tuple[int, ...], ...] = ((),)
    begin: tuple[int, ...] = ()
    vocab_size: int | None = None

    @property
    def cfg(self) -> ModelConfig:
        """The first model's configuration, with the context length that remains for a text."""
        first = self.models[0].cfg
        lengths = [
            model.cfg.max_position_embeddings - len(prefix)
            for model, prefix in zip(self.models, self.prefixes, strict=True)
        ]
        size = self.vocab_size or first.vocab_size
        return dataclasses.replace(first, max_position_embeddings=min(lengths), vocab_size=size)

    @property
    def params(self) -> Any:
        """The first model's parameters."""
        return self.models[0].params

    def model_input(self, index: int, tokens: Any) -> list[int]:
        """The tokens that model `index` reads for a text: with its prefix inserted after `begin`."""
        tokens, begin = list(tokens), len(self.begin)
        start = begin if tuple(tokens[:begin]) == self.begin else 0
        return [*tokens[:start], *self.prefixes[index], *tokens[start:]]


def as_generator(model: Model | Generator) -> Generator:
    """Wraps a plain model; returns a generator unchanged."""
    return model if isinstance(model, Generator) else Generator((model,))


def make(
    models: Sequence[Model], tokenizers: Sequence[Any], names: Sequence[str], objective: str, prefixes: Sequence[str]
) -> Generator:
    """A generator of loaded models. prefixes: one text per model, or empty.

    Raises:
      UserError: different tokenizers, or the wrong number of models for the objective.
    """
    resolved = objectives.get(objective)
    resolved.check_models(len(models))
    encoded = [tuple(data_tokens.encode(tokenizers[0], [text], begin=False)[0]) for text in prefixes]
    return Generator(
        tuple(models),
        resolved,
        tuple(encoded) or ((),) * len(models),
        tuple(data_tokens.prefix(tokenizers[0])),
        common_vocabulary(tokenizers, names) if len(models) > 1 else None,
    )
