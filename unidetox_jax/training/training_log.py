"""A training run's log: `metrics.jsonl` and TensorBoard events.

`metrics.jsonl` is not appended to but written whole under another name and renamed, so that a kill leaves no partial
line and object stores work too. A resumed run keeps the lines up to its checkpoint's step.
"""

import json
import os
import time
from typing import Any

import jax
from etils import epath

from unidetox_jax import storage
from unidetox_jax.errors import UserError
from unidetox_jax.models.lazy_transformers import torch_hidden

FILE = "metrics.jsonl"
FLUSH_SECONDS = 5.0  # between writes of the file; it is also written before every checkpoint


class Log:
    """The lines of `directory/metrics.jsonl` and the same metrics as TensorBoard events in `directory/tensorboard`.

    At most one line per step: {"step": finished steps, "loss", "grad_norm", "learning_rate": of that step,
    "tokens": targets so far, "seconds": of training so far, over all runs, "tokens_per_second": since the previous
    line, "validation_loss": if evaluated}. Every process keeps the lines, process 0 writes.
    """

    def __init__(self, directory: epath.PathLike | None, step: int):
        """Reads an earlier run's lines up to `step`, where training resumes; directory None: nothing is written."""
        self._path = epath.Path(directory or "") / FILE
        self._writer = directory is not None and jax.process_index() == 0
        self.lines = [line for line in read(self._path) if line["step"] <= step] if directory is not None else []
        last: dict[str, Any] = next((line for line in reversed(self.lines) if "tokens" in line), {})
        self._tokens, self._seconds = last.get("tokens", 0), last.get("seconds", 0.0)
        self._started = self._flushed = time.monotonic()
        self._latest: dict[str, Any] = {}
        self._new_events: list[tuple[int, str, float]] = []  # not yet in TensorBoard's file
        self._events = _Events(self._path.parent / "tensorboard", step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Takes a step's metrics: {"loss", "grad_norm", "learning_rate", "targets"}."""
        self._tokens += int(metrics["targets"])
        values = {name: metrics[name] for name in ("loss", "grad_norm", "learning_rate")}
        self._latest = {"step": step, **values, "tokens": self._tokens}

    def add_line(self) -> dict[str, Any]:
        """Adds a line with the latest step's metrics unless there is one; returns the last line."""
        if not self.lines or self.lines[-1]["step"] < self._latest["step"]:
            previous = next((line for line in reversed(self.lines) if "tokens" in line), {"tokens": 0, "seconds": 0.0})
            seconds = self._seconds + time.monotonic() - self._started
            rate = (self._tokens - previous["tokens"]) / max(seconds - previous["seconds"], 1e-9)
            line = {**self._latest, "seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
            self._append(line)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()
        return self.lines[-1]

    def add_validation(self, step: int, loss: float) -> None:
        """Adds the evaluation loss after `step` steps to that step's line."""
        if self.lines and self.lines[-1]["step"] == step:
            self.lines[-1]["validation_loss"] = loss
            self._new_events.append((step, "validation_loss", loss))
        else:
            self._append({"step": step, "validation_loss": loss})

    def flush(self) -> None:
        """Writes the file and new events. Raises UserError if they cannot be written."""
        self._flushed = time.monotonic()
        if not self._writer:
            return
        storage.write_lines(self._path, self.lines)
        with storage.write_errors(self._path.parent / "tensorboard"):
            self._events.write(self._new_events)
        self._new_events = []

    def _append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._new_events += [(line["step"], name, value) for name, value in line.items() if name != "step"]


class _Events:
    """A file of TensorBoard events, opened at the first write.

    tensorboardX's SummaryWriter does not serve: its thread dies silently on a full disk, and training then hangs.
    """

    def __init__(self, directory: epath.Path, step: int):
        self._directory, self._step = directory, step
        self._file: Any = None

    def write(self, scalars: list[tuple[int, str, float]]) -> None:
        with torch_hidden():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        if self._file is None:
            storage.make_directory(self._directory)
            self._file = event_file_writer.EventsWriter(str(self._directory / "events"), f".{os.getpid()}")
            # Makes TensorBoard discard an earlier run's events beyond the step that this one resumes from
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            first = self._step + 1 if self._step else 0
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=restart))
        for step, name, value in scalars:
            scalar = summary.scalar(name, value)
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar))
        self._file.flush()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none if it does not exist. Raises UserError on a malformed line."""
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append({"step": json.loads(text)["step"], **json.loads(text)})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line of metrics; remove the file to go on") from None
    return lines


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's summary for `stage.json`.

    train_loss: mean over the last tenth of the lines. tokens_per_second: median over lines, which excludes compilation
    and evaluation. seconds: of training, including both.
    """
    steps = [line for line in lines if "loss" in line]
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    last = steps[-max(1, len(steps) // 10) :]
    rates = sorted(line["tokens_per_second"] for line in steps)
    totals = {
        "steps": steps[-1]["step"] if steps else 0,
        "train_loss": sum(line["loss"] for line in last) / len(last) if last else None,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "tokens_per_second": rates[len(rates) // 2] if rates else None,
        "seconds": steps[-1]["seconds"] if steps else 0.0,
    }
    if validations:
        totals |= {"validation_loss_before": validations[0], "validation_loss": validations[-1]}
    return totals
