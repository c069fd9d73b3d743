"""The models to evaluate: every target in each of its forms, and extra models.

Forms of a target: original (as published), detoxified, control, the rivals of config.baselines, and those of
config.evaluate.candidates.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from unidetox_jax import extensions
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.report.results import CONTROL, DETOXIFIED, FORMS, ORIGINAL
from unidetox_jax.stages import baselines
from unidetox_jax.stages.loading import trained_model
from unidetox_jax.stages.settings import Run, model_name

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")  # safe as a file name
# Metric → its setting, for metrics that need the likelihood of given text
LIKELIHOOD_METRICS = {"mmlu": "mmlu", "harness": "harness", "text_perplexity": "text_file"}


@dataclasses.dataclass(frozen=True)
class Form:
    """A model to evaluate: name, form, and how it generates text; paths may hold `{workdir}`."""

    name: str
    form: str
    candidate: Candidate

    @property
    def title(self) -> str:
        """`NAME` as published, else `NAME FORM`."""
        return self.name if self.form == ORIGINAL else f"{self.name} {self.form}"

    @property
    def directory(self) -> str:
        """Of its evaluation, in the working directory."""
        return f"evaluation/{self.name}" if self.form == ORIGINAL else f"evaluation/{self.name}.{self.form}"

    @property
    def is_model(self) -> bool:
        """Whether it is a single model without objective or prefix."""
        return self.candidate == Candidate(self.candidate.models[:1])

    @property
    def source(self) -> str:
        """The path of a single model; else a description in one line."""
        if self.is_model:
            return self.candidate.models[0]
        line = f"{self.candidate.objective} of {', '.join(self.candidate.models)}"
        prefixes = [repr(prefix) for prefix in self.candidate.prefixes]
        return line + (f" after {', '.join(prefixes)}" if prefixes else "")


def forms(run: Run) -> list[Form]:
    """All forms of the configuration, in the order of its targets.

    Raises:
      UserError: an unknown form, a duplicate name, a candidate that cannot be evaluated.
    """
    for form in run.evaluate.which:
        if form not in FORMS:
            raise UserError(f"config.evaluate.which: no form {form!r}{suggest(form, FORMS)}")
    candidates, rivals = run.evaluate.candidates, baselines.candidates(run)
    for name in candidates.keys() & rivals.keys():
        raise UserError(f"config.evaluate.candidates.{name}: config.baselines.methods has that name already")
    for name, candidate in candidates.items():
        _check(run, f"config.evaluate.candidates.{name}", name, candidate)
    for name, candidate in rivals.items():
        _check(run, f"config.baselines.methods: {name}", name, candidate)
    candidates = {**rivals, **candidates}
    of_targets = [form for target in run.shared.targets for form in _forms_of_target(run, target, candidates)]
    taken = [form.directory.removeprefix("evaluation/") for form in of_targets]
    extra = extensions.parse_named(run.evaluate.extra_models, "config.evaluate.extra_models", "PATH", taken)
    return of_targets + [Form(name, ORIGINAL, Candidate((source,))) for name, source in extra.items()]


def _forms_of_target(run: Run, target: str, candidates: Mapping[str, Candidate]) -> Iterator[Form]:
    name = model_name(target)
    sources = {ORIGINAL: target, DETOXIFIED: _fine_tuned(run, target, DETOXIFIED)}
    if target in run.shared.control_targets:
        sources[CONTROL] = _fine_tuned(run, target, CONTROL)
    for form, source in sources.items():
        if form in run.evaluate.which:
            yield Form(name, form, Candidate((source,)))
    for form, candidate in candidates.items():
        if not candidate.targets or target in candidate.targets:
            models = tuple(path.replace("{target}", target).replace("{name}", name) for path in candidate.models)
            yield Form(name, form, dataclasses.replace(candidate, models=models, targets=()))


def _fine_tuned(run: Run, target: str, form: str) -> str:
    return trained_model(target, f"{{workdir}}/{form}/{model_name(target)}", run.detoxify)


def _check(run: Run, where: str, name: str, candidate: Candidate) -> None:
    """Raises UserError for mistakes that show before a model is loaded."""
    if not NAME.fullmatch(name) or name in FORMS:
        raise UserError(f"{where}: {name!r} cannot be a form's name; use letters, digits and any of _ . = + -")
    try:
        objective = objectives.get(run.path(candidate.objective))
        objective.check_models(len(candidate.models))
    except UserError as error:
        raise UserError(f"{where}.objective: {error}") from None
    unsupported = [
        setting
        for metric, setting in LIKELIHOOD_METRICS.items()
        if metric in run.evaluate.metrics and getattr(run.evaluate, setting)
    ]
    if objective.needs_context and unsupported:
        raise UserError(
            f"{where}.objective: {objective.name} depends on the state of the generation, so given text has no "
            f"likelihood under it; empty config.evaluate.{unsupported[0]}"
        )
    if candidate.prefixes and len(candidate.prefixes) != len(candidate.models):
        found, expected = len(candidate.prefixes), len(candidate.models)
        raise UserError(f"{where}.prefixes: found {found}, expected one for each of {expected} models, or none")
    if candidate.prefixes and run.evaluate.chat:
        raise UserError(f"{where}.prefixes: a conversation has none; use config.evaluate.system_prompt")
    for target in candidate.targets:
        if target not in run.shared.targets:
            raise UserError(f"{where}.targets: no target {target!r}{suggest(target, run.shared.targets)}")
