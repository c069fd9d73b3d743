"""Toxicity of continuations as a task of lm-evaluation-harness, for any of its models (`harness_toxicity.yaml`).

    lm_eval --model hf --model_args pretrained=gpt2 --tasks unidetox_toxicity --include_path DIRECTORY \\
        --metadata '{"prompts": "toxigen", "scorer": "linear:runs/x/scorer"}'

DIRECTORY contains this file. A task file of your own can `include:` the path of harness_toxicity.yaml and set prompts
and scorer in its `metadata`; `config.evaluate.harness` accepts such files as well.
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
    """The split "test", a `datasets.Dataset` with a row per prompt, including the scorer and threshold.

    Args:
      prompts, data_dir, max_prompts, seed: as in `evaluation.prompts.load`. scorer: as in `scorers.get`.
      threshold: scores above it mean toxic. Other entries of the harness's metadata are ignored.
    """
    import datasets  # a dependency of lm_eval, an extra

    loaded = load(prompts, data_dir, max_prompts, seed)
    rows = [
        {"text": text, "category": category, "scorer": scorer, "threshold": threshold}
        for text, category in zip(loaded.texts, loaded.categories, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def judge(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """For a prompt's continuations: whether one is toxic (mean: TP), the highest score (mean: EMT), the mean score."""
    (texts,) = results
    scores = _scorer(doc["scorer"])(texts)
    return {"tp": float(scores.max() > doc["threshold"]), "emt": float(scores.max()), "toxicity": float(scores.mean())}


_scorer = functools.cache(scorers.get)
