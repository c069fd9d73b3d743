"""Training one model on one data set: shared by toxify, detoxify, pretrain and baselines.

The directory gets metrics.jsonl, tensorboard/ and at the end the result: hf/ in Hugging Face's format, or adapter/ in
PEFT's for a LoRA training (and hf/ as well with `lora.merge`). checkpoints/ exists only until then, to resume from.
Settings of how often to save, log or validate are not recorded, and may change when resuming.
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
from unidetox_jax.plan.abstract_programs import training_program
from unidetox_jax.stages import loading
from unidetox_jax.stages.settings import Run, TrainingSettings
from unidetox_jax.stages.task import Task, fingerprint, is_complete

NOT_RECORDED = {"save_minutes", "keep", "evaluate_every", "log_every"}
EXPORT, ADAPTER = "hf", "adapter"


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to train.

    Attributes:
      name, section: of the task and of its configuration section, for messages.
      model, data, validation: as in the configuration, with `{workdir}`.
      from_scratch: random weights; only the configuration and tokenizer of `model` are read.
      needs: directory of a task that must be complete first.
    """

    name: str
    section: str
    directory: epath.Path
    model: str
    data: str
    validation: str
    settings: TrainingSettings
    from_scratch: bool = False
    needs: epath.Path | None = None


def tasks(run: Run, jobs: Sequence[Job]) -> list[Task]:
    """A task for each job. Mistakes in any of them are reported before the first one starts."""

    def inputs(job: Job) -> Mapping[str, str]:
        for other in jobs:
            check(other)
            _check_adapter(other, checkpoint.load_config(run.path(other.model)))
        specs = {"data": job.data, **({"validation": job.validation} if job.validation else {})}
        fingerprints = {name: data.fingerprint(run.path(spec), run.shared.data_dir) for name, spec in specs.items()}
        return {"model": fingerprint(run.path(job.model)), **fingerprints}

    return [
        Task(
            job.name,
            job.directory,
            recorded_settings(run, job),
            functools.partial(inputs, job),
            functools.partial(train, run, job),
            functools.partial(operations, run, job),
            scratch=training.CHECKPOINTS,
            disk=functools.partial(disk, run, job),
        )
        for job in jobs
    ]


def operations(run: Run, job: Job) -> float:
    """Roughly the floating-point operations of the training, for texts of half the maximum length."""
    tokens = job.settings.steps * job.settings.batch_size * job.settings.max_length / 2
    return (4.0 if job.settings.lora.rank else 6.0) * tokens * loading.num_params(run, job.model)


def disk(run: Run, job: Job) -> tuple[float, float]:
    """Bytes at the peak (the kept checkpoints, and the next one or the export) and of the export."""
    settings, cfg = job.settings, loading.load_config(run, job.model)
    state = training.abstract_state(dataclasses.replace(cfg, lora=settings.lora), method.optimizer(settings, 1), None)
    checkpoint_bytes, trained = _num_bytes(state), jax.tree.leaves(state.params)
    export_bytes = 0.0
    if settings.lora.rank:
        export_bytes += _num_bytes(trained)
    if settings.lora.merge or not settings.lora.rank:
        dtype = settings.export_dtype or trained[0].dtype
        export_bytes += models.num_params(cfg) * np.dtype(dtype).itemsize
    return settings.keep * checkpoint_bytes + max(checkpoint_bytes, export_bytes), export_bytes


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def recorded_settings(run: Run, job: Job) -> dict[str, Any]:
    """The settings that the result depends on."""
    names = [field.name for field in dataclasses.fields(TrainingSettings) if field.name not in NOT_RECORDED]
    settings = {name: value for name, value in dataclasses.asdict(job.settings).items() if name in names}
    return {**settings, "model": job.model, "data": job.data, "validation": job.validation, "dtype": run.shared.dtype}


def train(run: Run, job: Job, directory: epath.Path) -> dict[str, Any]:
    """Trains and exports; returns the figures for the record.

    Raises:
      UserError, Preempted: as `method.finetune`.
    """
    source = run.path(job.model)
    cfg = checkpoint.load_config(source)
    cfg = dataclasses.replace(cfg, dtype=run.shared.dtype or cfg.dtype)
    uses_adapter = bool(job.settings.lora.rank)
    mesh = loading.make_mesh(run, job.section.removeprefix("config."), [training_program(job.name, cfg, job.settings)])
    param_dtype = None if uses_adapter else method.optimizer(job.settings, 1).param_dtype

    def initial() -> Any:
        if not job.from_scratch:
            return loading.load_model(run, job.model, mesh, param_dtype).params
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
    if uses_adapter:
        checkpoint.save_adapter(directory / ADAPTER, trained.model, source)
    merge = uses_adapter and job.settings.lora.merge
    if merge:  # into the weights as stored, which the training may have held in another dtype
        trained = trained._replace(params=None)
        trained = trained._replace(params=checkpoint.load(f"{source}+{directory / ADAPTER}", mesh).params)
    if merge or not uses_adapter:
        method.save(trained, directory / EXPORT, job.settings.export_dtype or None)
    logging.info("%s: %s", job.name, describe(trained.history))
    return dict(trained.history)


def describe(history: Mapping[str, Any]) -> str:
    """A training's figures in a line."""
    line = f"{history['steps']:,} steps in {history['seconds']:,.0f} s, loss {history['train_loss']:.4f}"
    if "validation_loss" in history:
        line += f", validation loss {history['validation_loss_before']:.4f} -> {history['validation_loss']:.4f}"
    return f"{line}, {history['tokens_per_second']:,.0f} tokens/s"


def _check_adapter(job: Job, cfg: models.ModelConfig) -> None:
    """Raises UserError for an adapter that the model cannot have."""
    if job.from_scratch and job.settings.lora.rank:
        raise UserError(f"{job.section}.lora.rank: found {job.settings.lora.rank}, but random weights need no adapter")
    try:
        models.lora.check(cfg, job.settings)
    except UserError as error:  # its message begins with the setting's name
        raise UserError(f"{job.section}.{error}") from None


def check(job: Job) -> None:
    """Raises UserError for missing inputs, or settings out of range; the first one found."""
    settings, section = job.settings, job.section
    if job.needs is not None and not is_complete(job.needs):
        raise UserError(f"{job.needs}: not complete, and {job.name} needs its texts; run `unidetox distill` first")
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
        raise UserError(f"{section}.steps: found 0, and {section}.epochs is 0 too; set the one that applies")
