"""What writes the text that is evaluated: models, the objective over their logits, and what each reads first.

A `Generator` stands wherever a model is asked for text or for likelihoods; a `Model` alone is one under `base`.
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

    prefixes: token ids that each model reads before a text, after its `begin`; empty: nothing. begin: what the
    tokenizer begins a text with. vocab_size: tokens that all models share; None: all of the one model.
    """

    models: tuple[Model, ...]
    objective: Objective = objectives.get("base")
    prefixes: tuple[tuple[int, ...], ...] = ((),)
    begin: tuple[int, ...] = ()
    vocab_size: int | None = None

    @property
    def cfg(self) -> ModelConfig:
        """The first model's, with the context that is left to a text."""
        first = self.models[0].cfg
        left = [
            model.cfg.max_position_embeddings - len(prefix)
            for model, prefix in zip(self.models, self.prefixes, strict=True)
        ]
        size = self.vocab_size or first.vocab_size
        return dataclasses.replace(first, max_position_embeddings=min(left), vocab_size=size)

    @property
    def params(self) -> Any:
        """The first model's."""
        return self.models[0].params

    def read_by(self, index: int, tokens: Any) -> list[int]:
        """A text as model `index` reads it: with its prefix, after what the text begins with."""
        tokens, begin = list(tokens), len(self.begin)
        at = begin if tuple(tokens[:begin]) == self.begin else 0
        return [*tokens[:at], *self.prefixes[index], *tokens[at:]]


def alone(model: Model | Generator) -> Generator:
    """A model as a generator; a generator as it is."""
    return model if isinstance(model, Generator) else Generator((model,))


def make(
    models: Sequence[Model], tokenizers: Sequence[Any], names: Sequence[str], objective: str, prefixes: Sequence[str]
) -> Generator:
    """A generator of loaded models. prefixes: text, one for each model, or none at all.

    Raises:
      UserError: models of different tokenizers, or more or fewer than the objective takes.
    """
    chosen = objectives.get(objective)
    chosen.check_models(len(models))
    encoded = [tuple(data_tokens.encode(tokenizers[0], [text], begin=False)[0]) for text in prefixes]
    return Generator(
        tuple(models),
        chosen,
        tuple(encoded) or ((),) * len(models),
        tuple(data_tokens.prefix(tokenizers[0])),
        common_vocabulary(tokenizers, names) if len(models) > 1 else None,
    )
