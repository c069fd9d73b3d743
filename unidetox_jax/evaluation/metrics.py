"""The base class of metrics, their registry, and the loop that computes them.

A metric is a class with two methods: `compute` measures a model, `cells` says how to show the result. It is registered
by name in METRICS below; a class of your own goes into config.evaluate.metrics as "package.module:Class":

    class MeanLength(Metric):
        def compute(self, subject):
            words = np.array([[[len(text.split()) for text in texts] for texts in run.texts] for run in subject.runs])
            values = words.mean(axis=-1)  # [R, P]
            return Result(subject.estimate(values), {"words": values.mean(axis=0)})

        def cells(self, summary):
            return {Quantity("words", "Words", None, per_prompt="words"): Cell.of(summary)}

It then appears in metrics.json and per_prompt.npz, and in the report's table with its change and a paired interval.

Axes: R runs, P prompts, S samples of a prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unidetox_jax import extensions
from unidetox_jax.decoding.text_sampling import uncached
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import bootstrap
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.continuations import Continuations
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.evaluation.prompts import Prompts
from unidetox_jax.evaluation.scorers import Scorer
from unidetox_jax.models import Model

HERE = "unidetox_jax.evaluation"
METRICS = {
    "toxicity": f"{HERE}.toxicity:Toxicity",
    "other_scorers": f"{HERE}.toxicity:OtherScorers",
    "perplexity": f"{HERE}.perplexity:Perplexity",
    "text_perplexity": f"{HERE}.text_perplexity:TextPerplexity",
    "diversity": f"{HERE}.diversity:Diversity",
    "mmlu": f"{HERE}.mmlu:Mmlu",
    "harness": f"{HERE}.harness_metric:HarnessTasks",
    "cost": f"{HERE}.cost:Cost",
}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number that a metric yields: a column of the table.

    Attributes:
      key: its name in results.csv and in the output of `unidetox evaluate`.
      less_is_better: None if neither direction is better.
      primary: shown by default. in_table: false for results.csv only.
      explanation: a sentence for readers who do not know it.
      per_prompt: the array [P] of per_prompt.npz whose mean it is, used for paired intervals of changes; empty: changes
        have no interval.
      weights: another array [P]; the quantity is then Σ per_prompt / Σ weights.
      group: the category or group of categories that it covers; empty: all prompts.
      same: keys of metrics.json that must be equal for two models to be compared.
    """

    key: str
    title: str
    less_is_better: bool | None
    digits: int = 3
    primary: bool = True
    explanation: str = ""
    in_table: bool = True
    per_prompt: str = ""
    weights: str = ""
    group: str = ""
    same: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
    """A quantity of one model. sd (over runs), low, high (95 %): None if not measured.

    change: {"percent", "low", "high"} relative to the published model; None for that model itself and if undefined; low
    and high are None if the change has no interval. prompts, texts: sample sizes.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    change: Mapping[str, Any] | None = None
    prompts: int | None = None
    texts: int | None = None

    @classmethod
    def of(cls, summary: Mapping[str, Any], prompts: int | None = None, texts: int | None = None) -> "Cell":
        """From an estimate in metrics.json, {"mean", "sd", "low", "high", …}."""
        sd, low, high = (summary.get(name) for name in ("sd", "low", "high"))
        return cls(summary["mean"], sd, low, high, prompts=prompts, texts=texts)


class PerText(NamedTuple):
    """A number per continuation: values [R, P, S], NaN if missing; digits: decimals in generations.jsonl."""

    values: np.ndarray
    digits: int


class Result(NamedTuple):
    """A metric's result for one model.

    summary: the metric's entry in metrics.json; None or empty if it was off. per_prompt: name → float64 [P], NaN for
    prompts without a value. per_text: columns of generations.jsonl.
    """

    summary: Any
    per_prompt: Mapping[str, np.ndarray] = {}
    per_text: Mapping[str, PerText] = {}


def unavailable(*_: Any) -> Any:
    """Placeholder for a scorer or model that a metric did not declare."""
    raise TypeError("a metric can use only the scorer and the model that its `reads` and `loads` name")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The inputs of a metric.

    Attributes:
      settings: the `EvaluationConfig`, which config.evaluate extends.
      runs: the continuations of each run.
      path: expands placeholders in a path or data set of the settings.
      data_dir: directory of named data sets.
      score: the toxicity scorer, available if a metric `reads` "scorer".
      others: name → scorer, from config.evaluate.other_scorers.
      load: returns the model that the metric `loads`, and its tokenizer.
      keep: (name, make) → make()'s result, or the one stored before an interruption: an array if the name ends in .npy,
        else JSON values.
    """

    settings: EvaluationConfig
    prompts: Prompts
    runs: Sequence[Continuations]
    path: Callable[[str], str] = str
    data_dir: str = ""
    score: Scorer = unavailable
    others: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)
    load: Callable[[], tuple[Model | Generator, Any]] = unavailable
    keep: Callable[[str, Callable[[], Any]], Any] = uncached

    def each_run(self, name: str, measure: Callable[[int], np.ndarray]) -> np.ndarray:
        """measure(run) for every run, each stored separately: [R, …]."""
        results = [self.keep(f"run{run}.{name}.npy", functools.partial(measure, run)) for run in range(len(self.runs))]
        return np.stack(results)

    def estimate(self, values: np.ndarray) -> dict[str, Any]:
        """The entry in metrics.json for values [R, P]: mean, sd and values of runs, 95 % interval over prompts."""
        _, resampled = bootstrap.resample(values.mean(axis=0), self.settings.resamples, self.settings.seed)
        return bootstrap.over_runs(values.mean(axis=1), resampled)


class Metric:
    """Base class of metrics; subclasses implement `compute` and `cells`.

    Attributes:
      field: the field of config.evaluate that names its further inputs; the metric is off if that is empty.
      loads: "subject" for the evaluated model, or the field that names another; "" for none. A metric with a model is
        computed by every process, on the run's mesh; other metrics by the first process only.
      nothing: its summary if it is off.
    """

    field: str = ""
    loads: str = ""
    nothing: Any = {}  # never modified

    def reads(self, settings: Any) -> Mapping[str, str | Sequence[str]]:
        """Name → path, data set or scorer, or several, on whose content the result depends. Raises UserError for
        invalid settings."""
        return {self.field: getattr(settings, self.field)} if self.field else {}

    def compute(self, subject: Subject) -> Result:
        """Measures one model."""
        raise NotImplementedError

    def cells(self, summary: Any) -> Mapping[Quantity, Cell]:
        """The quantities of a summary, in the table's order; none if it is empty."""
        raise NotImplementedError

    def notes(self, summary: Any) -> list[str]:
        """Remarks for the terminal beside the quantities."""
        return []


def get(text: str) -> Metric:
    """A metric by its name in METRICS, or by "package.module:Class" (with settings: "…:Class(name=literal)").

    Raises:
      UserError: no such metric, class or setting.
    """
    name, settings = extensions.parse(text, "metric")
    if name not in METRICS and ":" not in name:
        raise UserError(
            f"metric: unknown name {name!r}{suggest(name, METRICS)}; your own is written package.module:Class"
        )
    kind = extensions.load(METRICS.get(name, name), "metric", "class", METRICS)
    try:
        metric = kind(**settings)
    except TypeError as error:
        raise UserError(f"metric {text!r}: {error}") from None
    if not isinstance(metric, Metric):
        raise UserError(
            f"metric {text!r}: found a {type(metric).__name__}, expected a subclass of {HERE}.metrics.Metric"
        )
    return metric


class ModelCache:
    """Loads models by their source and holds only the latest, since two may not fit on the devices."""

    def __init__(self, load: Callable[[str], tuple[Model | Generator, Any]]):
        self._load = load
        self._loaded: dict[str, tuple[Model | Generator, Any]] = {}

    def __call__(self, source: str) -> tuple[Model | Generator, Any]:
        """A model and its tokenizer."""
        self.drop_all_but(source)
        if source not in self._loaded:
            self._loaded[source] = self._load(source)
        return self._loaded[source]

    def drop_all_but(self, source: str) -> None:
        """Releases every other model."""
        self._loaded = {name: model for name, model in self._loaded.items() if name == source}


def measure(
    names: Sequence[str],
    subject: Subject,
    source: str,
    models: ModelCache,
    keep: Callable = uncached,
    first: bool = True,
) -> dict[str, Result]:
    """Computes the metrics of one model, beginning with those that load it.

    Args:
      source: the model's source.
      keep: (name, make, together), as `Subject.keep`; together: whether every process calls it.
      first: whether this process computes the metrics that need no model.

    Returns:
      name → result, without metrics that are off or computed by another process.
    """

    def model_source(metric: Metric) -> str:
        if metric.loads in ("", "subject"):
            return source if metric.loads else ""
        return subject.path(getattr(subject.settings, metric.loads))

    metrics = {name: get(name) for name in names}
    metrics = {name: each for name, each in metrics.items() if not each.field or getattr(subject.settings, each.field)}
    sources = {name: model_source(metric) for name, metric in metrics.items()}
    results = {}
    for name in sorted(metrics, key=lambda name: sources[name] != source):
        models.drop_all_but(sources[name])
        if sources[name] or first:
            load = functools.partial(models, sources[name])
            keep_result = functools.partial(keep, together=bool(sources[name]))
            results[name] = metrics[name].compute(dataclasses.replace(subject, load=load, keep=keep_result))
    return results


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics with a summary in a metrics.json, in the order of METRICS, followed by user-defined ones."""
    return [name for name in (*METRICS, *sorted(name for name in metrics if ":" in name)) if metrics.get(name)]


def cells(metrics: Mapping[str, Any]) -> dict[Quantity, Cell]:
    """All quantities of a metrics.json, in the table's order."""
    result: dict[Quantity, Cell] = {}
    for name in measured(metrics):
        result |= {quantity: cell for quantity, cell in get(name).cells(metrics[name]).items() if cell.mean is not None}
    return result
