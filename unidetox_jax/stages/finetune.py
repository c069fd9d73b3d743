"""One model trained on one data set: what toxify, detoxify and pretrain share.

The directory gets metrics.jsonl, tensorboard/ and, whole and at the end, hf/: the finished model in Hugging Face's
form; or, of an adapter, adapter/ in PEFT's form, and hf/ as well where `lora.merge` asks for it. Until it is complete
there is checkpoints/ as well, from which an interrupted training goes on; no other stage reads that. What only changes
how the work is watched (how often to save, log, evaluate) is no part of the result's settings and may differ when a run
is continued.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import checkpoint, data, method, models, training
from unidetox_jax.checkpoint import hf
from unidetox_jax.data import packing
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.models.transformer import REMAT
from unidetox_jax.plan.programs import training_program
from unidetox_jax.stages import base, common
from unidetox_jax.stages.settings import Run, TrainingSettings

WATCHING = {"save_minutes", "keep", "evaluate_every", "log_every"}
EXPORT, ADAPTER = "hf", "adapter"


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to train.

    name: for messages. section: of the configuration, for messages. model, data, validation: as the configuration
    writes them. scratch: random weights; of the model's directory only config and tokenizer count. after: the
    directory of a stage that must be complete first.
    """

    name: str
    section: str
    directory: epath.Path
    model: str
    data: str
    validation: str
    settings: TrainingSettings
    scratch: bool = False
    after: epath.Path | None = None


def tasks(run: Run, jobs: Sequence[Job]) -> list[base.Task]:
    """A task for each job. Mistakes in any are found before the first one begins."""

    def inputs(job: Job) -> Mapping[str, str]:
        for other in jobs:
            check(other)
            _check_adapter(other, checkpoint.load_config(run.path(other.model)))
        specs = {"data": job.data, **({"validation": job.validation} if job.validation else {})}
        prints = {name: data.fingerprint(run.path(spec), run.shared.data_dir) for name, spec in specs.items()}
        return {"model": base.fingerprint(run.path(job.model)), **prints}

    return [
        base.Task(
            job.name,
            job.directory,
            recorded(run, job),
            functools.partial(inputs, job),
            functools.partial(train, run, job),
            functools.partial(operations, run, job),
            training.CHECKPOINTS,
            functools.partial(disk, run, job),
        )
        for job in jobs
    ]


def operations(run: Run, job: Job) -> float:
    """Roughly the floating-point operations of the training; texts are taken to be half as long as they may be."""
    tokens = job.settings.steps * job.settings.batch_size * job.settings.max_length / 2
    return (4.0 if job.settings.lora.rank else 6.0) * tokens * common.num_params(run, job.model)


def disk(run: Run, job: Job) -> tuple[float, float]:
    """Bytes at most (the kept checkpoints, and one that is written or the finished model) and of the last alone."""
    settings, cfg = job.settings, common.load_config(run, job.model)
    state = training.abstract_state(dataclasses.replace(cfg, lora=settings.lora), method.optimizer(settings, 1), None)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    trained = jax.tree.leaves(state.params)
    held = 0.0
    if settings.lora.rank:
        held += sum(leaf.size * leaf.dtype.itemsize for leaf in trained)
    if settings.lora.merge or not settings.lora.rank:
        dtype = settings.export_dtype or trained[0].dtype
        held += models.num_params(cfg) * np.dtype(dtype).itemsize
    return settings.keep * size + max(size, held), held


def recorded(run: Run, job: Job) -> dict[str, Any]:
    """The settings that the result depends on."""
    names = [field.name for field in dataclasses.fields(TrainingSettings) if field.name not in WATCHING]
    settings = {name: value for name, value in dataclasses.asdict(job.settings).items() if name in names}
    return {**settings, "model": job.model, "data": job.data, "validation": job.validation, "dtype": run.shared.dtype}


def train(run: Run, job: Job, directory: epath.Path) -> dict[str, Any]:
    """Trains, exports, and returns the figures of `stage.json`.

    Raises:
      UserError, Preempted: as `method.finetune`; a data set, model or number that is not as it must be.
    """
    source = run.path(job.model)
    cfg = checkpoint.load_config(source)
    cfg = dataclasses.replace(cfg, dtype=run.shared.dtype or cfg.dtype)
    adapter = bool(job.settings.lora.rank)
    mesh = common.mesh_of(run, job.section.removeprefix("config."), [training_program(job.name, cfg, job.settings)])
    param_dtype = None if adapter else method.optimizer(job.settings, 1).param_dtype

    def initial() -> Any:
        if not job.scratch:
            return common.load_model(run, job.model, mesh, param_dtype).params
        key = jax.random.key(zlib.crc32(f"{job.settings.seed}/{job.directory.name}".encode()))
        return models.init(cfg, key, mesh, param_dtype or "float32")

    def texts(spec: str) -> data.Texts:
        return data.texts(run.path(spec), data_dir=run.shared.data_dir)

    trained = method.finetune(
        method.LanguageModel(initial, cfg, checkpoint.load_tokenizer(source)),
        texts(job.data),
        job.settings,
        validation=texts(job.validation) if job.validation else (),
        directory=directory,
        mesh=mesh,
        label=job.name,
    )
    if adapter:
        checkpoint.save_adapter(directory / ADAPTER, trained.model, source)
    merged = adapter and job.settings.lora.merge
    if merged:  # into the weights as they are stored, which the training need not have held
        trained = trained._replace(params=None)
        trained = trained._replace(params=checkpoint.load(f"{source}+{directory / ADAPTER}", mesh).params)
    if merged or not adapter:
        method.save(trained, directory / EXPORT, job.settings.export_dtype or None)
    logging.info("%s: %s", job.name, describe(trained.history))
    return dict(trained.history)


def describe(figures: Mapping[str, Any]) -> str:
    """The figures in a line."""
    line = f"{figures['steps']:,} steps in {figures['seconds']:,.0f} s, loss {figures['train_loss']:.4f}"
    if "validation_loss" in figures:
        line += f", validation loss {figures['validation_loss_before']:.4f} -> {figures['validation_loss']:.4f}"
    return f"{line}, {figures['tokens_per_second']:,.0f} tokens/s"


def _check_adapter(job: Job, cfg: models.ModelConfig) -> None:
    """UserError for an adapter that the model cannot have."""
    if job.scratch and job.settings.lora.rank:
        raise UserError(f"{job.section}.lora.rank: found {job.settings.lora.rank}, but random weights need no adapter")
    try:
        models.lora.check(cfg, job.settings)
    except UserError as error:  # these lines begin with the setting's name
        raise UserError(f"{job.section}.{error}") from None


def check(job: Job) -> None:
    """UserError for what is missing, or a number that no training can have; the first one found."""
    settings, section = job.settings, job.section
    if job.after is not None and not base.is_complete(job.after):
        raise UserError(f"{job.after}: not complete, and {job.name} needs its texts; run `unidetox distill` first")
    if not job.data:
        raise UserError(f"{section}.data: empty; expected a data set, such as 'jsonl:FILE'")
    for name in ("batch_size", "accumulation", "keep", "evaluate_every", "log_every"):
        if getattr(settings, name) < 1:
            raise UserError(f"{section}.{name}: found {getattr(settings, name)}, expected at least 1")
    for name in ("steps", "epochs", "warmup_steps", "save_minutes", "learning_rate", "weight_decay", "clip_norm"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise UserError(f"{section}.{name}: found {getattr(settings, name)}, expected a number of at least 0")
    for name, known in (
        ("precision", training.PRECISIONS),
        ("remat", REMAT),
        ("layout", packing.LAYOUTS),
        ("export_dtype", ("", *hf.FLOATS)),
    ):
        if (value := getattr(settings, name)) not in known:
            raise UserError(f"{section}.{name}: no {value!r}{suggest(value, filter(None, known))}")
    if not settings.steps and not settings.epochs:
        raise UserError(f"{section}.steps: found 0, and {section}.epochs is 0 too; one of them says how long to train")
