"""What a metric is, and which there are.

A metric is a class with two methods: `compute` measures a model, `cells` says how the result is shown. Its name goes
into METRICS below, or, for a class of your own, into config.evaluate.metrics as "package.module:Class":

    class MeanLength(Metric):
        def compute(self, subject):
            words = np.array([[[len(text.split()) for text in texts] for texts in run.texts] for run in subject.runs])
            values = words.mean(axis=-1)  # [R, P]
            return Result(subject.estimate(values), {"words": values.mean(axis=0)})

        def cells(self, summary):
            return {Quantity("words", "Words", None, per_prompt="words"): Cell.of(summary)}

It is then in metrics.json and per_prompt.npz, and in the report's table with its change and a paired interval.

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
    """A number that a metric gives: a column of the table.

    Attributes:
      key: its name in results.csv and for `unidetox evaluate`'s line.
      less_is_better: None where neither is.
      primary: shown without being asked for. in_table: else it is in results.csv alone.
      explanation: a sentence for readers who do not know it.
      per_prompt: the array [P] of per_prompt.npz whose mean it is, from which a change's paired interval comes; empty:
        a change has no interval.
      weights: another array [P]: it is then Σ per_prompt / Σ weights.
      group: the category, or group of categories, whose prompts it is about; all together if empty.
      same: keys of metrics.json in which two models must agree to be compared.
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
    """A quantity of one model. sd (over runs), low, high (95 %): None where they were not measured.

    change: {"percent", "low", "high"} from the model as published; None for that model itself and where it cannot be
    had. low and high are None where the change has no interval. prompts, texts: how many it rests on.
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
        """From an estimate of metrics.json, {"mean", "sd", "low", "high", …}."""
        sd, low, high = (summary.get(name) for name in ("sd", "low", "high"))
        return cls(summary["mean"], sd, low, high, prompts=prompts, texts=texts)


class PerText(NamedTuple):
    """A number for every continuation: values [R, P, S], NaN for none, written with so many decimals."""

    values: np.ndarray
    digits: int


class Result(NamedTuple):
    """What a metric found.

    summary: what metrics.json holds under the metric's name; None or empty where it was not asked for.
    per_prompt: name → float64 [P], NaN where a prompt has nothing. per_text: columns of generations.jsonl.
    """

    summary: Any
    per_prompt: Mapping[str, np.ndarray] = {}
    per_text: Mapping[str, PerText] = {}


def not_asked_for(*_: Any) -> Any:
    """In place of a scorer or model."""
    raise TypeError("a metric has the scorer and the model that its `reads` and `loads` name, and no others")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a metric is computed from.

    Attributes:
      settings: `EvaluationConfig`, which is config.evaluate as well.
      runs: the continuations of each run.
      path: fills in the places of a path or data set of the settings.
      data_dir: where named data sets lie.
      score: the toxicity scorer, made where a metric `reads` "scorer".
      others: name → each further one, of config.evaluate.other_scorers.
      load: the model that the metric `loads`, and its tokenizer.
      keep: (name, make) → what make() gives, or what it gave before an interruption. An array where the name ends in
        .npy, else what JSON has.
    """

    settings: EvaluationConfig
    prompts: Prompts
    runs: Sequence[Continuations]
    path: Callable[[str], str] = str
    data_dir: str = ""
    score: Scorer = not_asked_for
    others: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)
    load: Callable[[], tuple[Model | Generator, Any]] = not_asked_for
    keep: Callable[[str, Callable[[], Any]], Any] = uncached

    def each_run(self, name: str, measure: Callable[[int], np.ndarray]) -> np.ndarray:
        """measure(run) of every run, kept one by one: [R, …]."""
        parts = [self.keep(f"run{run}.{name}.npy", functools.partial(measure, run)) for run in range(len(self.runs))]
        return np.stack(parts)

    def estimate(self, values: np.ndarray) -> dict[str, Any]:
        """Of values [R, P]: mean, sd and values of the runs, 95 % interval over prompts, as metrics.json has them."""
        _, resampled = bootstrap.resample(values.mean(axis=0), self.settings.resamples, self.settings.seed)
        return bootstrap.over_runs(values.mean(axis=1), resampled)


class Metric:
    """A metric: `compute` and `cells` are what it must have.

    Attributes:
      field: of config.evaluate, says what it reads beside the model and the prompts; where that is empty it is off.
      loads: "subject" for the evaluated model, or the field that names another; "" for none. Every process computes a
        metric with a model, on the run's mesh; the first one alone all others.
      nothing: its summary where it is off.
    """

    field: str = ""
    loads: str = ""
    nothing: Any = {}  # never changed

    def reads(self, settings: Any) -> Mapping[str, str | Sequence[str]]:
        """Name → path, data set or scorer, or several, whose change makes the result another. Raises UserError for
        settings that are wrong."""
        return {self.field: getattr(settings, self.field)} if self.field else {}

    def compute(self, subject: Subject) -> Result:
        """Measures one model."""
        raise NotImplementedError

    def cells(self, summary: Any) -> Mapping[Quantity, Cell]:
        """The numbers of a summary, in the table's order; none where it is empty."""
        raise NotImplementedError

    def notes(self, summary: Any) -> list[str]:
        """Lines for the terminal on what the numbers do not say."""
        return []


def get(text: str) -> Metric:
    """A metric by a name of METRICS, or by "package.module:Class" (with settings: "…:Class(name=literal)").

    Raises:
      UserError: no such metric, class or setting.
    """
    name, settings = extensions.parse(text, "metric")
    if name not in METRICS and ":" not in name:
        raise UserError(
            f"metric: unknown name {name!r}{suggest(name, METRICS)}; your own is written package.module:Class"
        )
    made = extensions.load(METRICS.get(name, name), "metric", "class", METRICS)
    try:
        metric = made(**settings)
    except TypeError as error:
        raise UserError(f"metric {text!r}: {error}") from None
    if not isinstance(metric, Metric):
        raise UserError(
            f"metric {text!r}: found a {type(metric).__name__}, expected a subclass of {HERE}.metrics.Metric"
        )
    return metric


class OneModel:
    """Models by their source, of which only the last asked for is held: two may not fit the devices."""

    def __init__(self, load: Callable[[str], tuple[Model | Generator, Any]]):
        self._load = load
        self._held: dict[str, tuple[Model | Generator, Any]] = {}

    def __call__(self, source: str) -> tuple[Model | Generator, Any]:
        """A model and its tokenizer."""
        self.drop(but=source)
        if source not in self._held:
            self._held[source] = self._load(source)
        return self._held[source]

    def drop(self, but: str) -> None:
        """Lets go of every other model."""
        self._held = {source: held for source, held in self._held.items() if source == but}


def measure(
    names: Sequence[str], subject: Subject, source: str, models: OneModel, keep: Callable = uncached, first: bool = True
) -> dict[str, Result]:
    """The metrics of one model, those first that read it.

    Args:
      source: the model's.
      keep: (name, make, together) → as `Subject.keep`; together: whether every process asks.
      first: whether this is the process that computes what needs no model.

    Returns:
      name → result; without those that are off or that another process computes.
    """
    metrics = {name: get(name) for name in names}
    metrics = {name: one for name, one in metrics.items() if not one.field or getattr(subject.settings, one.field)}
    sources = {"": "", "subject": source}
    needed = {
        name: sources[one.loads] if one.loads in sources else subject.path(getattr(subject.settings, one.loads))
        for name, one in metrics.items()
    }
    results = {}
    for name in sorted(metrics, key=lambda name: needed[name] != source):
        models.drop(but=needed[name])
        if needed[name] or first:
            load = functools.partial(models, needed[name])
            kept = functools.partial(keep, together=bool(needed[name]))
            results[name] = metrics[name].compute(dataclasses.replace(subject, load=load, keep=kept))
    return results


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of a metrics.json that have a summary, in the order of METRICS, then those from elsewhere."""
    return [name for name in (*METRICS, *sorted(name for name in metrics if ":" in name)) if metrics.get(name)]


def cells(metrics: Mapping[str, Any]) -> dict[Quantity, Cell]:
    """Every number of a metrics.json, in the table's order."""
    shown: dict[Quantity, Cell] = {}
    for name in measured(metrics):
        shown |= {quantity: cell for quantity, cell in get(name).cells(metrics[name]).items() if cell.mean is not None}
    return shown
