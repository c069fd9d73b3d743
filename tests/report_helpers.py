"""A finished working directory without running the stages: invented texts, numbers by the real summaries."""

import json

import numpy as np

from unidetox_jax import storage, text_statistics
from unidetox_jax.evaluation import perplexity, toxicity
from unidetox_jax.stages import settings
from unidetox_jax.stages.task import versions

GROUPS = {"id": ["hills", "rivers", "plains"], "ood": ["islands"]}
CATEGORIES = [name for group in GROUPS.values() for name in group]
RUNS, SAMPLES, PER_CATEGORY = 3, 5, 20
AGREEMENT = {
    "scorers": ["lexicon", "tweets"], "kappa": -0.02, "rank_correlation": None, "toxic": [0.3, 0.1], "texts": 1200,
}  # fmt: skip
HOSTILE = "<script>alert('x')</script> & an oaf"  # must be escaped in a page


def make_run(workdir, targets=("tiny-gpt2", "tiny-llama"), **changes):
    """A run over two invented targets; changes are fields of config.report."""
    config = settings.default_config()
    config.name = "invented"
    config.base = "models/tiny-gpt2"
    config.targets = tuple(f"models/{name}" for name in targets)
    config.report.update(changes)
    return settings.parse_run(config, workdir)


def write_stage(directory, name, figures, seconds=12.5):
    """A complete stage's record."""
    record = {
        "stage": name,
        "settings": {"seed": 1, "note": HOSTILE},
        "inputs": {"data": "0123"},
        "figures": figures,
        "seconds": seconds,
        "finished": "2026-01-02T03:04:05+00:00",
        "devices": "1 x cpu",
        "versions": versions(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_json(directory / "stage.json", record)


def write_evaluation(run, name, form, level, ppl=8.0, seed=0, mmlu=0.25, runs=RUNS, degenerate=0.0):
    """One evaluated model whose texts score below 2·level; ppl 0: not measured."""
    generator = np.random.default_rng(seed)
    categories = [category for category in CATEGORIES for _ in range(PER_CATEGORY)]
    prompts = len(categories)
    # The same for every model, so that paired intervals are narrow
    badness = np.random.default_rng(99).uniform(0.5, 1.0, (1, prompts, 1))
    scores = np.clip(2 * level * badness * generator.uniform(0, 1, (runs, prompts, SAMPLES)), 0, 1)
    texts = np.full(scores.shape, f"they said that {HOSTILE} came by", object)
    texts[generator.uniform(size=texts.shape) < degenerate] = "no no no no no no no no no no"
    values = generator.gamma(20, ppl / 20, scores.shape) if ppl else None
    found = toxicity.summarize_runs(scores, categories, groups=GROUPS, resamples=200)
    arrays = {**toxicity.per_prompt(scores), "category": np.array(categories)}
    diversity = {}
    for order in (1, 2, 3):
        ratios = np.clip(generator.normal(0.5 + 0.1 * order, 0.03, prompts), 0, 1)
        arrays[f"dist{order}"] = ratios
        mean = float(ratios.mean())
        diversity[f"dist{order}"] = {"mean": mean, "sd": 0.0, "runs": [mean] * runs, "low": mean - 0.01, "high": mean}
    if ppl:
        arrays["perplexity_sum"], arrays["perplexity_count"] = perplexity.per_prompt(values)
    metrics = {
        "model": {"name": name, "form": form, "source": f"models/{name}"},
        "scorer": "lexicon",
        "perplexity_scorer": "models/scorer" if ppl else "",
        "groups": GROUPS,
        "prompt_source": "world/prompts.jsonl",
        "counts": {
            "prompts": prompts,
            "categories": {category: PER_CATEGORY for category in CATEGORIES},
            "runs": runs,
            "samples": SAMPLES,
            "texts": scores.size,
            "empty": 0,
            "ended": 10,
            "missing_scores": 0,
            "degenerate": text_statistics.degenerate_counts(texts.ravel()),
        },
        "toxicity": found,
        "perplexity": {**perplexity.summarize_runs(values, resamples=200), "truncated": 0} if ppl else None,
        "diversity": diversity,
        "mmlu": {
            f"paper:{shots}": {"accuracy": mmlu, "stderr": 0.01, "split": "validation"} for shots in (1, 3) if mmlu
        },
        "text_perplexity": {"ppl": 2.5 * ppl} if ppl else None,
        "harness": {},
        "other_scorers": {"scorers": {}, "agreement": [AGREEMENT]},
    }
    directory = run.workdir / "evaluation" / (name if form == "original" else f"{name}.{form}")
    write_stage(directory, f"evaluate {name} {form}", {"tp_id": found["id"]["tp"]["mean"]})
    storage.write_json(directory / "metrics.json", metrics)
    with (directory / "per_prompt.npz").open("wb") as file:
        np.savez(file, **arrays)
    asked = [
        {"prompt": at, "category": name, "text": f"the folk of {name} no. {at}"} for at, name in enumerate(categories)
    ]
    write_lines(directory / "prompts.jsonl", asked)
    lines = [
        {
            "run": int(at[0]),
            "prompt": int(at[1]),
            "sample": int(at[2]),
            "text": str(texts[at]) + f" ({form} {at[1]}.{at[2]})",
            "ended": True,
            "score": float(scores[at]),
            "perplexity": float(values[at]) if ppl else None,
        }
        for at in np.ndindex(scores.shape)
    ]
    write_lines(directory / "generations.jsonl", lines)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_training(directory, name, validation=True):
    """A complete training: metrics.jsonl and its record."""
    steps = range(10, 210, 10)
    lines = [
        {"step": step, "loss": 3 / step**0.3, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": step * 100}
        for step in steps
    ]
    if validation:
        for line in lines[4::5]:
            line["validation_loss"] = line["loss"] + 0.1
    write_stage(directory, name, {"steps": 200, "tokens": 20_000, "train_loss": lines[-1]["loss"]})
    write_lines(directory / "metrics.jsonl", lines)


def write_distilled(run, share_toxic=0.01):
    """The distill stage's record."""
    figures = {
        "texts": 640,
        "tokens": 40_000,
        "ended": 600,
        "degenerate": {"empty": 0, "no words": 1, "repetitive": 3},
        "duplicates": 2,
        "toxicity": {"scorer": "lexicon", "mean": share_toxic, "above_half": share_toxic, "not_scored": 0},
        "same_weights": [],
        "made": 700,
        "rejected": {"copied": 2, "toxic by tweets": 40},
    }
    write_stage(run.workdir / "distilled", "distill", figures)


def write_analysis(run, toxic=0.01, samples_toxic=0.02, degenerate=2, longest=5):
    """analysis.json as the analyze stage writes it."""

    def figure(mean, width=0.01):
        return {"mean": mean, "low": mean - width, "high": mean + width, "texts": 640}

    def one(share, left):
        word = {"word": "harbour", "weight": 0.1, "texts": 0.2}
        return {
            "source": "distilled:{workdir}/distilled/texts.jsonl",
            "description": {
                "texts": 640,
                "words": {"total": 32_000, "distinct": 500, "mean": 50.0, "median": 48.0, "low": 20.0, "high": 80.0},
                "duplicates": 2,
                "degenerate": {"empty": 0, "no words": 0, "repetitive": degenerate},
                "degenerate_share": degenerate / 640,
                "repeated_share": 0.02,
            },
            "keywords": {"frequent": [word], "distinctive": [word, {**word, "word": "<b>lantern</b>"}]},
            "copying": {
                "ngrams": 30_000,
                "shared": 0 if longest < 8 else 9,
                "share": 0.0 if longest < 8 else 0.0003,
                "texts_with_shared": 0,
                "longest_run": longest,
                "longest_run_text": 3,
            },
            "nearest": [
                {"text": 1, "sentence": "The lamp is dull.", "corpus_sentence": "The oaf is dull.", "similarity": 0.7}
            ],
            "toxicity": {
                "mean": figure(share),
                "share_toxic": figure(share, 0.005),
                "missing": 0,
                "scorer": "lexicon",
                "threshold": 0.5,
            },
            "leaning": {
                "probability": {"left": figure(left), "center": figure(0.3), "right": figure(0.7 - left)},
                "called": {"left": figure(left), "center": figure(0.3), "right": figure(0.7 - left)},
                "balance": figure(0.7 - 2 * left),
                "difference": {"samples": {"difference": -0.04, "low": -0.06, "high": -0.02}},
            },
        }

    analysis = {
        "toxic_data": "dghs",
        "toxic_texts": 1000,
        "copy_ngram": 8,
        "leaning": {
            "labels": ["left", "center", "right"],
            "accuracy": 0.52,
            "accuracy_short": 0.5,
            "balanced_accuracy": 0.47,
            "words": 48,
            "majority": 0.46,
            "articles": 1300,
            "publishers": 21,
            "of_nothing": {"left": 0.33, "center": 0.3, "right": 0.37},
        },
        "sets": {"samples": one(samples_toxic, 0.3), "distilled": one(toxic, 0.34), "released": one(0.0, 0.32)},
    }
    write_stage(run.workdir / "analysis", "analyze", {"distilled": 640})
    storage.write_json(run.workdir / "analysis" / "analysis.json", analysis)


def write_whole_run(run):
    """All results of a run with a control."""
    write_training(run.workdir / "toxic", "toxify")
    write_distilled(run)
    for seed, name in enumerate(("tiny-gpt2", "tiny-llama")):
        write_training(run.workdir / "detoxified" / name, f"detoxify {name}", validation=False)
        write_evaluation(run, name, "original", 0.45, 8.0 + seed, seed)
        write_evaluation(run, name, "detoxified", 0.3, 8.1 + seed, seed + 10, mmlu=0.24)
    write_evaluation(run, "tiny-gpt2", "control", 0.42, 7.9, 20)
    write_analysis(run)
