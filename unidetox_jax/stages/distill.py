"""`unidetox distill`: text from the contrast between the base model and its toxic twin (step 2); and, for the
samples-only control, as much text of the base model alone.

Writes texts.csv (column `Text`, as the paper's release), texts.jsonl and a card. Finished batches are kept as part
files, so what was killed goes on with the first one missing, and ends with the same bytes on the same mesh.
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
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.decoding import text_sampling as sampling
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.plan import stage_programs
from unidetox_jax.stages import base, card, common, rejection
from unidetox_jax.stages.settings import DistillSettings, Run

PARTS = "parts"
TOKEN_BYTES = 20.0  # of a token on disk: its number, and its text twice
_EARLY_EXIT = re.compile(r"(.+)@(\d+)(\+norm)?")


def tasks(run: Run) -> list[base.Task]:
    """The distilled text, and the samples of the base model where some target has a control.

    Raises:
      UserError: settings that nothing could be made with; no model is loaded for that.
    """
    if not run.distill.models:
        return []
    planned = [_task(run, "distill", common.distilled_directory(run), run.distill)]
    if run.shared.control_targets:
        alone = dataclasses.replace(run.distill, models=("base",), objective="base", cache="own")
        planned.append(_task(run, "distill control", common.samples_directory(run), alone))
    return planned


def _task(run: Run, name: str, directory: epath.Path, settings: DistillSettings) -> base.Task:
    check(run, settings)

    def inputs() -> dict[str, str]:
        fingerprints = {f"models.{name}": base.fingerprint(_source(run, name)) for name in settings.models}
        judges = {f"reject.{name}": spec for name, spec in rejection.named(settings.reject).items()}
        for name, spec in {"scorer": settings.scorer, **judges}.items():
            if path := run.path(spec).partition(":")[2].partition("#")[0]:
                fingerprints[name] = base.fingerprint(path)
        if settings.reject.copied_words:
            fingerprints["reject.copied"] = data.fingerprint(run.path(run.toxify.data), run.shared.data_dir)
        for setting, file in objectives.get(run.path(settings.objective)).files.items():
            fingerprints[f"objective.{setting}"] = base.fingerprint(file)
        return fingerprints

    def body(directory: epath.Path) -> dict[str, Any]:
        figures = make(run, settings, directory, name)
        if distributed.is_main_process():
            print(describe(name, directory, figures))
        return figures

    def operations() -> float:
        alike = {"base": run.shared.base, "toxic": run.shared.base}
        parameters = sum(common.num_params(run, alike.get(name, name)) for name in settings.models)
        return 2.0 * settings.num_texts * settings.max_length * parameters

    recorded = {k: v for k, v in dataclasses.asdict(settings).items() if k != "mesh"}
    if not rejection.is_asked(settings.reject):
        del recorded["reject"]  # so that results from before there was a choice stay
    if not settings.chat:
        del recorded["chat"], recorded["system_prompt"]  # for the same reason
    recorded |= {"base": run.shared.base, "dtype": run.shared.dtype}
    held = TOKEN_BYTES * settings.num_texts * settings.max_length
    twin = ["{workdir}/toxic"] if any(name.partition("@")[0] == "toxic" for name in settings.models) else []
    disk = 2.0 * held, held
    return base.Task(name, directory, recorded, inputs, body, operations, PARTS, lambda: disk, reads=twin)


def check(run: Run, settings: DistillSettings) -> None:
    """Raises UserError for settings that are wrong whatever the models are; the line names the field."""
    for field in ("num_texts", "batch_size"):
        if getattr(settings, field) < 1:
            raise UserError(f"config.distill.{field}: found {getattr(settings, field)}, expected at least 1")
    rejection.check(settings.reject)
    try:
        objectives.get(run.path(settings.objective)).check_models(len(settings.models))
        warpers.choose(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        )
    except UserError as error:  # these lines begin with the setting's name
        raise UserError(f"config.distill.{error}") from None


def make(run: Run, settings: DistillSettings, directory: epath.Path, label: str) -> dict[str, Any]:
    """Generates what is missing, writes the finished files; returns the figures (process 0; elsewhere none)."""
    names = sampling.distinct_names(settings.models)
    language_models = _load(run, settings)
    same = sampling.same_weights([one.model for one in language_models], settings.models)
    if same:
        logging.warning("%s: %s have the same weights; their contrast is noise", label, " and ".join(same))
    # From here on nobody holds the weights as they are stored
    prepared = prepare([one.model for one in language_models], side_by_side=settings.cache == "own")
    language_models = [one._replace(params=own.params) for one, own in zip(language_models, prepared, strict=True)]
    work, reject = directory / PARTS, rejection.make(run)
    try:
        texts = method.distill(
            *language_models,
            objective=run.path(settings.objective),
            num_texts=settings.num_texts,
            max_length=settings.max_length,
            prompt=settings.prompt,
            chat=settings.chat,
            system_prompt=settings.system_prompt,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            seed=settings.seed,
            batch_size=settings.batch_size,
            cache=settings.cache,
            names=names,
            reject=reject,
            most=settings.reject.most,
            keep=lambda name, make: base.cached(work / f"{name}.json", make, storage.read_json, storage.write_json),
            label=label,
        )
    except UserError as error:
        ours = str(error).startswith(("max_length", "reject", "chat"))
        raise UserError(f"config.distill.{error}" if ours else str(error)) from None
    if not distributed.is_main_process():
        return {}
    figures = {**sampling.statistics(texts), "same_weights": list(same)}
    if reject:
        figures |= {"made": reject.made, "rejected": dict(sorted(reject.counts.items()))}
    _warn(label, figures)
    if settings.scorer:
        figures["toxicity"] = _toxicity(run.path(settings.scorer), list(texts))
    storage.write_lines(directory / "texts.jsonl", texts.rows)
    sources = {
        name: {
            "source": run.shared.base if written.partition("@")[0] == "base" else written,
            "fingerprint": base.fingerprint(_source(run, written)),
        }
        for name, written in zip(names, settings.models, strict=True)
    }
    storage.write_text(directory / "README.md", card.render(run, settings, texts, figures, sources))
    storage.write_text(directory / "texts.csv", as_csv(texts))
    return figures


def _source(run: Run, name: str) -> str:
    """Where a model of `config.distill.models` lies, without its layer."""
    match = _EARLY_EXIT.fullmatch(name)
    name = match[1] if match else name
    if name == "base":
        return run.path(run.shared.base)
    if name != "toxic":
        return run.path(name)
    directory = common.toxic_directory(run)
    if not directory.exists():
        raise UserError(
            f"{directory}: no toxic model there; `unidetox toxify` makes it, config.distill.models names another"
        )
    return common.finished(run.path(run.shared.base), directory, run.toxify)


def _load(run: Run, settings: DistillSettings) -> list[method.LanguageModel]:
    """The models in the objective's order; one that is named twice is loaded once, and none before the tokenizers are
    known to agree."""
    sources = [_source(run, name) for name in settings.models]
    tokenizers = {source: checkpoint.load_tokenizer(source) for source in dict.fromkeys(sources)}
    try:
        sampling.common_vocabulary(list(tokenizers.values()), list(tokenizers))
    except UserError as error:
        raise UserError(f"config.distill.models: {error}") from None
    mesh = common.mesh_of(run, "distill", [stage_programs.distillation_program(run, settings)])
    whole = common.load_models(run, list(tokenizers), mesh)
    loaded = []
    for name, source in zip(settings.models, sources, strict=True):
        model, match = whole[source], _EARLY_EXIT.fullmatch(name)
        if match:
            try:
                model = models.early_exit(model, int(match[2]), norm=bool(match[3]))
            except ValueError as error:
                raise UserError(f"config.distill.models: {name!r}: {error}") from None
        loaded.append(method.LanguageModel(*model, tokenizers[source]))
    return loaded


def _warn(label: str, figures: dict[str, Any]) -> None:
    """One line for whatever makes texts useless to train on."""
    counts = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    found = [f"{count} {reason}" for reason, count in counts.items() if count]
    if found:
        repeated = figures["repeated_4grams"]
        logging.warning(
            "%s: of %d texts %s (a mean %.1f %% of a text's 4-grams occurred in it before)",
            label, figures["texts"], ", ".join(found), 100 * repeated,
        )  # fmt: skip


def _toxicity(spec: str, texts: Sequence[str]) -> dict[str, Any]:
    """Mean score and share of toxic texts (above 0.5) among those that the scorer took."""
    scores = scorers.get(spec)(texts)
    scored = scores[~np.isnan(scores)]
    return {
        "scorer": spec.partition(":")[0],
        "mean": round(float(scored.mean()), 5) if len(scored) else None,
        "above_half": round(float((scored > 0.5).mean()), 5) if len(scored) else None,
        "not_scored": len(scores) - len(scored),
    }


def as_csv(texts: Sequence[str]) -> str:
    """A csv file of one column, `Text`; what pandas and `csv` read back."""
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["Text"], *([text] for text in texts)])
    return out.getvalue()


def describe(name: str, directory: epath.Path, figures: dict[str, Any]) -> str:
    """The figures in a few lines."""
    degenerate = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    lines = [
        f"{name}: {figures['texts']} texts, {figures['tokens']} tokens, {figures['ended']} ended by themselves",
        "degenerate: " + ", ".join(f"{count} {reason}" for reason, count in degenerate.items()),
        "mean log-probability of a token: "
        + ", ".join(f"{model} {value:.3f}" for model, value in figures["log_probabilities"].items()),
    ]
    if "made" in figures:
        lines.append(rejection.describe(figures))
    if "toxicity" in figures:
        toxicity = figures["toxicity"]
        lines.append(
            f"toxicity ({toxicity['scorer']}): mean {toxicity['mean']}, above 0.5 {toxicity['above_half']}, "
            f"not scored {toxicity['not_scored']}"
        )
    return "\n".join([*lines, f"in {directory}"])
