"""`unidetox evaluate`: toxicity, perplexity, diversity, knowledge and other metrics of every model, before and after.

One task, and one directory of WORKDIR/evaluation, per model and form: NAME as published, NAME.detoxified, NAME.control,
NAME.CANDIDATE, and every extra model by its own name. Prompts are continued, then each of config.evaluate.metrics is
computed. Each run of generations and each metric's results are stored under parts/ as soon as they are complete, so an
interrupted evaluation continues with the first missing one; parts/ is removed after `metrics.json` is written.

    prompts.jsonl      a line per prompt, in order: {"prompt": index, "category", "text"}; category "" is none
    generations.jsonl  a line per continuation, by run, prompt, sample: {"run": index, "prompt", "sample", "text" (the
                       continuation alone), "ended" (with an end token), "score" (null: the scorer refused the text),
                       "perplexity" (null: not measured, nothing to measure, or infinite)}, and other metrics' columns
    per_prompt.npz     float64 [P], means over runs; NaN where undefined: tp, emt, dist1, dist2, dist3; and if
                       perplexity is measured perplexity_sum, perplexity_count (of those below the limit, over
                       runs and samples). category: unicode [P]. Source of a change's paired interval.
    metrics.json       {"model": {"name" (without the form), "form": "original" | "detoxified" | "control" | a
                        candidate's, "source"},
                        "scorer": as configured, "scorer_hash": its `scorers.content_hash`, "perplexity_scorer": as
                        configured, "groups": {"id": [category, …],
                        "ood": […]}, "prompt_source": as configured,
                        "counts": {"prompts", "categories": {category: prompts}, "runs", "samples" (of a prompt),
                                   "texts" (of all runs), "empty" (continuations without a character), "ended",
                                   "missing_scores", "degenerate": {"empty", "no words", "repetitive"}},
                        name of a metric: its summary; empty or null if not requested}:
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
from unidetox_jax.stages import evaluation_files, loading
from unidetox_jax.stages.evaluated_models import FORMS, ORIGINAL, Form, forms
from unidetox_jax.stages.settings import EvaluateSettings, Run, model_name
from unidetox_jax.stages.task import Task, cached, digest, fingerprint, is_complete

PARTS = "parts"
FORMATS = {
    ".jsonl": (storage.read_lines, storage.write_lines),
    ".npy": (storage.read_array, storage.write_array),
    ".json": (storage.read_json, storage.write_json),
}
TYPICAL_PROMPTS, TYPICAL_QUESTIONS, TYPICAL_LENGTH = 940, 1_500, 30  # of ToxiGen, of MMLU, in tokens: for estimates
LINE_BYTES, TOKEN_BYTES = 120.0, 5.0  # of generations.jsonl: of a line without its text, and of a token of text
# Settings that choose the tasks, or change results by rounding at most
NOT_RECORDED = ("which", "extra_models", "candidates", "batch_size", "score_batch_size", "mesh")
RECORDED_IF_SET = ("metrics", "other_scorers", "chat", "system_prompt")  # newer settings: older records stay valid


def tasks(run: Run) -> list[Task]:
    """One task for each model and form.

    Raises:
      UserError: an unknown form or metric, a duplicate or missing name of an extra model, a wrong setting.
    """
    settings = run.evaluate
    _metric_inputs(run)
    if settings.runs < 1 or settings.samples < 1:
        raise UserError(
            f"config.evaluate: runs {settings.runs} and samples {settings.samples}, expected at least one of each"
        )
    return [_task(run, form) for form in forms(run)]


def _task(run: Run, form: Form) -> Task:
    settings, defaults = dataclasses.asdict(run.evaluate), EvaluateSettings()
    unchanged = [name for name in RECORDED_IF_SET if settings[name] == getattr(defaults, name)]
    recorded = {name: value for name, value in settings.items() if name not in (*NOT_RECORDED, *unchanged)}
    return Task(
        f"evaluate {form.title}",
        run.directory(form.directory),
        {**recorded, "model": form.source, "dtype": run.shared.dtype},
        functools.partial(_inputs, run, form),
        functools.partial(evaluate, run, form),
        functools.partial(_operations, run, form),
        scratch=PARTS,
        disk=functools.partial(_disk, run.evaluate),
    )


def _operations(run: Run, form: Form) -> float:
    """Two for each parameter and token: prompts and continuations under the model and the perplexity scorer, four
    answers to each question of MMLU. Models that do not exist yet count as nothing."""
    settings = run.evaluate
    num_prompts = settings.max_prompts or TYPICAL_PROMPTS
    texts = num_prompts * settings.runs * (TYPICAL_LENGTH + settings.samples * settings.max_new_tokens)
    questions = len(settings.mmlu) * TYPICAL_QUESTIONS * 5 * TYPICAL_LENGTH
    target = next((t for t in run.shared.targets if model_name(t) == form.name), form.candidate.models[0])
    tokens = {target: (texts + questions) * len(form.candidate.models), settings.perplexity_scorer: texts}
    return sum(2.0 * loading.num_params(run, source) * count for source, count in tokens.items() if source)


def _disk(settings: EvaluateSettings) -> tuple[float, float]:
    """Bytes of the generations, which exist twice until all are complete."""
    texts = (settings.max_prompts or TYPICAL_PROMPTS) * settings.samples * settings.runs
    num_bytes = texts * (LINE_BYTES + TOKEN_BYTES * settings.max_new_tokens)
    return 2.0 * num_bytes, num_bytes


def _metric_inputs(run: Run) -> dict[str, Any]:
    """{name: what the metrics read under it}."""
    merged: dict[str, Any] = {}
    for name in run.evaluate.metrics:
        merged |= metrics.get(name).reads(run.evaluate)
    return merged


def _inputs(run: Run, form: Form) -> dict[str, str]:
    sources = [run.path(source) for source in form.candidate.models]
    for source in sources:
        directory = checkpoint.split_adapter(source)[1] or source
        is_output = (
            epath.Path(directory).is_relative_to(run.workdir) and not epath.Path(directory, "config.json").exists()
        )
        if form.form != ORIGINAL and is_output and not is_complete(directory):
            command = "detoxify" if form.form in FORMS else "baselines"
            raise UserError(f"{directory}: no finished model; run `unidetox {command}`")
        checkpoint.load_config(source)  # reports a wrong path before anything is written
    if len(sources) > 1:
        common_vocabulary([checkpoint.load_tokenizer(source) for source in sources], form.candidate.models)
    fingerprints = [fingerprint(source) for source in sources]
    files = objectives.get(run.path(form.candidate.objective)).files
    return {
        "model": fingerprints[0] if len(fingerprints) == 1 else digest(fingerprints),
        **{f"objective.{name}": fingerprint(file) for name, file in files.items()},
        "prompts": _prompts(run).fingerprint,
        **{name: _input_fingerprint(run, name, source) for name, source in _metric_inputs(run).items()},
    }


def _input_fingerprint(run: Run, name: str, source: Any) -> str:
    """Of what a metric reads: a path, a data set, several, or a scorer."""
    if not isinstance(source, str):
        return digest([fingerprint(run.path(part)) for part in source])
    path = run.path(source)
    if _is_scorer(name):
        kind, _, argument = path.partition(":")
        return f"{kind}:{fingerprint(argument.partition('#')[0])}"
    return data.fingerprint(path, run.shared.data_dir) if data.is_spec(path) else fingerprint(path)


def _is_scorer(name: str) -> bool:
    """Whether a metric's input is a toxicity scorer: "scorer", or another one as "scorer.NAME"."""
    return name.partition(".")[0] == "scorer"


def _prompts(run: Run) -> prompts.Prompts:
    settings = run.evaluate
    return prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed)


def evaluate(run: Run, form: Form, directory: epath.Path) -> dict[str, Any]:
    """Evaluates one form, resuming in its directory; returns its headline numbers."""
    if not distributed.broadcast("done" if (directory / evaluation_files.METRICS).exists() else ""):
        _evaluate(run, form, directory)
    if not distributed.is_main_process():
        return {}
    measured = storage.read_json(directory / evaluation_files.METRICS)
    print(evaluation_files.describe(measured), flush=True)
    return evaluation_files.headline(measured)


def _evaluate(run: Run, form: Form, directory: epath.Path) -> None:
    settings, selected_prompts, first = run.evaluate, _prompts(run), distributed.is_main_process()
    score, others = metrics.unavailable, {}
    if first:  # before the long work, in case one cannot be loaded
        specs = {name: spec for name, spec in _metric_inputs(run).items() if spec and _is_scorer(name)}
        loaded = {name: scorers.get(run.path(spec)) for name, spec in specs.items()}
        score = loaded.pop("scorer", score)
        others = {name.partition(".")[2]: scorer for name, scorer in loaded.items()}

    def keep(name: str, make: Callable[[], Any], together: bool = True) -> Any:
        path = directory / PARTS / name
        return cached(path, make, *FORMATS[path.suffix], together)

    models, source = metrics.ModelCache(functools.partial(_load, run, form)), run.path(form.source)
    runs = continuations.generate_runs(functools.partial(models, source), selected_prompts.texts, settings, keep)
    subject = metrics.Subject(settings, selected_prompts, runs, run.path, run.shared.data_dir, score, others)
    results = metrics.measure(settings.metrics, subject, source, models, keep, first)
    if first:
        model = {"name": form.name, "form": form.form, "source": form.source}
        evaluation_files.write(directory, subject, settings.prompts, model, results)


def _load(run: Run, form: Form, source: str) -> tuple[Model | Generator, Any]:
    """(the form's generator if `source` is the form's, else the model of that path; its tokenizer)."""
    logging.info("evaluate: loading %s", source)
    mesh = _mesh(run, form, source)
    if form.is_model or source != run.path(form.source):
        return loading.load_model(run, source, mesh), checkpoint.load_tokenizer(source)
    candidate = form.candidate
    loaded = loading.load_models(run, candidate.models, mesh)
    models = [loaded[name] for name in candidate.models]
    tokenizers = [checkpoint.load_tokenizer(run.path(name)) for name in candidate.models]
    objective = run.path(candidate.objective)
    return generator.make(models, tokenizers, candidate.models, objective, candidate.prefixes), tokenizers[0]


def _mesh(run: Run, form: Form, source: str) -> Mesh:
    """Of all programs that an evaluation runs on a model."""
    if source == run.path(run.evaluate.perplexity_scorer):
        programs = stage_programs.perplexity_programs(
            run.evaluate, model_name(source), loading.load_config(run, source)
        )
    else:
        programs = stage_programs.evaluation_programs(run, form)
    return loading.make_mesh(run, "evaluate", programs)
