"""`unidetox baselines`: what the rivals of config.baselines need: twins of every target, and their own models of it.

    WORKDIR/baselines/toxic/TARGET     a target fine-tuned on toxic text, for all methods that need it; as WORKDIR/toxic
    WORKDIR/baselines/clean/TARGET     the same on clean text
    WORKDIR/baselines/METHOD/TARGET    a method's own model, in hf/

`candidates` says how each method's text comes about; `unidetox evaluate` evaluates them as forms of their targets.
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
from unidetox_jax.plan.programs import training_program
from unidetox_jax.stages import base, common, finetune
from unidetox_jax.stages.settings import Run, model_name

SECTION = "config.baselines"
LONGEST = 80  # letters of a method's name that is a directory's


def methods(run: Run) -> dict[str, Baseline]:
    """Name of the form → method, of config.baselines.methods.

    Raises:
      UserError: an unknown method or setting, one named twice, text that is missing, a target that is none.
    """
    settings = run.baselines
    for target in settings.targets:
        if target not in run.shared.targets:
            raise UserError(f"{SECTION}.targets: {target!r}{suggest(target, run.shared.targets)}; see config.targets")
    found: dict[str, Baseline] = {}
    for text in settings.methods:
        try:
            one = baselines.get(text)
            candidate = one.candidate(_paths(run, one), "")
            objectives.get(candidate.objective).check_models(len(candidate.models))
        except UserError as error:
            raise UserError(f"{SECTION}.methods: {error}") from None
        if (name := form(text)) in found:
            raise UserError(f"{SECTION}.methods: {text!r} stands there twice; name it once")
        found[name] = one
    for name, one in _with_twins(found).items():
        for kind, field in ((TOXIC, "data"), (CLEAN, "clean_data")):
            if kind in (*one.twins(), *one.texts) and not _data(run, kind):
                raise UserError(f"{SECTION}.{field}: empty, but {name} needs {kind} text; expected a data set")
    return found


def candidates(run: Run) -> dict[str, Candidate]:
    """Name of the form → how its text comes about, of every method. Raises UserError as `methods`."""
    return {
        name: dataclasses.replace(one.candidate(_paths(run, one), _own(name)), targets=run.baselines.targets)
        for name, one in methods(run).items()
    }


def tasks(run: Run) -> list[base.Task]:
    """The twins that the methods need, then the methods' own models. Raises UserError as `methods`."""
    named = methods(run)
    every = _with_twins(named)
    targets = run.baselines.targets or run.shared.targets
    needed = {kind for one in every.values() for kind in one.twins()}
    jobs = [_twin(run, kind, target) for kind in (TOXIC, CLEAN) if kind in needed for target in targets]
    dtypes = {name: run.baselines.export_dtype if name in named else "" for name in every}  # others are made from it
    makers = [(name, one) for name, one in every.items() if one.makes]
    made = [_task(run, name, one, target, dtypes[name]) for name, one in makers for target in targets]
    return [*finetune.tasks(run, jobs), *made]


def form(text: str) -> str:
    """A method's text as a file's name: 'dexperts(alpha=2.0, top_p=0.9)' → 'dexperts-alpha=2.0-top_p=0.9'."""
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", text).strip("-")
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{base.digest(text)[:8]}"


def _with_twins(found: Mapping[str, Baseline]) -> dict[str, Baseline]:
    """The methods, each after those whose models it is made from."""
    every: dict[str, Baseline] = {}
    for name, one in found.items():
        others = [text for text in one.twins() if text not in (TOXIC, CLEAN)]
        every |= _with_twins({form(text): baselines.get(text) for text in others})
        every[name] = one
    return every


def _paths(run: Run, one: Baseline) -> dict[str, str]:
    """Twin → its path, with {target}, {name} and {workdir} in it."""
    return {
        kind: common.finished("{target}", _own(kind), run.baselines) if kind in (TOXIC, CLEAN) else _own(form(kind))
        for kind in one.twins()
    }


def _own(name: str) -> str:
    return f"{{workdir}}/baselines/{name}/{{name}}"


def _data(run: Run, kind: str) -> str:
    return run.baselines.clean_data if kind == CLEAN else run.baselines.data or run.toxify.data


def _twin(run: Run, kind: str, target: str) -> finetune.Job:
    name = model_name(target)
    return finetune.Job(
        name=f"baselines {kind} {name}",
        section=SECTION,
        directory=common.baseline_directory(run, kind, name),
        model=target,
        data=_data(run, kind),
        validation=run.baselines.validation if kind == TOXIC else "",
        settings=dataclasses.replace(run.baselines, export_dtype=""),  # others are made from it
    )


def _task(run: Run, name: str, one: Baseline, target: str, dtype: str) -> base.Task:
    """The making of a method's own model of a target. dtype: of its weights as they are written; empty: as made."""
    recipe = one.recipe(run.baselines)
    paths = {
        kind: path.replace("{target}", target).replace("{name}", model_name(target))
        for kind, path in _paths(run, one).items()
    }
    job = dataclasses.replace(_twin(run, TOXIC, target), name=f"baselines {name} {model_name(target)}", validation="")
    job = dataclasses.replace(job, directory=common.baseline_directory(run, name, model_name(target)))
    texts = {kind: _data(run, kind) for kind in one.texts}
    settings: dict[str, Any] = {"method": type(one).__name__, **dataclasses.asdict(one), "texts": texts}
    settings |= {"model": target, "twins": paths, "dtype": run.shared.dtype, "seed": run.baselines.seed}
    if dtype:
        settings["export_dtype"] = dtype
    if recipe is not None:
        job = dataclasses.replace(job, settings=recipe)
        settings["recipe"] = {key: value for key, value in finetune.recorded(run, job).items() if key != "data"}

    def inputs() -> Mapping[str, str]:
        if recipe is not None:
            finetune.check(job)
        prints = {kind: data.fingerprint(run.path(text), run.shared.data_dir) for kind, text in texts.items()}
        models = {kind: base.fingerprint(run.path(path)) for kind, path in {"model": target, **paths}.items()}
        return {**models, **{f"{kind} text": value for kind, value in prints.items()}}

    def disk() -> tuple[float, float]:
        kept = 4.0 * common.num_params(run, target)
        return (finetune.disk(run, job)[0] if recipe is not None else kept), kept

    return base.Task(
        job.name,
        job.directory,
        settings,
        inputs,
        functools.partial(_make, run, job, one, paths, texts, dtype),
        functools.partial(finetune.operations, run, job) if recipe is not None else None,
        training.CHECKPOINTS,
        disk,
    )


def _make(
    run: Run,
    job: finetune.Job,
    one: Baseline,
    paths: Mapping[str, str],
    texts: Mapping[str, str],
    dtype: str,
    directory: epath.Path,
) -> dict[str, Any]:
    """Makes a method's own model and exports it; returns the figures of `stage.json`."""
    recipe = one.recipe(run.baselines)
    cfg = common.load_config(run, job.model)
    mesh = common.mesh_of(run, "baselines", [] if recipe is None else [training_program(job.name, cfg, recipe)])

    def load(source: str) -> method.LanguageModel:
        model = models.lora.merge(common.load_model(run, source, mesh, "float32"))
        return method.LanguageModel(*model, checkpoint.load_tokenizer(run.path(source)))

    made = one.make(
        load(job.model),
        {kind: load(path) for kind, path in paths.items()},
        {kind: data.texts(run.path(text), data_dir=run.shared.data_dir) for kind, text in texts.items()},
        recipe or run.baselines,
        directory=directory,
        mesh=mesh,
        label=job.name,
    )
    method.save(made, directory / finetune.EXPORT, dtype or None)
    logging.info("%s: made%s", job.name, "" if recipe is None else f"; {finetune.describe(made.history)}")
    return dict(made.history)
