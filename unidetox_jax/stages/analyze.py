"""`unidetox analyze`: compares the distilled text with samples of the base model alone and with other texts.

The text sets are the run's distilled text, its samples if any, and those of `config.analyze.texts`
('released=distilled:FILE'). Only classifiers that config.analyze names need a model.

    analysis.json    {"sets": name → {"source", "fingerprint", "description": `description.describe`, "keywords":
                      `keywords.keywords`, "jaccard": {another set or "toxic_data": `description.jaccard` of the
                      words of both}, "copying": `copying.overlap`, "nearest": `copying.nearest`, "toxicity": null |
                      {"mean": estimate, "share_toxic": estimate, "scorer", "threshold"}, "toxicity_by": {name of
                      another scorer: the same}, "leaning": null | `leaning.summarize`, and the "difference" from
                      the balance of each other set},
                      "leaning": null | {"labels", `leaning.fit`'s quality}, "toxic_data", "toxic_texts", "copy_ngram"}
    texts.csv        a row per text: set, row, words, degenerate (the reason, or empty), toxicity by each scorer,
                     P(label) of each leaning
    sets.csv  keywords.csv  leaning.csv  nearest.csv
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import data, distributed, extensions, storage, text_statistics
from unidetox_jax.analysis import copying, description, keywords, leaning
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, scorers
from unidetox_jax.report.tables import to_csv
from unidetox_jax.stages.settings import AnalyzeSettings, Run
from unidetox_jax.stages.task import Task

DISTILLED, SAMPLES, TOXIC_DATA, LEANING = "distilled", "samples", "toxic_data", "leaning"
CLASSIFIER = "classifier:"
Row = dict[str, Any]


def tasks(run: Run) -> list[Task]:
    """The analysis of the texts that exist when it runs."""
    settings = dataclasses.replace(
        run.analyze,
        toxic_data=run.analyze.toxic_data or run.toxify.data,
        scorer=run.analyze.scorer or run.distill.scorer,
    )

    def inputs() -> dict[str, str]:
        specs = {**text_sets(run), TOXIC_DATA: run.path(settings.toxic_data)}
        if settings.leaning and not settings.leaning.startswith(CLASSIFIER):
            specs[LEANING] = run.path(settings.leaning)
        return {name: data.fingerprint(spec, run.shared.data_dir) for name, spec in specs.items()}

    def body(directory: epath.Path) -> dict[str, Any]:
        result, texts = analyze(run, settings)
        if distributed.is_main_process():
            storage.write_json(directory / "analysis.json", result)
            for name, rows in tables(result, texts).items():
                storage.write_text(directory / f"{name}.csv", to_csv(rows))
            print(describe(result))
        counts = {name: text_set["description"]["texts"] for name, text_set in result["sets"].items()}
        accuracy = (result["leaning"] or {}).get("accuracy")
        return counts if accuracy is None else {**counts, "leaning_accuracy": accuracy}

    recorded = {**dataclasses.asdict(settings), "threshold": run.evaluate.threshold}
    if run.evaluate.other_scorers:
        recorded["other_scorers"] = run.evaluate.other_scorers
    return [Task("analyze", run.workdir / "analysis", recorded, inputs, body)]


def text_sets(run: Run) -> dict[str, str]:
    """{name: data set} of the text sets that exist.

    Raises:
      UserError: there is none, or one of config.analyze.texts is not 'name=DATASET' with a new name.
    """
    files = {name: run.directory(name) / "texts.jsonl" for name in (DISTILLED, SAMPLES)}
    sets = {name: f"distilled:{file}" for name, file in files.items() if file.exists()}
    reserved = (DISTILLED, SAMPLES, TOXIC_DATA, LEANING)
    others = extensions.parse_named(run.analyze.texts, "config.analyze.texts", "DATASET", reserved)
    sets |= {name: run.path(spec) for name, spec in others.items()}
    if not sets:
        raise UserError(f"{files[DISTILLED]}: no such file, and config.analyze.texts is empty; run `unidetox distill`")
    return sets


def analyze(run: Run, settings: AnalyzeSettings) -> tuple[dict[str, Any], list[Row]]:
    """(the content of analysis.json, the rows of texts.csv)."""
    specs = text_sets(run)
    sets = {name: data.texts(spec, data_dir=run.shared.data_dir) for name, spec in specs.items()}
    toxic = data.texts(run.path(settings.toxic_data), data_dir=run.shared.data_dir)
    logging.info("analyze: %s; toxic texts %d", ", ".join(f"{n} {len(t)}" for n, t in sets.items()), len(toxic))
    corpus, keywords_of = copying.Corpus(toxic), keywords.keywords(sets, settings.keywords)
    classifier = _leaning_classifier(run, settings, sets)
    judges = {name: scorers.get(run.path(spec)) for name, spec in scorer_specs(run, settings).items()}
    vocabularies = {name: description.vocabulary(texts) for name, texts in {**sets, TOXIC_DATA: toxic}.items()}
    results: dict[str, dict[str, Any]] = {}
    rows, balances = [], {}
    for name, texts in sets.items():
        result = results[name] = {
            "source": specs[name].replace(str(run.workdir), "{workdir}"),
            "description": description.describe(texts),
            "keywords": keywords_of[name],
            "jaccard": {
                other: description.jaccard(vocabularies[name], words)
                for other, words in vocabularies.items()
                if other != name
            },
            "copying": copying.overlap(texts, corpus, settings.copy_ngram),
            "nearest": copying.nearest(texts, corpus, settings.neighbours),
            "toxicity": None,
            "toxicity_by": {},
            "leaning": None,
        }
        columns = {
            "words": [len(text_statistics.words(text)) for text in texts],
            "degenerate": [text_statistics.degenerate(text) for text in texts],
        }
        for judge, spec in scorer_specs(run, settings).items():
            scores = judges[judge](texts)
            columns[f"toxicity by {judge}" if judge else "toxicity"] = scores.tolist()
            toxicity = _toxicity(scores, settings, spec, run.evaluate.threshold)
            result |= {"toxicity_by": {**result["toxicity_by"], judge: toxicity}} if judge else {"toxicity": toxicity}
        if classifier:
            probabilities = classifier.probabilities(texts)
            columns |= dict(zip(classifier.labels, probabilities.T.tolist(), strict=True))
            balances[name] = leaning.balance(probabilities)
            result["leaning"] = leaning.summarize(probabilities, classifier.labels, settings.resamples, settings.seed)
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            rows.append({"set": name, "row": row, **dict(zip(columns, values, strict=True))})
    for name, values in balances.items():
        results[name]["leaning"]["difference"] = {
            other: bootstrap.difference(values, balances[other], settings.resamples, settings.seed)
            for other in balances
            if other != name
        }
    return {
        "toxic_data": settings.toxic_data,
        "toxic_texts": len(toxic),
        "copy_ngram": settings.copy_ngram,
        "leaning": {"labels": list(classifier.labels), **classifier.quality} if classifier else None,
        "sets": results,
    }, rows


def _leaning_classifier(
    run: Run, settings: AnalyzeSettings, sets: Mapping[str, Sequence[str]]
) -> leaning.Leaning | None:
    if not settings.leaning:
        return None
    if settings.leaning.startswith(CLASSIFIER):
        return leaning.from_classifier(run.path(settings.leaning.removeprefix(CLASSIFIER)))
    records = data.load(run.path(settings.leaning), data_dir=run.shared.data_dir)
    articles, labels, publishers = (records.column(field) for field in ("text", "label", "source"))
    median_length = int(np.median([len(text.split()) for texts in sets.values() for text in texts]))
    return leaning.fit(articles, labels, publishers, words=median_length, seed=settings.seed)


def scorer_specs(run: Run, settings: AnalyzeSettings) -> dict[str, str]:
    """{name: scorer}: the main one as "", if any, and those of config.evaluate.other_scorers."""
    others = extensions.parse_named(run.evaluate.other_scorers, "config.evaluate.other_scorers", "SCORER")
    return {"": settings.scorer, **others} if settings.scorer else others


def _toxicity(scores: np.ndarray, settings: AnalyzeSettings, spec: str, threshold: float) -> dict[str, Any]:
    is_toxic = np.where(np.isnan(scores), np.nan, scores > threshold)
    return {
        "mean": bootstrap.mean(scores, settings.resamples, settings.seed),
        "share_toxic": bootstrap.mean(is_toxic, settings.resamples, settings.seed),
        "missing": int(np.isnan(scores).sum()),
        "scorer": spec,
        "threshold": threshold,
    }


def describe(result: Mapping[str, Any]) -> str:
    """For the terminal: the leaning classifier's accuracy, and a line per text set."""
    lines, scale = [], result["leaning"]
    if scale and "accuracy" in scale:
        lines.append(
            f"leaning: right on {scale['accuracy']:.1%} of {scale['articles']} articles by publishers it never saw "
            f"({scale['accuracy_short']:.1%} on their first {scale['words']} words; the most common label is "
            f"{scale['majority']:.1%} of them)"
        )
    for name, text_set in result["sets"].items():
        described, copied, toxicity = text_set["description"], text_set["copying"], text_set["toxicity"]
        line = (
            f"{name}: {described['texts']} texts, {described['words']['median']:.0f} words, "
            f"{described['duplicates']} duplicates, {described['degenerate_share']:.1%} degenerate; "
            f"{copied['share']:.3%} of {result['copy_ngram']}-grams in {result['toxic_data']}, "
            f"longest run {copied['longest_run']} words"
        )
        if toxicity and toxicity["share_toxic"]["mean"] is not None:
            line += f"; {toxicity['share_toxic']['mean']:.1%} toxic"
        for judge, by in text_set["toxicity_by"].items():
            line += f", {by['share_toxic']['mean']:.1%} by {judge}"
        if text_set["leaning"]:
            line += "; " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in text_set["leaning"]["probability"].items())
        lines.append(line)
    return "\n".join(lines)


def tables(result: Mapping[str, Any], texts: Sequence[Row]) -> dict[str, list[Row]]:
    """{name: rows} of the csv tables that have rows."""
    rows: dict[str, list[Row]] = {"sets": [], "keywords": [], "nearest": [], "leaning": [], "texts": list(texts)}
    for name, text_set in result["sets"].items():
        rows["sets"].append({"set": name, **_set_columns(text_set)})
        for kind, entries in text_set["keywords"].items():
            ranked = enumerate(entries, 1)
            rows["keywords"] += [{"set": name, "kind": kind, "rank": rank, **entry} for rank, entry in ranked]
        rows["nearest"] += [{"set": name, **pair} for pair in text_set["nearest"]]
        if summary := text_set["leaning"]:
            estimates = {
                f"{kind} {label}": summary[kind][label] for kind in ("probability", "called") for label in summary[kind]
            }
            estimates["balance"] = summary["balance"]
            rows["leaning"] += [{"set": name, "quantity": key, **value} for key, value in estimates.items()]
    return {name: table for name, table in rows.items() if table}


def _set_columns(text_set: Mapping[str, Any]) -> Row:
    described, toxicity = text_set["description"], text_set["toxicity"]
    by_others = text_set["toxicity_by"].items()
    return {
        "texts": described["texts"],
        **{f"words_{key}": value for key, value in described["words"].items()},
        "duplicates": described["duplicates"],
        **{f"degenerate_{reason.replace(' ', '_')}": count for reason, count in described["degenerate"].items()},
        "repeated_share": described["repeated_share"],
        **{f"jaccard_{name}": value for name, value in text_set["jaccard"].items()},
        **{f"copied_{key}": value for key, value in text_set["copying"].items()},
        "toxicity_mean": toxicity["mean"]["mean"] if toxicity else None,
        "toxicity_share_toxic": toxicity["share_toxic"]["mean"] if toxicity else None,
        **{f"toxicity_share_toxic_by_{name}": by["share_toxic"]["mean"] for name, by in by_others},
    }
