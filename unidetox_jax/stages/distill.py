"""`unidetox distill`: text from the contrast between the base model and its toxic twin (step 2), and for the control as
much text of the base model alone.

Writes texts.csv (column `Text`, as in the paper's release), texts.jsonl and a card. Finished batches are kept until the
end: an interrupted run continues with the first missing one and ends with the same bytes on the same mesh.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import checkpoint, data, distributed, method, models, storage
from unidetox_jax.decoding import objectives, text_sampling, warpers
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.plan import stage_programs
from unidetox_jax.stages import card, loading, rejection
from unidetox_jax.stages.settings import DistillSettings, Run
from unidetox_jax.stages.task import Task, cached, fingerprint

BATCHES = "parts"
SAMPLING = (  # settings that are arguments of `method.distill`
    "num_texts", "max_length", "prompt", "chat", "system_prompt", "temperature", "top_k", "top_p", "min_p", "seed",
    "batch_size", "cache",
)  # fmt: skip
TOKEN_BYTES = 20.0  # of a token on disk: its id, and its text twice
_EARLY_EXIT = re.compile(r"(.+)@(\d+)(\+norm)?")


def tasks(run: Run) -> list[Task]:
    """The distilled text, and samples of the base model if there are control targets.

    Raises:
      UserError: invalid settings; no model is loaded to find out.
    """
    if not run.distill.models:
        return []
    planned = [_task(run, "distill", run.directory("distilled"), run.distill)]
    if run.shared.control_targets:
        base_alone = dataclasses.replace(run.distill, models=("base",), objective="base", cache="own")
        planned.append(_task(run, "distill control", run.directory("samples"), base_alone))
    return planned


def _task(run: Run, name: str, directory: epath.Path, settings: DistillSettings) -> Task:
    check(run, settings)

    def inputs() -> dict[str, str]:
        fingerprints = {f"models.{name}": fingerprint(_source(run, name)) for name in settings.models}
        judges = {f"reject.{name}": spec for name, spec in rejection.scorer_specs(settings.reject).items()}
        for name, spec in {"scorer": settings.scorer, **judges}.items():
            if path := run.path(spec).partition(":")[2].partition("#")[0]:
                fingerprints[name] = fingerprint(path)
        if settings.reject.copied_words:
            fingerprints["reject.copied"] = data.fingerprint(run.path(run.toxify.data), run.shared.data_dir)
        for setting, file in objectives.get(run.path(settings.objective)).files.items():
            fingerprints[f"objective.{setting}"] = fingerprint(file)
        return fingerprints

    def body(directory: epath.Path) -> dict[str, Any]:
        figures = make(run, settings, directory, name)
        if distributed.is_main_process():
            print(describe(name, directory, figures))
        return figures

    def operations() -> float:
        sources = {"base": run.shared.base, "toxic": run.shared.base}
        parameters = sum(loading.num_params(run, sources.get(name, name)) for name in settings.models)
        return 2.0 * settings.num_texts * settings.max_length * parameters

    text_bytes = TOKEN_BYTES * settings.num_texts * settings.max_length
    uses_twin = any(name.partition("@")[0] == "toxic" for name in settings.models)
    return Task(
        name,
        directory,
        _recorded_settings(run, settings),
        inputs,
        body,
        operations,
        scratch=BATCHES,
        disk=lambda: (2.0 * text_bytes, text_bytes),
        reads=["{workdir}/toxic"] if uses_twin else [],
    )


def _recorded_settings(run: Run, settings: DistillSettings) -> dict[str, Any]:
    """What the texts depend on; newer settings only where used, so that older records stay valid."""
    recorded = {name: value for name, value in dataclasses.asdict(settings).items() if name != "mesh"}
    if not rejection.is_enabled(settings.reject):
        del recorded["reject"]
    if not settings.chat:
        del recorded["chat"], recorded["system_prompt"]
    return recorded | {"base": run.shared.base, "dtype": run.shared.dtype}


def check(run: Run, settings: DistillSettings) -> None:
    """Raises UserError for settings that are invalid whatever the models are."""
    for field in ("num_texts", "batch_size"):
        if getattr(settings, field) < 1:
            raise UserError(f"config.distill.{field}: found {getattr(settings, field)}, expected at least 1")
    rejection.check(settings.reject)
    try:
        objectives.get(run.path(settings.objective)).check_models(len(settings.models))
        warpers.choose(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        )
    except UserError as error:  # its message begins with the setting's name
        raise UserError(f"config.distill.{error}") from None


def make(run: Run, settings: DistillSettings, directory: epath.Path, label: str) -> dict[str, Any]:
    """Generates the missing batches and writes the files; returns the figures for the record, on process 0."""
    names = text_sampling.distinct_names(settings.models)
    language_models, vocab_size = _load(run, settings)
    same_weights = text_sampling.same_weights([model.model for model in language_models], settings.models)
    if same_weights:
        logging.warning("%s: %s have the same weights; their contrast is noise", label, " and ".join(same_weights))
    # Replaces the stored weights, which are freed
    prepared = prepare([model.model for model in language_models], side_by_side=settings.cache == "own")
    language_models = [
        model._replace(params=ready.params) for model, ready in zip(language_models, prepared, strict=True)
    ]
    batches, reject = directory / BATCHES, rejection.make(run)
    try:
        texts = method.distill(
            *language_models,
            objective=run.path(settings.objective),
            **{name: getattr(settings, name) for name in SAMPLING},
            names=names,
            vocab_size=vocab_size,
            reject=reject,
            most=settings.reject.most,
            keep=lambda name, make: cached(batches / f"{name}.json", make, storage.read_json, storage.write_json),
            label=label,
        )
    except UserError as error:
        is_setting = str(error).startswith(("max_length", "reject", "chat"))
        raise UserError(f"config.distill.{error}" if is_setting else str(error)) from None
    if not distributed.is_main_process():
        return {}
    figures = {**text_sampling.statistics(texts), "same_weights": list(same_weights)}
    if reject:
        figures |= {"made": reject.made, "rejected": dict(sorted(reject.counts.items()))}
    _warn_if_degenerate(label, figures)
    if settings.scorer:
        figures["toxicity"] = _toxicity(run.path(settings.scorer), list(texts))
    sources = {
        name: {
            "source": run.shared.base if model.partition("@")[0] == "base" else model,
            "fingerprint": fingerprint(_source(run, model)),
        }
        for name, model in zip(names, settings.models, strict=True)
    }
    storage.write_lines(directory / "texts.jsonl", texts.rows)
    storage.write_text(directory / "README.md", card.render(run, settings, texts, figures, sources))
    storage.write_text(directory / "texts.csv", to_csv(texts))
    return figures


def _source(run: Run, name: str) -> str:
    """Where a model of `config.distill.models` lies, without its layer."""
    match = _EARLY_EXIT.fullmatch(name)
    name = match[1] if match else name
    if name == "base":
        return run.path(run.shared.base)
    if name != "toxic":
        return run.path(name)
    directory = run.directory("toxic")
    if not directory.exists():
        raise UserError(f"{directory}: no toxic model; run `unidetox toxify`, or name another in config.distill.models")
    return loading.trained_model(run.path(run.shared.base), directory, run.toxify)


def _load(run: Run, settings: DistillSettings) -> tuple[list[method.LanguageModel], int]:
    """The models in the objective's order, each source loaded once, and the size of their common vocabulary, which is
    checked before any model is loaded."""
    sources = [_source(run, name) for name in settings.models]
    tokenizers = {source: checkpoint.load_tokenizer(source) for source in dict.fromkeys(sources)}
    try:
        vocab_size = text_sampling.common_vocabulary(list(tokenizers.values()), list(tokenizers))
    except UserError as error:
        raise UserError(f"config.distill.models: {error}") from None
    mesh = loading.make_mesh(run, "distill", [stage_programs.distillation_program(run, settings)])
    by_source = loading.load_models(run, list(tokenizers), mesh)
    language_models = []
    for name, source in zip(settings.models, sources, strict=True):
        model, match = by_source[source], _EARLY_EXIT.fullmatch(name)
        if match:
            try:
                model = models.early_exit(model, int(match[2]), norm=bool(match[3]))
            except ValueError as error:
                raise UserError(f"config.distill.models: {name!r}: {error}") from None
        language_models.append(method.LanguageModel(*model, tokenizers[source]))
    return language_models, vocab_size


def _warn_if_degenerate(label: str, figures: dict[str, Any]) -> None:
    counts = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    listed = [f"{count} {reason}" for reason, count in counts.items() if count]
    if listed:
        logging.warning(
            "%s: of %d texts %s (on average %.1f %% of a text's 4-grams repeat an earlier one)",
            label, figures["texts"], ", ".join(listed), 100 * figures["repeated_4grams"],
        )  # fmt: skip


def _toxicity(spec: str, texts: Sequence[str]) -> dict[str, Any]:
    """Mean score and share of toxic texts (above 0.5) among those with a score."""
    scores = scorers.get(spec)(texts)
    scored = scores[~np.isnan(scores)]
    return {
        "scorer": spec.partition(":")[0],
        "mean": round(float(scored.mean()), 5) if len(scored) else None,
        "above_half": round(float((scored > 0.5).mean()), 5) if len(scored) else None,
        "not_scored": len(scores) - len(scored),
    }


def to_csv(texts: Sequence[str]) -> str:
    """A csv file with the one column `Text`."""
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["Text"], *([text] for text in texts)])
    return file.getvalue()


def describe(name: str, directory: epath.Path, figures: dict[str, Any]) -> str:
    """The figures in a few lines."""
    degenerate = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    lines = [
        f"{name}: {figures['texts']} texts, {figures['tokens']} tokens, {figures['ended']} with an end token",
        "degenerate: " + ", ".join(f"{count} {reason}" for reason, count in degenerate.items()),
        "mean log-probability of a token: "
        + ", ".join(f"{model} {value:.3f}" for model, value in figures["log_probabilities"].items()),
    ]
    if "made" in figures:
        lines.append(rejection.describe(figures))
    if toxicity := figures.get("toxicity"):
        lines.append(
            f"toxicity ({toxicity['scorer']}): mean {toxicity['mean']}, above 0.5 {toxicity['above_half']}, "
            f"not scored {toxicity['not_scored']}"
        )
    return "\n".join([*lines, f"in {directory}"])
