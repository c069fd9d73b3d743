"""Tasks of lm-evaluation-harness as a metric. The harness, an extra, is imported only if there are tasks to run."""

from collections.abc import Mapping
from typing import Any

from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject


class HarnessTasks(Metric):
    """The tasks of config.evaluate.harness with their own metrics, listed beside the table, not in it."""

    field = "harness"
    loads = "subject"

    def compute(self, subject: Subject) -> Result:
        return Result(subject.keep("harness.json", lambda: self._measure(subject)))

    def _measure(self, subject: Subject) -> dict[str, dict[str, float]]:
        from unidetox_jax.evaluation import harness

        settings = subject.settings
        return harness.evaluate(
            *subject.load(),
            [subject.path(task) for task in settings.harness],
            shots=settings.harness_shots if settings.harness_shots >= 0 else None,
            limit=settings.harness_limit or None,
            batch_size=settings.score_batch_size,
        )

    def cells(self, summary: Any) -> dict[Quantity, Cell]:
        return {}

    def notes(self, summary: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [
            f"{task}: {', '.join(f'{name} {value:.4g}' for name, value in measured.items())}"
            for task, measured in summary.items()
        ]
