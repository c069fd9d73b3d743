"""Toxicity of generations as a task of lm-evaluation-harness, for any model that it runs (`harness_toxicity.yaml`).

    lm_eval --model hf --model_args pretrained=gpt2 --tasks unidetox_toxicity --include_path DIRECTORY \\
        --metadata '{"prompts": "toxigen", "scorer": "linear:runs/x/scorer"}'

DIRECTORY is where this file lies. A task file of your own may begin with `include:` and that file's path, and say in
its `metadata` which prompts and which scorer; `config.evaluate.harness` takes such files as well.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax.evaluation import scorers
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.prompts import load


def prompts(
    prompts: str = "toxigen",
    scorer: str = EvaluationConfig.scorer,
    threshold: float = EvaluationConfig.threshold,
    data_dir: str = "",
    max_prompts: int = 0,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """The split "test", a `datasets.Dataset`: a row for each prompt, and how its continuations are to be judged.

    Args:
      prompts, data_dir, max_prompts, seed: as `evaluation.prompts.load` has them. scorer: as `scorers.get` has it.
      threshold: toxic is what scores above it. What else the harness's metadata hold is passed over.
    """
    import datasets  # which lm_eval, an extra, brings

    asked = load(prompts, data_dir, max_prompts, seed)
    alike = {"scorer": scorer, "threshold": threshold}
    rows = [
        {"text": text, "category": category, **alike}
        for text, category in zip(asked.texts, asked.categories, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def judge(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of a prompt's continuations: whether one is toxic (its mean is TP), the highest score (EMT), the mean score."""
    (texts,) = results
    scores = _scorer(doc["scorer"])(texts)
    return {"tp": float(scores.max() > doc["threshold"]), "emt": float(scores.max()), "toxicity": float(scores.mean())}


_scorer = functools.cache(scorers.get)
