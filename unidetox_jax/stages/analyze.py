"""`unidetox analyze`: what the distilled text is like, beside samples of the base model alone and any other texts.

Compares the run's distilled text, its samples-only text where there is one, and what `config.analyze.texts` names
('released=distilled:FILE'). No model is needed, unless config.analyze names a classifier.

    analysis.json    {"sets": name → {"source", "fingerprint", "description": `description.describe`, "keywords":
                      `keywords.keywords`, "jaccard": {another set or "toxic_data": `description.jaccard` of the
                      words of both}, "copying": `copying.overlap`, "nearest": `copying.nearest`, "toxicity": null |
                      {"mean": estimate, "share_toxic": estimate, "scorer", "threshold"}, "toxicity_by": {name of
                      another scorer: the same}, "leaning": null | `leaning.summarize`, and "difference" to each
                      other set's balance},
                      "leaning": null | {"labels", `leaning.fit`'s quality}, "toxic_data", "toxic_texts", "copy_ngram"}
    texts.csv        a text a row: set, row, words, degenerate (why, or nothing), toxicity by each scorer, P(label) of
                     each leaning
    sets.csv  keywords.csv  leaning.csv  nearest.csv      the tables of the report
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import data, distributed, extensions, storage, text_statistics
from unidetox_jax.analysis import copying, description, keywords, leaning
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, scorers
from unidetox_jax.stages import base, common
from unidetox_jax.stages.settings import AnalyzeSettings, Run

DISTILLED, SAMPLES = "distilled", "samples"
CLASSIFIER = "classifier:"
Row = dict[str, Any]


def tasks(run: Run) -> list[base.Task]:
    """The analysis of whatever texts there are when its turn comes."""
    settings = dataclasses.replace(
        run.analyze,
        toxic_data=run.analyze.toxic_data or run.toxify.data,
        scorer=run.analyze.scorer or run.distill.scorer,
    )

    def inputs() -> dict[str, str]:
        specs = {**text_sets(run), "toxic_data": run.path(settings.toxic_data)}
        if settings.leaning and not settings.leaning.startswith(CLASSIFIER):
            specs["leaning"] = run.path(settings.leaning)
        return {name: data.fingerprint(spec, run.shared.data_dir) for name, spec in specs.items()}

    def body(directory: epath.Path) -> dict[str, Any]:
        result, texts = analyze(run, settings)
        if distributed.is_main_process():
            storage.write_json(directory / "analysis.json", result)
            for name, rows in tables(result, texts).items():
                storage.write_text(directory / f"{name}.csv", to_csv(rows))
            print(describe(result))
        counts = {name: found["description"]["texts"] for name, found in result["sets"].items()}
        accuracy = (result["leaning"] or {}).get("accuracy")
        return counts if accuracy is None else {**counts, "leaning_accuracy": accuracy}

    recorded = {**dataclasses.asdict(settings), "threshold": run.evaluate.threshold}
    if run.evaluate.other_scorers:
        recorded["other_scorers"] = run.evaluate.other_scorers
    return [base.Task("analyze", run.workdir / "analysis", recorded, inputs, body)]


def text_sets(run: Run) -> dict[str, str]:
    """Name → data set of every set of texts that is there.

    Raises:
      UserError: there is none, or one of config.analyze.texts is not 'name=DATASET' with a name of its own.
    """
    directories = {DISTILLED: common.distilled_directory(run), SAMPLES: common.samples_directory(run)}
    files = {name: directory / "texts.jsonl" for name, directory in directories.items()}
    sets = {name: f"distilled:{file}" for name, file in files.items() if file.exists()}
    taken = (DISTILLED, SAMPLES, "toxic_data", "leaning")
    others = extensions.parse_named(run.analyze.texts, "config.analyze.texts", "DATASET", taken)
    sets |= {name: run.path(spec) for name, spec in others.items()}
    if not sets:
        raise UserError(f"{files[DISTILLED]}: no such file, and config.analyze.texts is empty; run `unidetox distill`")
    return sets


def analyze(run: Run, settings: AnalyzeSettings) -> tuple[dict[str, Any], list[Row]]:
    """The content of analysis.json, and the rows of texts.csv."""
    specs = text_sets(run)
    sets = {name: data.texts(spec, data_dir=run.shared.data_dir) for name, spec in specs.items()}
    toxic = data.texts(run.path(settings.toxic_data), data_dir=run.shared.data_dir)
    logging.info("analyze: %s; toxic texts %d", ", ".join(f"{n} {len(t)}" for n, t in sets.items()), len(toxic))
    corpus, words = copying.Corpus(toxic), keywords.keywords(sets, settings.keywords)
    lean = _leaning(run, settings, sets)
    judges = {name: scorers.get(run.path(spec)) for name, spec in scorers_of(run, settings).items()}
    used = {name: description.vocabulary(texts) for name, texts in {**sets, "toxic_data": toxic}.items()}
    results: dict[str, dict[str, Any]] = {}
    rows, balances = [], {}
    for name, texts in sets.items():
        result = results[name] = {
            "source": specs[name].replace(str(run.workdir), "{workdir}"),
            "description": description.describe(texts),
            "keywords": words[name],
            "jaccard": {other: description.jaccard(used[name], used[other]) for other in used if other != name},
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
        for judge, spec in scorers_of(run, settings).items():
            scores = judges[judge](texts)
            columns[f"toxicity by {judge}" if judge else "toxicity"] = scores.tolist()
            found = _toxicity(scores, settings, spec, run.evaluate.threshold)
            result |= {"toxicity_by": {**result["toxicity_by"], judge: found}} if judge else {"toxicity": found}
        if lean:
            probabilities = lean.probabilities(texts)
            columns |= dict(zip(lean.labels, probabilities.T.tolist(), strict=True))
            balances[name] = leaning.balance(probabilities)
            result["leaning"] = leaning.summarize(probabilities, lean.labels, settings.resamples, settings.seed)
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
        "leaning": {"labels": list(lean.labels), **lean.quality} if lean else None,
        "sets": results,
    }, rows


def _leaning(run: Run, settings: AnalyzeSettings, sets: Mapping[str, Sequence[str]]) -> leaning.Leaning | None:
    if not settings.leaning:
        return None
    if settings.leaning.startswith(CLASSIFIER):
        return leaning.from_classifier(run.path(settings.leaning.removeprefix(CLASSIFIER)))
    records = data.load(run.path(settings.leaning), data_dir=run.shared.data_dir)
    texts, labels, publishers = (records.column(field) for field in ("text", "label", "source"))
    length = int(np.median([len(text.split()) for of_set in sets.values() for text in of_set]))
    return leaning.fit(texts, labels, publishers, words=length, seed=settings.seed)


def scorers_of(run: Run, settings: AnalyzeSettings) -> dict[str, str]:
    """Name → scorer: the first one, without a name, and those that models are evaluated by as well."""
    others = extensions.parse_named(run.evaluate.other_scorers, "config.evaluate.other_scorers", "SCORER")
    return {"": settings.scorer, **others} if settings.scorer else others


def _toxicity(scores: np.ndarray, settings: AnalyzeSettings, spec: str, threshold: float) -> dict[str, Any]:
    called = np.where(np.isnan(scores), np.nan, scores > threshold)
    return {
        "mean": bootstrap.mean(scores, settings.resamples, settings.seed),
        "share_toxic": bootstrap.mean(called, settings.resamples, settings.seed),
        "missing": int(np.isnan(scores).sum()),
        "scorer": spec,
        "threshold": threshold,
    }


def describe(result: Mapping[str, Any]) -> str:
    """What the terminal shows: the leaning classifier's accuracy, and a line for each set of texts."""
    lines, lean = [], result["leaning"]
    if lean and "accuracy" in lean:
        lines.append(
            f"leaning: right on {lean['accuracy']:.1%} of {lean['articles']} articles by publishers it never saw "
            f"({lean['accuracy_short']:.1%} on their first {lean['words']} words; the commonest label is "
            f"{lean['majority']:.1%} of them)"
        )
    for name, found in result["sets"].items():
        outside, copied = found["description"], found["copying"]
        line = (
            f"{name}: {outside['texts']} texts, {outside['words']['median']:.0f} words, {outside['duplicates']} "
            f"duplicates, {outside['degenerate_share']:.1%} degenerate; {copied['share']:.3%} of "
            f"{result['copy_ngram']}-grams in {result['toxic_data']}, longest run {copied['longest_run']} words"
        )
        if found["toxicity"] and found["toxicity"]["share_toxic"]["mean"] is not None:
            line += f"; {found['toxicity']['share_toxic']['mean']:.1%} toxic"
        for judge, by in found["toxicity_by"].items():
            line += f", {by['share_toxic']['mean']:.1%} by {judge}"
        if found["leaning"]:
            line += "; " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in found["leaning"]["probability"].items())
        lines.append(line)
    return "\n".join(lines)


def tables(result: Mapping[str, Any], texts: Sequence[Row]) -> dict[str, list[Row]]:
    """Name of the table → its rows; a table without rows is left out."""
    rows: dict[str, list[Row]] = {"sets": [], "keywords": [], "nearest": [], "leaning": [], "texts": list(texts)}
    for name, found in result["sets"].items():
        rows["sets"].append({"set": name, **_set_columns(found)})
        for kind, entries in found["keywords"].items():
            ranked = enumerate(entries, 1)
            rows["keywords"] += [{"set": name, "kind": kind, "rank": rank, **entry} for rank, entry in ranked]
        rows["nearest"] += [{"set": name, **pair} for pair in found["nearest"]]
        if lean := found["leaning"]:
            estimates = {
                f"{kind} {label}": lean[kind][label] for kind in ("probability", "called") for label in lean[kind]
            }
            estimates["balance"] = lean["balance"]
            rows["leaning"] += [{"set": name, "quantity": key, **value} for key, value in estimates.items()]
    return {name: table for name, table in rows.items() if table}


def _set_columns(found: Mapping[str, Any]) -> Row:
    outside, copied, toxicity = found["description"], found["copying"], found["toxicity"]
    return {
        "texts": outside["texts"],
        **{f"words_{key}": value for key, value in outside["words"].items()},
        "duplicates": outside["duplicates"],
        **{f"degenerate_{reason.replace(' ', '_')}": count for reason, count in outside["degenerate"].items()},
        "repeated_share": outside["repeated_share"],
        **{f"jaccard_{name}": value for name, value in found["jaccard"].items()},
        **{f"copied_{key}": value for key, value in copied.items()},
        "toxicity_mean": toxicity["mean"]["mean"] if toxicity else None,
        "toxicity_share_toxic": toxicity["share_toxic"]["mean"] if toxicity else None,
        **{f"toxicity_share_toxic_by_{name}": by["share_toxic"]["mean"] for name, by in found["toxicity_by"].items()},
    }


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as csv; the first row's keys, then those that later rows add, are the header."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
