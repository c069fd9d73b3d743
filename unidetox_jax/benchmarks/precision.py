"""The same training in every precision: loss, and change of the weights compared with float32's.

    python -m unidetox_jax.benchmarks.precision MODEL DATA [--steps=200] [--batch_size=8] [--max_length=128]
        [--rates 1e-5 5e-5] [--seeds 0 1 2] [--validation=DATA]

Prints Markdown, a line for each learning rate and precision, means over seeds (of the texts' order, dropout and
rounding): the loss on the validation texts (by default the first 64 of DATA) before and after; the norm of the weights'
change relative to float32's; its cosine with float32's change; and their product, the share of float32's change that it
contains. A change is measured from the weights that training starts with, in bfloat16 the rounded ones.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unidetox_jax import data, method, training
from unidetox_jax.errors import UserError

VALIDATION_TEXTS = 64  # of the training texts, if no validation texts are given


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description="the same training in every precision")
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("data", help="training texts, as config.toxify.data names them")
    parser.add_argument("--validation", default="", help="texts to measure the loss on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 5e-5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    try:
        print(table(parser.parse_args(argv)))
    except UserError as error:
        print(f"precision: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def table(options: argparse.Namespace) -> str:
    """The Markdown table."""
    model = method.load(options.model, param_dtype="float32")
    texts = data.texts(options.data)
    validation = data.texts(options.validation) if options.validation else texts[:VALIDATION_TEXTS]
    lines = [
        "| learning rate | precision | loss before | after | each seed | change / float32's | cosine | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in options.rates:
        runs = [compare(model, texts, validation, options, rate, seed) for seed in options.seeds]
        for name in training.PRECISIONS:
            rows = [run[name] for run in runs]
            before, after, length, cosine = np.mean(rows, axis=0)
            each = ", ".join(f"{row[1]:.4f}" for row in rows)
            lines.append(
                f"| {rate:g} | {name} | {before:.4f} | {after:.4f} | {each} | {length:.3f} | {cosine:.3f} "
                f"| {length * cosine:.1%} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def compare(
    model: method.LanguageModel, texts, validation, options: argparse.Namespace, rate: float, seed: int
) -> dict[str, tuple[float, float, float, float]]:
    """precision → (loss before, loss after, norm of the change relative to float32's, its cosine with float32's)."""
    rows, reference = {}, None
    for name in training.PRECISIONS:
        trained = method.finetune(
            model,
            texts,
            validation=validation,
            label=f"{name}, {rate:g}, seed {seed}",
            learning_rate=rate,
            steps=options.steps,
            batch_size=options.batch_size,
            max_length=options.max_length,
            evaluate_every=options.steps,
            seed=seed,
            precision=name,
        )
        change = _change(model.params, trained.params)
        reference = change if reference is None else reference  # float32 is the first
        norm, reference_norm = _norm(change), _norm(reference)
        product = sum(float(np.vdot(a, b)) for a, b in zip(change, reference, strict=True))
        cosine = product / max(norm * reference_norm, 1e-30)
        history = trained.history
        rows[name] = (history["validation_loss_before"], history["validation_loss"], norm / reference_norm, cosine)
    return rows


def _change(before: Any, after: Any) -> list[np.ndarray]:
    """The change of each leaf in float32, from `before` rounded to the dtype of `after`."""
    return [
        np.asarray(new, np.float32) - np.asarray(old.astype(new.dtype), np.float32)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]


def _norm(leaves: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in leaves)))


if __name__ == "__main__":
    sys.exit(main())
