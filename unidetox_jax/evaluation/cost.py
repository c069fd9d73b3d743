"""What a method costs where it is used: time of a token and memory, of one text at a time.

Not among the default metrics: its numbers are the machine's, and come out a little different each time.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unidetox_jax import decoding
from unidetox_jax.decoding import warpers
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.evaluation.generator import Generator, alone
from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject
from unidetox_jax.models import Model

NEW_TOKENS, ROUNDS = 32, 3
LATENCY = Quantity(
    "latency", "ms a token", True, 2, primary=False, explanation="ms a token: of one text, written alone."
)
MEMORY = Quantity(
    "memory", "Weights (MiB)", True, 1, primary=False, explanation="Weights: all that decoding reads, in its dtype."
)


class Cost(Metric):
    """Milliseconds a token of one text, the fastest of a few rounds after one that compiles; bytes of weights."""

    loads = "subject"

    def compute(self, subject: Subject) -> Result:
        def measured() -> dict[str, Any]:
            settings, (model, tokenizer) = subject.settings, subject.load()
            sampling = warpers.choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
            return of_generator(model, tokenizer.eos_token_id or 0, sampling)

        return Result(subject.keep("cost.json", measured))

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        return {LATENCY: Cell(summary["milliseconds"]), MEMORY: Cell(summary["weights"] / 2**20)}


def of_generator(model: Model | Generator, first: int, sampling: Any = ()) -> dict[str, Any]:
    """{"milliseconds" (a token of one row), "weights" (bytes; what models share counts once), "models", "device"}.

    first: the token that the text goes on from.
    """
    generator = alone(model)
    models = prepare(generator.models, side_by_side=not any(generator.prefixes))
    prompts = [np.array([generator.read_by(index, [first])]) for index in range(len(models))]
    seconds = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        decoding.generate(
            models,
            prompts,
            objective=generator.objective,
            warpers=sampling,
            max_new_tokens=NEW_TOKENS,
            eos_id=(),
            vocab_size=generator.vocab_size,
        )
        seconds.append(time.perf_counter() - started)
    leaves = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(models[0].params.trees)}
    return {
        "milliseconds": 1000 * min(seconds[1:]) / NEW_TOKENS,
        "weights": sum(leaves.values()),
        "models": len(models),
        "device": jax.devices()[0].device_kind,
    }
