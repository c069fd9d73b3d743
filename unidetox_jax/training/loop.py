"""The training loop: restore, step, log, evaluate, save; resumed at any step, it gives the same parameters.

The loop never waits for the step that it has just dispatched: a step's metrics are read when two more are in flight.
All are read before a checkpoint is written, so that no state after a bad loss is ever saved.
"""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from unidetox_jax import data, devices, distributed, models, sharding
from unidetox_jax.checkpoint import Checkpointer
from unidetox_jax.errors import Diverged, Preempted, UserError
from unidetox_jax.models import costs
from unidetox_jax.progress import Progress
from unidetox_jax.training import preemption, training_log
from unidetox_jax.training.criterion import LANGUAGE_MODELLING, Criterion
from unidetox_jax.training.optimizer import Optimizer
from unidetox_jax.training.step import TrainState, abstract_state, init_state, make_eval_step, make_train_step

CHECKPOINTS = "checkpoints"
MAX_IN_FLIGHT = 2  # steps dispatched before an earlier one's metrics are read
MAX_ROWS_LISTED = 16  # rows of a bad batch that the message names


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train, and how often to save, evaluate and log; in steps, except for checkpoints.

    save_minutes: between checkpoints. They coincide with lines of metrics.jsonl, so that the clock does not affect its
      content, and one follows the last step.
    keep: how many checkpoints are kept, the newest ones.
    evaluate_every: evaluation also happens before the first step and after the last.
    """

    steps: int
    save_minutes: float = 10.0
    keep: int = 2
    evaluate_every: int = 500
    log_every: int = 10


def fit(
    directory: epath.PathLike | None,
    cfg: models.ModelConfig,
    initial: Callable[[], Any],
    batches: data.Batches,
    settings: LoopSettings,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    criterion: Criterion = LANGUAGE_MODELLING,
    base: Any = None,
    validation: data.Tokens | None = None,
    label: str = "training",
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Trains to `settings.steps`, from the newest checkpoint in `directory` or else from `initial()`.

    Args:
      directory: receives checkpoints/, metrics.jsonl and tensorboard/; None: nothing is written.
      cfg: the model's configuration; with `lora`, an adapter is trained.
      initial: gives the initial parameters (with `lora`, the adapter's); not called if there is a checkpoint.
      batches: training data; `batches[step]` is the batch after `step` finished steps.
      criterion: the loss and the parameters that are trained.
      base: the frozen weights, if the criterion has any.
      validation: data for the evaluation loss, if any.
      label: for messages and the progress bar.
      options: accumulation, remat, dropout_seed, as in `make_train_step`.

    Returns:
      The trained parameters (with `lora`, the adapter's), and `training_log.summary`.

    Raises:
      Preempted: SIGTERM was received; the state is saved.
      Diverged: a loss or gradient that is not finite, on all processes alike; earlier checkpoints remain.
      UserError: another model's checkpoints, or a directory that cannot be written.
    """
    train_step = make_train_step(cfg, optimizer, mesh, criterion=criterion, **options)
    evaluate = None
    if validation is not None:
        evaluate = _make_evaluation(cfg, mesh, criterion, base, validation, batches.batch_size, settings)
    placement, frozen = sharding.batch_sharding(mesh), () if base is None else (base,)
    with preemption.sigterm_flag() as stop_requested, _checkpointer(directory, settings.keep) as checkpoints:
        start, state = _restore_or_init(checkpoints, cfg, criterion, initial, optimizer, mesh, settings.steps, label)
        log, clock = training_log.Log(directory, start), _SaveClock(settings.save_minutes, start)
        if evaluate and start == 0:
            log.add_validation(0, evaluate(state.params))
        with (
            data.prefetch(lambda step: sharding.put(batches[step], placement), start, settings.steps) as device_batches,
            Progress(settings.steps, "steps", label, start, disable=jax.process_index() != 0) as bar,
        ):
            reader = _MetricsReader(cfg, batches, settings, log, bar, checkpoints, label)
            for step, batch in enumerate(device_batches, start + 1):
                state, step_metrics = train_step(state, batch, *frozen)
                reader.add(step, step_metrics)
                last, stop = step == settings.steps, stop_requested()
                evaluation_due = evaluate and (step % settings.evaluate_every == 0 or last)
                save_due = checkpoints and ((step % settings.log_every == 0 and clock.due(step)) or last or stop)
                if evaluation_due or save_due or last:
                    reader.drain()
                if evaluate and evaluation_due:
                    log.add_validation(step, evaluate(state.params))
                if save_due:
                    log.flush()  # before the checkpoint, so that a run that resumes from it has all earlier lines
                    checkpoints.save(step, state, wait=last or stop)
                    clock.saved()
                if stop:
                    raise _preempted(f"at step {step} of {settings.steps}", bool(checkpoints), label)
        log.flush()
    return state.params, training_log.summary(log.lines)


class _SaveClock:
    """Decides after which steps to save: by process 0's clock, the same for all processes.

    Each query is a round trip between hosts, so only some steps query, which all processes know: the number of steps
    between two queries doubles if these took little of the interval and halves if they took much.
    """

    FRACTION = 0.1  # of the interval: the longest time between two queries at a steady pace

    def __init__(self, minutes: float, step: int):
        self._interval, self._gap, self._next = 60.0 * minutes, 1, step + 1
        self._queried = self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step; all processes call it with the same steps."""
        if step < self._next:
            return False
        now, limit, gap = time.monotonic(), self.FRACTION * self._interval, self._gap
        elapsed, self._queried = now - self._queried, now
        gap = 2 * gap if 2 * elapsed < limit else max(1, gap // 2) if elapsed > limit else gap
        due, self._gap = json.loads(distributed.broadcast(json.dumps([now - self._saved >= self._interval, gap])))
        self._next = step + self._gap
        return due

    def saved(self) -> None:
        """Restarts the interval."""
        self._saved = time.monotonic()


def _preempted(where: str, saved: bool, label: str) -> Preempted:
    if saved:
        return Preempted(f"{label}: stopped, saved {where}; the same command continues")
    return Preempted(f"{label}: stopped {where}; nothing is saved without a directory")


def _checkpointer(directory: epath.PathLike | None, keep: int):
    return contextlib.nullcontext() if directory is None else Checkpointer(epath.Path(directory) / CHECKPOINTS, keep)


def _restore_or_init(
    checkpoints: Checkpointer | None,
    cfg,
    criterion: Criterion,
    initial,
    optimizer: Optimizer,
    mesh: Mesh,
    steps: int,
    label: str,
) -> tuple[int, TrainState]:
    """(finished steps, state) to continue from."""
    state = abstract_state(cfg, optimizer, mesh, criterion)
    if checkpoints is None or (restored := checkpoints.restore_latest(state)) is None:
        return 0, init_state(initial(), optimizer)
    step, state = restored
    if step > steps:
        raise UserError(f"{checkpoints.directory}: holds step {step}, but training ends at step {steps}")
    logging.info("%s: continues from step %d of %d", label, step, steps)
    return step, state


def worthwhile_shapes(programs: int, most: int) -> int:
    """How many shapes to compile for so many program runs: compiling takes as long as about a hundred of them."""
    return min(most, 1 + programs // 100)


def _make_evaluation(
    cfg, mesh: Mesh, criterion: Criterion, base: Any, tokens: data.Tokens, batch_size: int, settings: LoopSettings
) -> Callable[[Any], float]:
    """A function from trained parameters to the model's mean loss over all targets of `tokens`."""
    passes = 2 + settings.steps // settings.evaluate_every
    shapes = worthwhile_shapes(passes * len(tokens) // batch_size, most=6)
    plans = data.epoch_plans(tokens, batch_size, row_multiple=sharding.batch_shards(mesh), max_shapes=shapes)
    placement = sharding.batch_sharding(mesh)
    step = make_eval_step(cfg, mesh)

    def evaluate(params: Any) -> float:
        params = criterion.model(base, params, cfg)
        with data.prefetch(
            lambda i: sharding.put(data.collate(tokens, *plans[i]), placement), 0, len(plans)
        ) as batches:
            sums = [step(params, batch) for batch in batches]
        sums = jax.device_get(sums)
        return sum(float(s["total"]) for s in sums) / sum(float(s["targets"]) for s in sums)

    return evaluate


class _MetricsReader:
    """Reads the metrics of steps in flight, checks them, and passes them on to the log and the progress bar."""

    def __init__(
        self, cfg, batches: data.Batches, settings: LoopSettings, log: training_log.Log, bar, checkpoints, label: str
    ):
        self._batches, self._settings, self._log, self._bar = batches, settings, log, bar
        self._checkpoints, self._label = checkpoints, label
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        device = devices.specs(jax.devices()[0].device_kind)
        self._peak = device.flops * jax.device_count() if device else None
        self._flops = costs.training_flops(cfg, float(batches.tokens.lengths.mean()))

    def add(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched step and reads those of `MAX_IN_FLIGHT` steps earlier."""
        self._pending.append((step, step_metrics))
        while len(self._pending) > MAX_IN_FLIGHT:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for all steps in flight and logs them."""
        while self._pending:
            self._read(*self._pending.popleft())
        self._log.add_line()

    def _read(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._refuse(step, values)
        self._log.record(step, values)
        if step % self._settings.log_every == 0:
            line = self._log.add_line()
            postfix = {"loss": f"{line['loss']:.4f}", "tokens/s": f"{line['tokens_per_second']:,.0f}"}
            if self._peak:
                postfix["MFU"] = f"{line['tokens_per_second'] * self._flops / self._peak:.1%}"
            self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(1)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        saved = self._checkpoints.latest_step() if self._checkpoints else None
        rows = self._batches.tokens.rows[self._batches.indices(step - 1)].tolist()
        listed = ", ".join(map(str, rows[:MAX_ROWS_LISTED])) + (" …" if len(rows) > MAX_ROWS_LISTED else "")
        kept = "no checkpoint was written yet" if saved is None else f"the checkpoint of step {saved} is kept"
        self._log.flush()
        raise Diverged(
            f"{self._label}: step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, on rows "
            f"{listed} of the data (from 0); {kept}; try a lower learning_rate"
        )
