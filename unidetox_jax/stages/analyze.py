"""`unidetox analyze`: what the distilled text is like, beside samples of the base model alone and any other texts.

Compares the run's distilled text, its samples-only text where there is one, and what `config.analyze.texts` names
('released=distilled:FILE'). Nothing here needs a model, but for a classifier asked for.

    analysis.json    {"sets": name → {"source", "fingerprint", "description": `description.describe`, "keywords":
                      `keywords.keywords`, "copying": `copying.overlap`, "nearest": `copying.nearest`, "toxicity": null
                      | {"mean": figure, "share_toxic": figure, "scorer", "threshold"}, "leaning": null |
                      `leaning.summarize`, and "difference" to each other set's balance},
                      "leaning": null | {"labels", the classifier's figures}, "toxic_data", "toxic_texts", "copy_ngram"}
    texts.csv        a text a row: set, row, words, degenerate (why, or nothing), toxicity, P(label) of each leaning
    sets.csv  keywords.csv  leaning.csv  nearest.csv      the tables of the report
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import data, distributed, storage, text_statistics
from unidetox_jax.analysis import copying, description, keywords, leaning
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, scorers
from unidetox_jax.stages import base, common
from unidetox_jax.stages.settings import AnalyzeSettings, Run

DISTILLED, SAMPLES = "distilled", "samples"
CLASSIFIER = "classifier:"


def tasks(run: Run) -> list[base.Task]:
    """The analysis of whatever texts there are when its turn comes."""
    settings = dataclasses.replace(
        run.analyze,
        toxic_data=run.analyze.toxic_data or run.toxify.data,
        scorer=run.analyze.scorer or run.distill.scorer,
    )

    def inputs() -> dict[str, str]:
        specs = {**text_sets(run), "toxic_data": run.path(settings.toxic_data)}
        found = {name: data.fingerprint(spec, run.shared.data_dir) for name, spec in specs.items()}
        if settings.leaning and not settings.leaning.startswith(CLASSIFIER):
            found["leaning"] = data.fingerprint(run.path(settings.leaning), run.shared.data_dir)
        return found

    def body(directory: epath.Path) -> dict[str, Any]:
        found = analyze(run, settings)
        if distributed.first_process():
            write(directory, *found)
            print(describe(found[0]))
        return _figures(found[0])

    given = {**dataclasses.asdict(settings), "threshold": run.evaluate.threshold}
    return [base.Task("analyze", run.workdir / "analysis", given, inputs, body)]


def text_sets(run: Run) -> dict[str, str]:
    """Name → data set of every set of texts that is there.

    Raises:
      UserError: there is none, or one of config.analyze.texts is not 'name=DATASET' with a name of its own.
    """
    rooms = {DISTILLED: common.distilled_directory(run), SAMPLES: common.samples_directory(run)}
    files = {name: room / "texts.jsonl" for name, room in rooms.items()}
    found = {name: f"distilled:{file}" for name, file in files.items() if file.exists()}
    for text in run.analyze.texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UserError(f"config.analyze.texts: found {text!r}, expected 'name=DATASET'")
        if name in (DISTILLED, SAMPLES, "toxic_data", "leaning") or name in found:
            raise UserError(f"config.analyze.texts: the name {name!r} is taken; give {spec!r} another")
        found[name] = run.path(spec)
    if not found:
        raise UserError(f"{files[DISTILLED]}: no such file, and config.analyze.texts is empty; run `unidetox distill`")
    return found


def analyze(run: Run, settings: AnalyzeSettings) -> tuple[dict[str, Any], dict[str, dict[str, list]]]:
    """The content of analysis.json, and set → column → a value for each text."""
    specs = text_sets(run)
    sets = {name: data.texts(spec, data_dir=run.shared.data_dir) for name, spec in specs.items()}
    toxic = data.texts(run.path(settings.toxic_data), data_dir=run.shared.data_dir)
    logging.info("analyze: %s; toxic texts %d", ", ".join(f"{n} {len(t)}" for n, t in sets.items()), len(toxic))
    corpus = copying.Corpus(toxic)
    words = keywords.keywords(sets, settings.keywords)
    lean = _leaning(run, settings, sets)
    scorer = scorers.get(run.path(settings.scorer)) if settings.scorer else None
    result: dict[str, Any] = {
        "toxic_data": settings.toxic_data,
        "toxic_texts": len(toxic),
        "copy_ngram": settings.copy_ngram,
        "leaning": {"labels": list(lean.labels), **lean.figures} if lean else None,
        "sets": {},
    }
    columns, balances = {}, {}
    for name, texts in sets.items():
        columns[name] = {
            "words": [len(text_statistics.words(text)) for text in texts],
            "degenerate": [text_statistics.degenerate(text) for text in texts],
        }
        found = {
            "source": specs[name].replace(str(run.workdir), "{workdir}"),
            "description": description.describe(texts),
            "keywords": words[name],
            "copying": copying.overlap(texts, corpus, settings.copy_ngram),
            "nearest": copying.nearest(texts, corpus, settings.neighbours),
            "toxicity": None,
            "leaning": None,
        }
        if scorer:
            scores = scorer(texts)
            columns[name]["toxicity"] = scores.tolist()
            found["toxicity"] = _toxicity(scores, settings, run.evaluate.threshold)
        if lean:
            probabilities = lean.probabilities(texts)
            balances[name] = leaning.balance(probabilities)
            found["leaning"] = leaning.summarize(probabilities, lean.labels, settings.resamples, settings.seed)
            columns[name] |= {label: probabilities[:, at].tolist() for at, label in enumerate(lean.labels)}
        result["sets"][name] = found
    for name, values in balances.items():
        result["sets"][name]["leaning"]["difference"] = {
            other: bootstrap.difference(values, balances[other], settings.resamples, settings.seed)
            for other in balances
            if other != name
        }
    return result, columns


def _leaning(run: Run, settings: AnalyzeSettings, sets: Mapping[str, Sequence[str]]) -> leaning.Leaning | None:
    if not settings.leaning:
        return None
    if settings.leaning.startswith(CLASSIFIER):
        return leaning.from_classifier(run.path(settings.leaning.removeprefix(CLASSIFIER)))
    records = data.load(run.path(settings.leaning), data_dir=run.shared.data_dir)
    columns = [records.column(field) for field in ("text", "label", "source")]
    length = int(np.median([len(text.split()) for texts in sets.values() for text in texts]))
    return leaning.fit(*columns, words=length, seed=settings.seed)


def _toxicity(scores: np.ndarray, settings: AnalyzeSettings, threshold: float) -> dict[str, Any]:
    called = np.where(np.isnan(scores), np.nan, scores > threshold)
    return {
        "mean": bootstrap.mean(scores, settings.resamples, settings.seed),
        "share_toxic": bootstrap.mean(called, settings.resamples, settings.seed),
        "missing": int(np.isnan(scores).sum()),
        "scorer": settings.scorer,
        "threshold": threshold,
    }


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {name: found["description"]["texts"] for name, found in result["sets"].items()}
    if result["leaning"] and "accuracy" in result["leaning"]:
        figures["leaning_accuracy"] = result["leaning"]["accuracy"]
    return figures


def describe(result: Mapping[str, Any]) -> str:
    """What the terminal shows: the leaning classifier's accuracy, and a line for each set of texts."""
    lines = []
    lean = result["leaning"]
    if lean and "accuracy" in lean:
        lines.append(
            f"leaning: right on {lean['accuracy']:.1%} of {lean['articles']} articles by publishers it never saw "
            f"({lean['accuracy_short']:.1%} on their first {lean['words']} words; the commonest label is "
            f"{lean['majority']:.1%} of them)"
        )
    for name, found in result["sets"].items():
        what, copied = found["description"], found["copying"]
        line = (
            f"{name}: {what['texts']} texts, {what['words']['median']:.0f} words, {what['duplicates']} duplicates, "
            f"{what['degenerate_share']:.1%} degenerate; {copied['share']:.3%} of {result['copy_ngram']}-grams in "
            f"{result['toxic_data']}, longest run {copied['longest_run']} words"
        )
        if found["toxicity"] and found["toxicity"]["share_toxic"]["mean"] is not None:
            line += f"; {found['toxicity']['share_toxic']['mean']:.1%} toxic"
        if found["leaning"]:
            line += "; " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in found["leaning"]["probability"].items())
        lines.append(line)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- tables


def write(directory: epath.Path, result: Mapping[str, Any], columns: Mapping[str, Mapping[str, list]]) -> None:
    """Writes analysis.json and the tables."""
    storage.write_json(directory / "analysis.json", result)
    for name, rows in tables(result, columns).items():
        storage.write_text(directory / f"{name}.csv", to_csv(rows))


def tables(result: Mapping[str, Any], columns: Mapping[str, Mapping[str, list]]) -> dict[str, list[dict[str, Any]]]:
    """Name of the table → its rows."""
    sets = result["sets"]
    found: dict[str, list] = {
        "sets": [_set_row(name, one) for name, one in sets.items()],
        "keywords": [
            {"set": name, "kind": kind, "rank": rank, **entry}
            for name, one in sets.items()
            for kind, entries in one["keywords"].items()
            for rank, entry in enumerate(entries, 1)
        ],
        "nearest": [{"set": name, **pair} for name, one in sets.items() for pair in one["nearest"]],
        "texts": [
            {"set": name, "row": row, **dict(zip(found, values, strict=True))}
            for name, found in columns.items()
            for row, values in enumerate(zip(*found.values(), strict=True))
        ],
    }
    if result["leaning"]:
        found["leaning"] = [
            {"set": name, "quantity": quantity, **figure}
            for name, one in sets.items()
            for quantity, figure in leaning_figures(one["leaning"])
        ]
    return {name: rows for name, rows in found.items() if rows}


def leaning_figures(found: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(name, figure) of everything that is said of one set's leaning."""
    yield from ((f"probability {label}", figure) for label, figure in found["probability"].items())
    yield from ((f"called {label}", figure) for label, figure in found["called"].items())
    yield "balance", found["balance"]


def _set_row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    what, copied, toxicity = found["description"], found["copying"], found["toxicity"]
    return {
        "set": name,
        "texts": what["texts"],
        **{f"words_{key}": value for key, value in what["words"].items()},
        "duplicates": what["duplicates"],
        **{f"degenerate_{reason.replace(' ', '_')}": count for reason, count in what["degenerate"].items()},
        "repeated_share": what["repeated_share"],
        **{f"copied_{key}": value for key, value in copied.items()},
        "toxicity_mean": toxicity["mean"]["mean"] if toxicity else None,
        "toxicity_share_toxic": toxicity["share_toxic"]["mean"] if toxicity else None,
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as csv; the first row's keys, then those that later rows add, are the header."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
