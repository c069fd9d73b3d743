"""The training loop: restore, step, tell, evaluate, save; from any step on, to the same parameters.

The loop never waits for the step that it has just begun: a step's metrics are read when two more are under way. All
are read before a checkpoint is written, so that no state that followed a bad loss is ever saved.
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
from unidetox_jax.errors import Preempted, UserError
from unidetox_jax.models import costs
from unidetox_jax.progress import Progress
from unidetox_jax.training import metrics, preemption
from unidetox_jax.training.criterion import LANGUAGE_MODELLING, Criterion
from unidetox_jax.training.optimizer import Optimizer
from unidetox_jax.training.step import TrainState, abstract_state, init_state, make_eval_step, make_train_step

CHECKPOINTS = "checkpoints"
BEHIND = 2  # steps under way while an earlier one's figures are read
ROWS_NAMED = 16  # rows of a bad batch that the message lists


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train, and how often to do what else; in steps, but for checkpoints.

    save_minutes: between checkpoints, which come with a line of metrics.jsonl, so that the clock does not decide what
    stands there; there is one after the last step too. keep: newest checkpoints kept. Evaluation happens before the
    first step and after the last one as well.
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
    schedule: Schedule,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    criterion: Criterion = LANGUAGE_MODELLING,
    base: Any = None,
    validation: data.Tokens | None = None,
    label: str = "training",
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Trains to `schedule.steps`, from the newest checkpoint in `directory` or from `initial()`.

    Args:
      directory: gets checkpoints/, metrics.jsonl and tensorboard/; None: nothing is kept.
      cfg: the model's configuration; with its `lora` an adapter is trained, which `initial` gives.
      initial: gives the parameters to begin with; not called where there is a checkpoint.
      batches: what to train on; `batches[step]` is the batch of the step after `step` finished ones.
      schedule: steps, and how often to save, evaluate and log.
      optimizer: of training.optimizer.
      mesh: where it all lives.
      criterion: what is trained, and by which loss.
      base: the weights that stay as they are, of an adapter or another criterion that keeps them; None: there are none.
      validation: what the evaluation loss is computed on; None: none.
      label: for messages and the progress bar. options: accumulation, remat, dropout_seed, as in `make_train_step`.

    Returns:
      (params, figures): the trained parameters (of an adapter, the adapter's), and `metrics.summary`.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      UserError: a loss or gradient that is not finite (the checkpoints are those before it), another model's
        checkpoints, or a directory that cannot be written.
    """
    train_step = make_train_step(cfg, optimizer, mesh, criterion=criterion, **options)
    evaluate = None
    if validation is not None:
        evaluate = _evaluation(cfg, mesh, criterion, base, validation, batches.batch_size, schedule)
    placed, frozen = sharding.batch_sharding(mesh), () if base is None else (base,)
    with preemption.noted() as asked_to_stop, _checkpointer(directory, schedule.keep) as checkpoints:
        start, state = _begin(checkpoints, cfg, criterion, initial, optimizer, mesh, schedule.steps, label)
        log, clock = metrics.Log(directory, start), _SaveClock(schedule.save_minutes, start)
        if evaluate and start == 0:
            log.validation(0, evaluate(state.params))
        with (
            data.ahead(lambda step: sharding.put(batches[step], placed), start, schedule.steps) as made,
            Progress(schedule.steps, "steps", label, start, disable=jax.process_index() != 0) as bar,
        ):
            report = _Report(cfg, batches, schedule, log, bar, checkpoints, label)
            for step, batch in enumerate(made, start + 1):
                state, figures = train_step(state, batch, *frozen)
                report.began(step, figures)
                last, stop = step == schedule.steps, asked_to_stop()
                evaluation_due = evaluate and (step % schedule.evaluate_every == 0 or last)
                save_due = checkpoints and ((step % schedule.log_every == 0 and clock.due(step)) or last or stop)
                if evaluation_due or save_due or last:
                    report.settle()
                if evaluate and evaluation_due:
                    log.validation(step, evaluate(state.params))
                if save_due:
                    log.flush()  # before the checkpoint: a run that continues from it finds every line before it
                    checkpoints.save(step, state, wait=last or stop)
                    clock.saved()
                if stop:
                    raise _preempted(f"at step {step} of {schedule.steps}", bool(checkpoints), label)
        log.flush()
    return state.params, metrics.summary(log.lines)


class _SaveClock:
    """Says after which steps to save: all processes after the same one, by process 0's clock.

    Asking it is a round trip between hosts, so it is asked at steps that all know: as far on as the time before, or
    twice as far where that took little of the interval, half as far where it took much.
    """

    SHARE = 0.1  # of the interval, between two questions at most while the pace stays

    def __init__(self, minutes: float, step: int):
        self._interval, self._gap, self._next = 60.0 * minutes, 1, step + 1
        self._asked = self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step; every process calls it with the same steps."""
        if step < self._next:
            return False
        now, most, gap = time.monotonic(), self.SHARE * self._interval, self._gap
        took, self._asked = now - self._asked, now
        gap = 2 * gap if 2 * took < most else max(1, gap // 2) if took > most else gap
        due, self._gap = json.loads(distributed.as_first_says(json.dumps([now - self._saved >= self._interval, gap])))
        self._next = step + self._gap
        return due

    def saved(self) -> None:
        """From now on the interval counts anew."""
        self._saved = time.monotonic()


def _preempted(where: str, saved: bool, label: str) -> Preempted:
    if saved:
        return Preempted(f"{label}: stopped, saved {where}; the same command continues")
    return Preempted(f"{label}: stopped {where}; without a directory nothing is kept")


def _checkpointer(directory: epath.PathLike | None, keep: int):
    return contextlib.nullcontext() if directory is None else Checkpointer(epath.Path(directory) / CHECKPOINTS, keep)


def _begin(
    checkpoints: Checkpointer | None,
    cfg,
    criterion: Criterion,
    initial,
    optimizer: Optimizer,
    mesh: Mesh,
    steps: int,
    label: str,
) -> tuple[int, TrainState]:
    """(finished steps, state) to go on from."""
    state = abstract_state(cfg, optimizer, mesh, criterion)
    if checkpoints is None or (restored := checkpoints.restore_latest(state)) is None:
        return 0, init_state(initial(), optimizer)
    step, state = restored
    if step > steps:
        raise UserError(f"{checkpoints.directory}: holds step {step}, but training ends at step {steps}")
    logging.info("%s: continues from step %d of %d", label, step, steps)
    return step, state


def worthwhile_shapes(programs: int, most: int) -> int:
    """How many shapes to compile for so many runs of a program: compiling one takes as long as about a hundred."""
    return min(most, 1 + programs // 100)


def _evaluation(
    cfg, mesh: Mesh, criterion: Criterion, base: Any, tokens: data.Tokens, batch_size: int, schedule: Schedule
) -> Callable[[Any], float]:
    """params → mean loss of the model that they are, or are of, over all targets of `tokens`."""
    passes = 2 + schedule.steps // schedule.evaluate_every
    shapes = worthwhile_shapes(passes * len(tokens) // batch_size, most=6)
    plans = data.one_pass(tokens, batch_size, row_multiple=sharding.batch_shards(mesh), max_shapes=shapes)
    placed = sharding.batch_sharding(mesh)
    step = make_eval_step(cfg, mesh)

    def evaluate(params: Any) -> float:
        params = criterion.model(base, params, cfg)
        with data.ahead(lambda i: sharding.put(data.fill(tokens, *plans[i]), placed), 0, len(plans)) as made:
            sums = [step(params, batch) for batch in made]
        sums = jax.device_get(sums)
        return float(sum(float(one["total"]) for one in sums) / sum(float(one["targets"]) for one in sums))

    return evaluate


class _Report:
    """The figures of steps under way, read late, checked, and passed on to the log and the bar."""

    def __init__(self, cfg, batches: data.Batches, schedule: Schedule, log: metrics.Log, bar, checkpoints, label: str):
        self._batches, self._schedule, self._log, self._bar = batches, schedule, log, bar
        self._checkpoints, self._label = checkpoints, label
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        device = devices.specs(jax.devices()[0].device_kind)
        self._peak = device.flops * jax.device_count() if device else None
        self._flops = costs.training_flops(cfg, float(batches.tokens.lengths.mean()))

    def began(self, step: int, figures: dict[str, jax.Array]) -> None:
        """Takes a step's figures, not yet computed, and reads those of `BEHIND` steps earlier."""
        self._pending.append((step, figures))
        while len(self._pending) > BEHIND:
            self._read(*self._pending.popleft())

    def settle(self) -> None:
        """Waits for all steps under way, and logs them."""
        while self._pending:
            self._read(*self._pending.popleft())
        self._log.line()

    def _read(self, step: int, figures: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(figures).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._refuse(step, values)
        self._log.note(step, values)
        if step % self._schedule.log_every == 0:
            line = self._log.line()
            shown = {"loss": f"{line['loss']:.4f}", "tokens/s": f"{line['tokens_per_second']:,.0f}"}
            if self._peak:
                shown["MFU"] = f"{line['tokens_per_second'] * self._flops / self._peak:.1%}"
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        saved = self._checkpoints.latest_step() if self._checkpoints else None
        rows = self._batches.tokens.rows[self._batches.indices(step - 1)].tolist()
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + (" …" if len(rows) > ROWS_NAMED else "")
        kept = "no checkpoint was written yet" if saved is None else f"the checkpoint of step {saved} is kept"
        self._log.flush()
        raise UserError(
            f"{self._label}: step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, on rows "
            f"{named} of the data (from 0); {kept}; try a lower learning_rate"
        )
