"""`unidetox fit-scorer`: a linear toxicity scorer from labelled text, with its AUC on held-out text.

Reads a csv, jsonl or parquet file, or a data set by its name, whose rows without a label are left out; writes
WORKDIR/scorer, for use as `linear:WORKDIR/scorer`. Training texts that the test also has (ToxiGen's two files share
some) are dropped from training and counted.
"""

import dataclasses

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import data, distributed, text_statistics
from unidetox_jax.data import files
from unidetox_jax.data.datasets import toxigen
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.scorers import linear
from unidetox_jax.stages.settings import OneScorerSettings, Run
from unidetox_jax.stages.task import Task, fingerprint

LABELS = ("harmless", "toxic")


def tasks(run: Run) -> list[Task]:
    """WORKDIR/scorer if configured, and WORKDIR/scorer/NAME for each of config.fit_scorer.others."""
    main = {field.name: getattr(run.fit_scorer, field.name) for field in dataclasses.fields(OneScorerSettings)}
    scorers = {"": OneScorerSettings(**main), **run.fit_scorer.others}
    return [_task(run, name, settings) for name, settings in scorers.items() if settings.data]


def _task(run: Run, name: str, recorded: OneScorerSettings) -> Task:
    settings = dataclasses.replace(recorded, data=run.path(recorded.data), test_data=run.path(recorded.test_data))

    def inputs() -> dict[str, str]:
        sources = {"data": settings.data, "test_data": settings.test_data}
        return {name: _fingerprint(source, run.shared.data_dir) for name, source in sources.items()}

    def body(directory: epath.Path) -> dict:
        if not distributed.is_main_process():  # nothing here runs on devices
            return {}
        figures = fit(settings, directory, run.shared.data_dir)
        print(describe(figures))
        print(f"use it: --config.evaluate.scorer=linear:{directory}")
        return figures

    directory = run.directory(f"scorer/{name}" if name else "scorer")
    return Task(f"fit-scorer {name}".strip(), directory, dataclasses.asdict(recorded), inputs, body)


def fit(settings: OneScorerSettings, directory: epath.Path, data_dir: epath.PathLike = "") -> dict:
    """Fits on the training texts, tests on the others, writes the classifier; returns the figures for the record.
    data_dir: where data sets are that are named, as `data.load` looks for them."""
    from sklearn.metrics import roc_auc_score

    texts, toxic = _read(
        settings.data, data_dir, settings.text_field, settings.label_field, settings.above, settings.positive
    )
    if settings.test_data:
        test = _read(
            settings.test_data,
            data_dir,
            settings.test_text_field or settings.text_field,
            settings.test_label_field or settings.label_field,
            settings.test_above if settings.test_label_field else settings.above,
            settings.test_positive if settings.test_label_field else settings.positive,
        )
        train, _ = _split(texts, toxic, {text_statistics.normalized(text) for text in test[0]})
    else:
        train, test = _split(texts, toxic, _held_out(texts, settings))
    logging.info("fit-scorer: %d texts to train on, %d to test on", len(train[0]), len(test[0]))
    for labels, source in (
        (train[1], settings.data),
        (test[1], settings.test_data or f"{settings.data}, its held-out part"),
    ):
        if labels.all() or not labels.any():
            raise UserError(f"{source}: {int(labels.sum())} toxic texts of {len(labels)}; expected some of each kind")
    classifier = linear.fit(
        train[0],
        [LABELS[int(value)] for value in train[1]],
        LABELS,
        analyses=settings.analyses,
        strength=settings.strength,
        balanced=settings.balanced,
    )
    scores = classifier.toxicity(test[0])
    file = epath.Path(settings.data).name  # without its directory, so that the record does not depend on it
    figures = {
        "auc": round(float(roc_auc_score(test[1], scores)), 4),
        "accuracy": round(float(((scores > 0.5) == test[1]).mean()), 4),  # at TP's threshold
        "called_toxic": round(float((scores > 0.5).mean()), 4),
        "train_texts": len(train[0]),
        "train_toxic": int(train[1].sum()),
        "train_texts_left_out": len(texts) - len(train[0]) if settings.test_data else 0,
        "test_texts": len(test[0]),
        "test_toxic": int(test[1].sum()),
        "tested_on": epath.Path(settings.test_data).name or f"a random {settings.held_out:g} of {file}",
        "features": len(classifier.idf),
    }
    linear.save(directory, classifier, figures)
    return figures


def describe(figures: dict) -> str:
    """The figures in two lines."""
    return (
        f"fit on {figures['train_texts']} texts ({figures['train_toxic']} toxic; {figures['train_texts_left_out']}"
        f" left out because the test has them), {figures['features']} features\n"
        f"held out: AUC {figures['auc']:.4f}, accuracy {figures['accuracy']:.4f}, "
        f"calls {figures['called_toxic']:.1%} of {figures['test_texts']} texts toxic "
        f"({figures['test_toxic']} are): {figures['tested_on']}"
    )


def _fingerprint(source: str, data_dir: epath.PathLike) -> str:
    return data.fingerprint(source, data_dir) if data.is_spec(source) else fingerprint(source)


def _read(
    source: str, data_dir: epath.PathLike, text: str, label: str, above: float, positive: tuple[str, ...]
) -> tuple[list[str], np.ndarray]:
    """(texts, bool [N] whether each is toxic: its label is in `positive`, or if that is empty greater than `above`)."""
    if is_named := data.is_spec(source):
        records = data.load(source, data_dir=data_dir)
        where = [f"{source}, row {number}" for number in range(1, len(records) + 1)]
        texts, labels = records.column(text), records.column(label)
    else:
        (content,) = files.read([files.find(source, "")])
        rows = list(files.rows(content, (text, label)))
        if not rows:
            raise UserError(f"{source}: no rows")
        where = [place for place, _ in rows]
        texts, labels = ([row[field] for _, row in rows] for field in (text, label))
    texts = [toxigen.clean(files.text_of(value), place) for value, place in zip(texts, where, strict=True)]
    if positive:
        labels = [files.text_of(value) for value in labels]
        for value in positive:
            if value not in labels:
                raise UserError(f"{source}: no row has {label} = {value!r}{suggest(value, set(labels))}")
        return texts, np.isin(labels, positive)
    numbers = np.array(
        [files.number_of(value, f"{place}, {label}") for value, place in zip(labels, where, strict=True)]
    )
    missing = np.isnan(numbers)
    if missing.any() and not is_named:
        raise UserError(f"{where[missing.argmax()]}, {label}: found nothing, expected a number")
    return [text for text, skip in zip(texts, missing, strict=True) if not skip], numbers[~missing] > above


def _held_out(texts: list[str], settings: OneScorerSettings) -> set[str]:
    """The texts to test on, normalised by `text_statistics.normalized`."""
    from sklearn.model_selection import train_test_split

    distinct = sorted({text_statistics.normalized(text) for text in texts})
    if not 0 < settings.held_out < 1:
        raise UserError(f"config.fit_scorer.held_out: found {settings.held_out}, expected a share between 0 and 1")
    if len(distinct) < 10:
        raise UserError(f"{settings.data}: {len(distinct)} different texts, too few to hold some out")
    return set(train_test_split(distinct, test_size=settings.held_out, random_state=settings.seed)[1])


def _split(texts: list[str], toxic: np.ndarray, test_texts: set[str]) -> list[tuple[list[str], np.ndarray]]:
    """[(training texts, labels), (test texts, labels)]; all copies of a text are on the same side."""
    is_test = np.array([text_statistics.normalized(text) in test_texts for text in texts])
    return [([text for text, use in zip(texts, side, strict=True) if use], toxic[side]) for side in (~is_test, is_test)]
