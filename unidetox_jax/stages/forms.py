"""What is evaluated: every target in each of its forms, and models of names of their own.

original (as it is published), detoxified, control, the rivals of config.baselines, and those that
config.evaluate.candidates names.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from unidetox_jax import extensions
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.stages import baselines, common
from unidetox_jax.stages.settings import Run, model_name

ORIGINAL, DETOXIFIED, CONTROL = FORMS = ("original", "detoxified", "control")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")  # of a file
# Metric → its setting, of those that ask for the likelihood of given text
LIKELIHOODS = {"mmlu": "mmlu", "harness": "harness", "text_perplexity": "text_file"}


@dataclasses.dataclass(frozen=True)
class Form:
    """A model to evaluate: its name and form, and how its text comes about; paths may hold `{workdir}`."""

    name: str
    form: str
    candidate: Candidate

    @property
    def is_model(self) -> bool:
        """Whether it is one model as it is."""
        return self.candidate == Candidate(self.candidate.models[:1])

    @property
    def source(self) -> str:
        """Where it lies, or else what it is made of, in a line."""
        if self.is_model:
            return self.candidate.models[0]
        line = f"{self.candidate.objective} of {', '.join(self.candidate.models)}"
        prefixes = [repr(prefix) for prefix in self.candidate.prefixes]
        return line + (f" after {', '.join(prefixes)}" if prefixes else "")


def forms(run: Run) -> list[Form]:
    """All of the configuration, in the order of its targets.

    Raises:
      UserError: an unknown form, a name that is taken, a candidate that cannot be evaluated.
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
    planned = [form for target in run.shared.targets for form in _of_target(run, target, candidates)]
    taken = [one.name if one.form == ORIGINAL else f"{one.name}.{one.form}" for one in planned]
    extra = extensions.parse_named(run.evaluate.extra_models, "config.evaluate.extra_models", "PATH", taken)
    return planned + [Form(name, ORIGINAL, Candidate((source,))) for name, source in extra.items()]


def _of_target(run: Run, target: str, candidates: Mapping[str, Candidate]) -> Iterator[Form]:
    name = model_name(target)
    places = {ORIGINAL: target, DETOXIFIED: _trained(run, target, DETOXIFIED)}
    if target in run.shared.control_targets:
        places[CONTROL] = _trained(run, target, CONTROL)
    for form in FORMS:
        if form in run.evaluate.which and form in places:
            yield Form(name, form, Candidate((places[form],)))
    for form, candidate in candidates.items():
        if not candidate.targets or target in candidate.targets:
            models = tuple(path.replace("{target}", target).replace("{name}", name) for path in candidate.models)
            yield Form(name, form, dataclasses.replace(candidate, models=models, targets=()))


def _trained(run: Run, target: str, kind: str) -> str:
    return common.finished(target, f"{{workdir}}/{kind}/{model_name(target)}", run.detoxify)


def _check(run: Run, where: str, name: str, candidate: Candidate) -> None:
    """UserError for what can be known before a model is loaded."""
    if not NAME.fullmatch(name) or name in FORMS:
        raise UserError(f"{where}: {name!r} cannot be a form's name; use letters, digits and any of _ . = + -")
    try:
        objective = objectives.get(run.path(candidate.objective))
        objective.check_models(len(candidate.models))
    except UserError as error:
        raise UserError(f"{where}.objective: {error}") from None
    asking = [
        name for metric, name in LIKELIHOODS.items() if metric in run.evaluate.metrics and getattr(run.evaluate, name)
    ]
    if objective.needs_context and asking:
        raise UserError(
            f"{where}.objective: {objective.name} judges a text by what it sees while it is written, so given text has "
            f"no likelihood under it; empty config.evaluate.{asking[0]}"
        )
    if candidate.prefixes and len(candidate.prefixes) != len(candidate.models):
        found, expected = len(candidate.prefixes), len(candidate.models)
        raise UserError(f"{where}.prefixes: found {found}, expected one for each of {expected} models, or none")
    if candidate.prefixes and run.evaluate.chat:
        raise UserError(f"{where}.prefixes: a conversation has none; say it in config.evaluate.system_prompt")
    for target in candidate.targets:
        if target not in run.shared.targets:
            raise UserError(f"{where}.targets: no target {target!r}{suggest(target, run.shared.targets)}")
