"""The cost of a method at inference: time per token of a single text, and memory of the weights.

Not a default metric, as its results depend on the machine and vary from run to run.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unidetox_jax import decoding
from unidetox_jax.decoding import warpers
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.evaluation.generator import Generator, as_generator
from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject
from unidetox_jax.models import Model

NEW_TOKENS, ROUNDS = 32, 3
LATENCY = Quantity("latency", "ms a token", True, 2, primary=False, explanation="ms a token: latency of a single text.")
MEMORY = Quantity(
    "memory", "Weights (MiB)", True, 1, primary=False, explanation="Weights: all that decoding reads, in its dtype."
)


class Cost(Metric):
    """Milliseconds per token of a single text (the fastest of several rounds, without compilation) and weight bytes."""

    loads = "subject"

    def compute(self, subject: Subject) -> Result:
        def measure() -> dict[str, Any]:
            settings, (model, tokenizer) = subject.settings, subject.load()
            sampling = warpers.choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
            return measure_cost(model, tokenizer.eos_token_id or 0, sampling)

        return Result(subject.keep("cost.json", measure))

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        return {LATENCY: Cell(summary["milliseconds"]), MEMORY: Cell(summary["weights"] / 2**20)}


def measure_cost(model: Model | Generator, first_token: int, sampling: Any) -> dict[str, Any]:
    """{"milliseconds" (per token of one row), "weights" (bytes; shared arrays count once), "models", "device"}."""
    generator = as_generator(model)
    models = prepare(generator.models, side_by_side=not any(generator.prefixes))
    prompts = [np.array([generator.model_input(index, [first_token])]) for index in range(len(models))]
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
