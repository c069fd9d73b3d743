"""`unidetox evaluate`: toxicity, perplexity, diversity, knowledge and other metrics of every model, before and after.

One task, and one directory of WORKDIR/evaluation, for each model and form: NAME as it is published, NAME.detoxified,
NAME.control, NAME.CANDIDATE, and every extra model by its own name. Prompts are continued, then each of
config.evaluate.metrics is computed. What a run of generations or a metric yields is kept under parts/ as soon as it is
whole, so an interrupted evaluation goes on with the first part that is missing; the parts go once `metrics.json`,
written last, is there.

    prompts.jsonl      a prompt a line, in order: {"prompt": index, "category", "text"}; category "" is none
    generations.jsonl  a continuation a line, by run, prompt, sample: {"run": index, "prompt", "sample", "text" (the
                       continuation alone), "ended" (by itself), "score" (null: the scorer refused the text),
                       "perplexity" (null: not measured, nothing to measure, or infinite)}, and what other metrics say
    per_prompt.npz     float64 [P], means over runs; NaN where a prompt has nothing: tp, emt, dist1, dist2, dist3; and
                       where perplexity is measured perplexity_sum, perplexity_count (of those below the limit, over
                       runs and samples). category: unicode [P]. The paired interval of a change comes from these.
    metrics.json       {"model": {"name" (without the form), "form": "original" | "detoxified" | "control" | a
                        candidate's, "source"},
                        "scorer": as configured, "scorer_hash": `scorers.content_hash` of it, "perplexity_scorer": as
                        configured, "groups": {"id": [category, …],
                        "ood": […]}, "prompt_source": as configured,
                        "counts": {"prompts", "categories": {category: prompts}, "runs", "samples" (of a prompt),
                                   "texts" (of all runs), "empty" (continuations without a character), "ended",
                                   "missing_scores", "degenerate": {"empty", "no words", "repetitive"}},
                        name of a metric: its summary; empty or null where it was not asked for}:
                       "toxicity": {category | "id" | "ood" | "all": {"tp": estimate, "emt": estimate, "prompts",
                                    "texts", "missing", "categories"}}
                       "other_scorers": {"scorers": {name: {"scorer": as configured, "hash", "toxicity": as above}},
                                         "agreement": `agreement.pairwise`'s result}
                       "perplexity": {an estimate's fields, "texts", "counted", "excluded", "undefined", "truncated"};
                                     mean null: none is below the limit
                       "diversity": {"dist1" | "dist2" | "dist3": estimate}, over all prompts
                       "mmlu": {"paper:1" as configured: `mmlu.evaluate`'s result and "split"}
                       "text_perplexity": {"file", …`text_perplexity.of_texts`'s result}
                       "harness": {task: {metric: value}}
                       An estimate: {"mean", "sd" (population, over runs), "runs": [value of each run], "low", "high"
                       (95 % bootstrap over prompts)}.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath
from jax.sharding import Mesh

from unidetox_jax import checkpoint, data, distributed, storage
from unidetox_jax.decoding import objectives
from unidetox_jax.decoding.text_sampling import common_vocabulary
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations, generator, metrics, prompts, scorers
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.models import Model
from unidetox_jax.plan import stage_programs
from unidetox_jax.stages import base, common
from unidetox_jax.stages import evaluation_files as results
from unidetox_jax.stages.forms import FORMS, ORIGINAL, Form, forms
from unidetox_jax.stages.settings import EvaluateSettings, Run, model_name

PARTS = "parts"
FORMATS = {
    ".jsonl": (storage.read_lines, storage.write_lines),
    ".npy": (storage.read_array, storage.write_array),
    ".json": (storage.read_json, storage.write_json),
}
TYPICAL_PROMPTS, TYPICAL_QUESTIONS, TYPICAL_LENGTH = 940, 1_500, 30  # ToxiGen's, MMLU's, in tokens: for an estimate
LINE_BYTES, TOKEN_BYTES = 120.0, 5.0  # of generations.jsonl, beside the text and of it
# what says which tasks there are, and what a result depends on by rounding at most
NOT_OF_A_RESULT = ("which", "extra_models", "candidates", "batch_size", "score_batch_size", "mesh")


def tasks(run: Run) -> list[base.Task]:
    """One task for each model and form.

    Raises:
      UserError: an unknown form or metric, extra models without or with a taken name, a wrong setting of a metric or
        a candidate.
    """
    settings = run.evaluate
    _reads(run)
    if settings.runs < 1 or settings.samples < 1:
        raise UserError(
            f"config.evaluate: runs {settings.runs} and samples {settings.samples}, expected at least one of each"
        )
    return [_task(run, form) for form in forms(run)]


def _task(run: Run, form: Form) -> base.Task:
    settings = {k: v for k, v in dataclasses.asdict(run.evaluate).items() if k not in NOT_OF_A_RESULT}
    for name in ("metrics", "other_scorers", "chat", "system_prompt"):
        if settings[name] == getattr(EvaluateSettings(), name):
            del settings[name]  # so that results from before there was a choice stay
    return base.Task(
        f"evaluate {form.name}" + ("" if form.form == ORIGINAL else f" {form.form}"),
        common.evaluation_directory(run, form.name, form.form),
        {**settings, "model": form.source, "dtype": run.shared.dtype},
        lambda: _inputs(run, form),
        lambda directory: evaluate(run, form, directory),
        lambda: _operations(run, form),
        PARTS,
        lambda: _disk(run.evaluate),
    )


def _operations(run: Run, form: Form) -> float:
    """Two for each parameter and token: prompts and their continuations under the model, both under the perplexity
    scorer, four answers a question of MMLU. What cannot be known before the models are made counts as nothing."""
    settings = run.evaluate
    prompts_, questions = settings.max_prompts or TYPICAL_PROMPTS, len(settings.mmlu) * TYPICAL_QUESTIONS
    texts = prompts_ * settings.runs * (TYPICAL_LENGTH + settings.samples * settings.max_new_tokens)
    target = next((t for t in run.shared.targets if model_name(t) == form.name), form.candidate.models[0])
    read = (texts + questions * 5 * TYPICAL_LENGTH) * len(form.candidate.models)
    tokens = {target: read, settings.perplexity_scorer: texts}
    return sum(2.0 * common.num_params(run, source) * count for source, count in tokens.items() if source)


def _disk(settings: EvaluateSettings) -> tuple[float, float]:
    """Bytes of the generations, which are kept twice until they are all there."""
    texts = (settings.max_prompts or TYPICAL_PROMPTS) * settings.samples * settings.runs
    held = texts * (LINE_BYTES + TOKEN_BYTES * settings.max_new_tokens)
    return 2.0 * held, held


def _reads(run: Run) -> dict[str, Any]:
    """What the metrics read, by name."""
    reads = [metrics.get(name).reads(run.evaluate) for name in run.evaluate.metrics]
    return {name: source for one in reads for name, source in one.items()}


def _inputs(run: Run, form: Form) -> dict[str, str]:
    sources = [run.path(source) for source in form.candidate.models]
    for source in sources:
        place = checkpoint.split_adapter(source)[1] or source
        within = epath.Path(place).is_relative_to(run.workdir) and not epath.Path(place, "config.json").exists()
        if form.form != ORIGINAL and within and not base.is_complete(place):
            maker = "detoxify" if form.form in FORMS else "baselines"
            raise UserError(f"{place}: no finished model there; `unidetox {maker}` makes it")
        checkpoint.load_config(source)  # a mistake in a path is found before anything is written
    if len(sources) > 1:
        common_vocabulary([checkpoint.load_tokenizer(source) for source in sources], form.candidate.models)
    prints = [base.fingerprint(source) for source in sources]
    files = objectives.get(run.path(form.candidate.objective)).files
    return {
        "model": prints[0] if len(prints) == 1 else base.digest(prints),
        **{f"objective.{name}": base.fingerprint(file) for name, file in files.items()},
        "prompts": _prompts(run).fingerprint,
        **{name: _fingerprint(run, name, source) for name, source in _reads(run).items()},
    }


def _fingerprint(run: Run, name: str, source: Any) -> str:
    """Of a path, a data set, several, or the scorer."""
    if not isinstance(source, str):
        return base.digest([base.fingerprint(run.path(part)) for part in source])
    place = run.path(source)
    if _is_scorer(name):
        kind, _, argument = place.partition(":")
        return f"{kind}:{base.fingerprint(argument.partition('#')[0])}"
    return data.fingerprint(place, run.shared.data_dir) if data.is_spec(place) else base.fingerprint(place)


def _is_scorer(name: str) -> bool:
    """Of what the metrics read: the first scorer, or another ("scorer.NAME")."""
    return name.partition(".")[0] == "scorer"


def _prompts(run: Run) -> prompts.Prompts:
    settings = run.evaluate
    return prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed)


def evaluate(run: Run, form: Form, directory: epath.Path) -> dict[str, Any]:
    """Evaluates one form into its directory, going on with what is there; returns its headline numbers."""
    if not distributed.broadcast("done" if (directory / results.METRICS).exists() else ""):
        _evaluate(run, form, directory)
    if not distributed.is_main_process():
        return {}
    measured = storage.read_json(directory / results.METRICS)
    print(results.describe(measured), flush=True)
    return results.headline(measured)


def _load(run: Run, form: Form, source: str) -> tuple[Model | Generator, Any]:
    """What writes the form's texts, where that is what `source` names, or else a model; and its tokenizer."""
    logging.info("evaluate: loading %s", source)
    if form.is_model or source != run.path(form.source):
        return common.load_model(run, source, _mesh(run, form, source)), checkpoint.load_tokenizer(source)
    candidate = form.candidate
    loaded = common.load_models(run, candidate.models, _mesh(run, form, source))
    models = [loaded[name] for name in candidate.models]
    tokenizers = [checkpoint.load_tokenizer(run.path(name)) for name in candidate.models]
    made = generator.make(models, tokenizers, candidate.models, run.path(candidate.objective), candidate.prefixes)
    return made, tokenizers[0]


def _mesh(run: Run, form: Form, source: str) -> Mesh:
    """For all that an evaluation runs on a model."""
    if source == run.path(run.evaluate.perplexity_scorer):
        programs = stage_programs.perplexity_programs(run.evaluate, model_name(source), common.load_config(run, source))
    else:
        programs = stage_programs.evaluation_programs(run, form)
    return common.mesh_of(run, "evaluate", programs)


def _evaluate(run: Run, form: Form, directory: epath.Path) -> None:
    settings, asked, first = run.evaluate, _prompts(run), distributed.is_main_process()
    score, others = metrics.unavailable, {}
    if first:  # before the long work, in case that there is none
        made = {name: scorers.get(run.path(spec)) for name, spec in _reads(run).items() if spec and _is_scorer(name)}
        score = made.pop("scorer", score)
        others = {name.partition(".")[2]: scorer for name, scorer in made.items()}

    def keep(name: str, make: Callable[[], Any], together: bool = True) -> Any:
        path = directory / PARTS / name
        return base.cached(path, make, *FORMATS[path.suffix], together)

    models, source = metrics.ModelCache(functools.partial(_load, run, form)), run.path(form.source)
    runs = continuations.generate_runs(functools.partial(models, source), asked.texts, settings, keep)
    subject = metrics.Subject(settings, asked, runs, run.path, run.shared.data_dir, score, others)
    measured = metrics.measure(settings.metrics, subject, source, models, keep, first)
    if first:
        model = {"name": form.name, "form": form.form, "source": form.source}
        results.write(directory, subject, settings.prompts, model, measured)
