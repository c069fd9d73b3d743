"""`unidetox baselines`: the models that the rivals of config.baselines need: twins of every target, and their own.

    WORKDIR/baselines/toxic/TARGET     a target fine-tuned on toxic text, shared by all methods that need it
    WORKDIR/baselines/clean/TARGET     the same on clean text
    WORKDIR/baselines/METHOD/TARGET    a method's own model, in hf/

`candidates` says how each method generates text; `unidetox evaluate` evaluates them as forms of their targets.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from unidetox_jax import baselines, checkpoint, data, method, models, training
from unidetox_jax.baselines.base import CLEAN, TOXIC, Baseline
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.plan.abstract_programs import training_program
from unidetox_jax.stages import finetune, loading
from unidetox_jax.stages.settings import Run, model_name
from unidetox_jax.stages.task import Task, digest, fingerprint

SECTION = "config.baselines"
MAX_FORM_LENGTH = 80  # characters; a form is part of a directory's name


def methods(run: Run) -> dict[str, Baseline]:
    """{form: method} of config.baselines.methods.

    Raises:
      UserError: an unknown method, setting or target, a duplicate, missing data.
    """
    settings = run.baselines
    for target in settings.targets:
        if target not in run.shared.targets:
            raise UserError(f"{SECTION}.targets: {target!r}{suggest(target, run.shared.targets)}; see config.targets")
    by_form: dict[str, Baseline] = {}
    for text in settings.methods:
        try:
            baseline = baselines.get(text)
            candidate = baseline.candidate(_twin_paths(run, baseline), "")
            objectives.get(candidate.objective).check_models(len(candidate.models))
        except UserError as error:
            raise UserError(f"{SECTION}.methods: {error}") from None
        if (name := form(text)) in by_form:
            raise UserError(f"{SECTION}.methods: {text!r} is listed twice; list it once")
        by_form[name] = baseline
    for name, baseline in _with_dependencies(by_form).items():
        for kind, field in ((TOXIC, "data"), (CLEAN, "clean_data")):
            if kind in (*baseline.twins(), *baseline.texts) and not _data(run, kind):
                raise UserError(f"{SECTION}.{field}: empty, but {name} needs {kind} text; expected a data set")
    return by_form


def candidates(run: Run) -> dict[str, Candidate]:
    """{form: how it generates text} of every method. Raises UserError as `methods`."""
    return {
        name: dataclasses.replace(
            baseline.candidate(_twin_paths(run, baseline), _model_path(name)), targets=run.baselines.targets
        )
        for name, baseline in methods(run).items()
    }


def tasks(run: Run) -> list[Task]:
    """The twins that the methods need, then the methods' own models. Raises UserError as `methods`."""
    configured = methods(run)
    required = _with_dependencies(configured)
    targets = run.baselines.targets or run.shared.targets
    twins = {kind for baseline in required.values() for kind in baseline.twins()}
    jobs = [_twin_job(run, kind, target) for kind in (TOXIC, CLEAN) if kind in twins for target in targets]
    own_models = [
        _task(run, name, baseline, target, run.baselines.export_dtype if name in configured else "")
        for name, baseline in required.items()
        if baseline.makes
        for target in targets
    ]
    return [*finetune.tasks(run, jobs), *own_models]


def form(text: str) -> str:
    """A method's text as a file name: 'dexperts(alpha=2.0, top_p=0.9)' → 'dexperts-alpha=2.0-top_p=0.9'."""
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", text).strip("-")
    return name if len(name) <= MAX_FORM_LENGTH else f"{name[:MAX_FORM_LENGTH]}-{digest(text)[:8]}"


def _with_dependencies(by_form: Mapping[str, Baseline]) -> dict[str, Baseline]:
    """The methods, each preceded by those whose models it starts from."""
    ordered: dict[str, Baseline] = {}
    for name, baseline in by_form.items():
        others = [text for text in baseline.twins() if text not in (TOXIC, CLEAN)]
        ordered |= _with_dependencies({form(text): baselines.get(text) for text in others})
        ordered[name] = baseline
    return ordered


def _twin_paths(run: Run, baseline: Baseline) -> dict[str, str]:
    """{twin: its path}, with {target}, {name} and {workdir} unfilled."""
    return {
        kind: loading.trained_model("{target}", _model_path(kind), run.baselines)
        if kind in (TOXIC, CLEAN)
        else _model_path(form(kind))
        for kind in baseline.twins()
    }


def _model_path(name: str) -> str:
    return f"{{workdir}}/baselines/{name}/{{name}}"


def _data(run: Run, kind: str) -> str:
    return run.baselines.clean_data if kind == CLEAN else run.baselines.data or run.toxify.data


def _twin_job(run: Run, kind: str, target: str) -> finetune.Job:
    name = model_name(target)
    return finetune.Job(
        name=f"baselines {kind} {name}",
        section=SECTION,
        directory=run.directory(f"baselines/{kind}/{name}"),
        model=target,
        data=_data(run, kind),
        validation=run.baselines.validation if kind == TOXIC else "",
        settings=dataclasses.replace(run.baselines, export_dtype=""),  # methods read it
    )


def _task(run: Run, form: str, baseline: Baseline, target: str, dtype: str) -> Task:
    """Makes a method's own model of a target. dtype: of the exported weights; empty: as made."""
    recipe, name = baseline.recipe(run.baselines), model_name(target)
    paths = {
        kind: path.replace("{target}", target).replace("{name}", name)
        for kind, path in _twin_paths(run, baseline).items()
    }
    job = dataclasses.replace(
        _twin_job(run, TOXIC, target),
        name=f"baselines {form} {name}",
        directory=run.directory(f"baselines/{form}/{name}"),
        validation="",
    )
    texts = {kind: _data(run, kind) for kind in baseline.texts}
    settings: dict[str, Any] = {"method": type(baseline).__name__, **dataclasses.asdict(baseline), "texts": texts}
    settings |= {"model": target, "twins": paths, "dtype": run.shared.dtype, "seed": run.baselines.seed}
    if dtype:
        settings["export_dtype"] = dtype
    if recipe is not None:
        job = dataclasses.replace(job, settings=recipe)
        settings["recipe"] = {k: v for k, v in finetune.recorded_settings(run, job).items() if k != "data"}

    def inputs() -> Mapping[str, str]:
        if recipe is not None:
            finetune.check(job)
        of_texts = {
            f"{kind} text": data.fingerprint(run.path(text), run.shared.data_dir) for kind, text in texts.items()
        }
        return {kind: fingerprint(run.path(path)) for kind, path in {"model": target, **paths}.items()} | of_texts

    def disk() -> tuple[float, float]:
        model_bytes = 4.0 * loading.num_params(run, target)
        return (model_bytes if recipe is None else finetune.disk(run, job)[0]), model_bytes

    return Task(
        job.name,
        job.directory,
        settings,
        inputs,
        functools.partial(_make, run, job, baseline, paths, texts, dtype),
        None if recipe is None else functools.partial(finetune.operations, run, job),
        scratch=training.CHECKPOINTS,
        disk=disk,
    )


def _make(
    run: Run,
    job: finetune.Job,
    baseline: Baseline,
    paths: Mapping[str, str],
    texts: Mapping[str, str],
    dtype: str,
    directory: epath.Path,
) -> dict[str, Any]:
    """Makes and exports a method's own model; returns the figures for the record."""
    recipe = baseline.recipe(run.baselines)
    cfg = loading.load_config(run, job.model)
    mesh = loading.make_mesh(run, "baselines", [] if recipe is None else [training_program(job.name, cfg, recipe)])

    def load(source: str) -> method.LanguageModel:
        model = models.lora.merge(loading.load_model(run, source, mesh, "float32"))
        return method.LanguageModel(*model, checkpoint.load_tokenizer(run.path(source)))

    model = baseline.make(
        load(job.model),
        {kind: load(path) for kind, path in paths.items()},
        {kind: data.texts(run.path(text), data_dir=run.shared.data_dir) for kind, text in texts.items()},
        recipe or run.baselines,
        directory=directory,
        mesh=mesh,
        label=job.name,
    )
    method.save(model, directory / finetune.EXPORT, dtype or None)
    logging.info("%s: made%s", job.name, "" if recipe is None else f"; {finetune.describe(model.history)}")
    return dict(model.history)
