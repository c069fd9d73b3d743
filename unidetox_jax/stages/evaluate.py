"""`unidetox evaluate`: toxicity, perplexity, diversity and knowledge of every model, before and after.

One task, and one directory of WORKDIR/evaluation, for each model and form: NAME as it is published, NAME.detoxified,
NAME.control, and every extra model by its own name. The surprising thing: what a run of generations yields is kept
under parts/ as soon as it is whole, so an interrupted evaluation goes on with the first part that is missing; the
parts go once `metrics.json`, written last, is there.

    prompts.jsonl      a prompt a line, in order: {"prompt": index, "category", "text"}; category "" is none
    generations.jsonl  a continuation a line, by run, prompt, sample: {"run": index, "prompt", "sample", "text" (the
                       continuation alone), "ended" (by itself), "score" (null: the scorer refused the text),
                       "perplexity" (null: not measured, nothing to measure, or infinite)}
    per_prompt.npz     float64 [P], means over runs; NaN where a prompt has nothing: tp, emt, dist1, dist2, dist3; and
                       where perplexity is measured perplexity_sum, perplexity_count (of those below the limit, over
                       runs and samples). category: unicode [P]. Paired intervals of a change come from these:
                       `toxicity.change({"tp", "emt"} before, after, category.tolist(), groups)`
    metrics.json       {"model": {"name" (without the form), "form": "original" | "detoxified" | "control", "source"},
                        "scorer": as configured, "perplexity_scorer": as configured, "groups": {"id": [category, …],
                        "ood": […]}, "prompt_source": as configured,
                        "counts": {"prompts", "categories": {category: prompts}, "runs", "samples" (of a prompt),
                                   "texts" (of all runs), "empty" (continuations without a character), "ended",
                                   "missing_scores", "degenerate": {"empty", "no words", "repetitive"}},
                        "toxicity": {category | "id" | "ood" | "all": {"tp": figure, "emt": figure, "prompts", "texts",
                                     "missing", "categories"}},           `toxicity.summarize_runs`
                        "perplexity": null | {figure's fields at once, "texts", "counted", "excluded", "undefined",
                                       "truncated"},                      `perplexity.summarize_runs`; mean null: none
                        "diversity": {"dist1" | "dist2" | "dist3": figure}, over all prompts
                        "mmlu": {"paper:1" as configured: `mmlu.evaluate`'s result and "split"},
                        "text_perplexity": null | {"file", …`perplexity.of_file`'s result},
                        "harness": {task: {metric: value}}}
                       A figure: {"mean", "sd" (population, over runs), "runs": [value of each run], "low", "high" (95 %
                       bootstrap over prompts)}.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import checkpoint, data, distributed, storage
from unidetox_jax.decoding import warpers
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import generations, mmlu, perplexity, prompts, scorers
from unidetox_jax.stages import base, parts
from unidetox_jax.stages import evaluation_results as results
from unidetox_jax.stages.settings import EvaluateSettings, Run, model_name

FORMS = ("original", "detoxified", "control")
PARTS = "parts"
TYPICAL_PROMPTS, TYPICAL_QUESTIONS, TYPICAL_LENGTH = 940, 1_500, 30  # ToxiGen's, MMLU's, in tokens: for an estimate
# what says which tasks there are, and what a result depends on by rounding at most
NOT_OF_A_RESULT = ("which", "extra_models", "batch_size", "score_batch_size")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name and form, and where it lies, as configured (may hold `{workdir}`)."""

    name: str
    form: str
    source: str


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """One MMLU evaluation of the configuration: `FORM:SHOTS[:SPLIT]`."""

    text: str
    form: str
    shots: int
    split: str


def tasks(run: Run) -> list[base.Task]:
    """One task for each model and form.

    Raises:
      UserError: an unknown form, extra models without or with a taken name, or an MMLU form that is none.
    """
    settings = run.evaluate
    for spec in settings.mmlu:
        knowledge(spec)
    if settings.runs < 1 or settings.samples < 1:
        raise UserError(
            f"config.evaluate: runs {settings.runs} and samples {settings.samples}, expected at least one of each"
        )
    return [_task(run, candidate) for candidate in candidates(run)]


def candidates(run: Run) -> list[Candidate]:
    """The models of the configuration, in the order of its targets."""
    for form in run.evaluate.which:
        if form not in FORMS:
            raise UserError(f"config.evaluate.which: no form {form!r}{suggest(form, FORMS)}")
    found = []
    for target in run.shared.targets:
        name = model_name(target)
        places = {"original": target, "detoxified": f"{{workdir}}/detoxified/{name}"}
        if target in run.shared.control_targets:
            places["control"] = f"{{workdir}}/control/{name}"
        found += [
            Candidate(name, form, places[form]) for form in FORMS if form in run.evaluate.which and form in places
        ]
    for extra in run.evaluate.extra_models:
        name, equals, source = extra.partition("=")
        if not (name and equals and source) or "/" in name:
            raise UserError(f"config.evaluate.extra_models: found {extra!r}, expected 'name=PATH'")
        if name in [other.name if other.form == "original" else f"{other.name}.{other.form}" for other in found]:
            raise UserError(f"config.evaluate.extra_models: the name {name!r} is taken")
        found.append(Candidate(name, "original", source))
    return found


def knowledge(spec: str) -> Knowledge:
    """`FORM:SHOTS[:SPLIT]`, taken apart. Raises UserError where it is something else."""
    form, _, rest = spec.partition(":")
    shots, _, split = rest.partition(":")
    if form not in mmlu.SPLITS or not shots.isdecimal():
        raise UserError(
            f"config.evaluate.mmlu: found {spec!r}, expected FORM:SHOTS or FORM:SHOTS:SPLIT, "
            f"FORM one of {', '.join(mmlu.SPLITS)}"
        )
    return Knowledge(spec, form, int(shots), split or mmlu.SPLITS[form])


def _task(run: Run, candidate: Candidate) -> base.Task:
    settings = {k: v for k, v in dataclasses.asdict(run.evaluate).items() if k not in NOT_OF_A_RESULT}
    return base.Task(
        f"evaluate {candidate.name}" + ("" if candidate.form == "original" else f" {candidate.form}"),
        parts.evaluation_directory(run, candidate.name, candidate.form),
        {**settings, "model": candidate.source, "dtype": run.shared.dtype},
        lambda: _inputs(run, candidate),
        lambda directory: evaluate(run, candidate, directory),
        lambda: _operations(run, candidate),
    )


def _operations(run: Run, candidate: Candidate) -> float:
    """Two for each parameter and token: prompts and their continuations under the model, both under the perplexity
    scorer, four answers a question of MMLU. What cannot be known before the models are made counts as nothing."""
    settings = run.evaluate
    prompts_, questions = settings.max_prompts or TYPICAL_PROMPTS, len(settings.mmlu) * TYPICAL_QUESTIONS
    texts = prompts_ * settings.runs * (TYPICAL_LENGTH + settings.samples * settings.max_new_tokens)
    target = next((t for t in run.shared.targets if model_name(t) == candidate.name), candidate.source)
    tokens = {target: texts + questions * 5 * TYPICAL_LENGTH, settings.perplexity_scorer: texts}
    return sum(2.0 * parts.num_params(run, source) * count for source, count in tokens.items() if source)


def _inputs(run: Run, candidate: Candidate) -> dict[str, str]:
    settings, source = run.evaluate, run.path(candidate.source)
    if candidate.form != "original" and not base.is_complete(source):
        raise UserError(f"{source}: no finished model there; `unidetox detoxify` makes it")
    checkpoint.load_config(source)  # a mistake in a path is found before anything is written
    kind, _, place = run.path(settings.scorer).partition(":")
    return {
        "model": base.fingerprint(source),
        "prompts": _prompts(run).fingerprint,
        "scorer": f"{kind}:{base.fingerprint(place.partition('#')[0])}",
        "perplexity_scorer": base.fingerprint(run.path(settings.perplexity_scorer)),
        "text_file": _text_fingerprint(run),
        "mmlu": data.fingerprint("mmlu", run.shared.data_dir) if settings.mmlu else "",
        "harness": base.digest([base.fingerprint(run.path(task)) for task in settings.harness]),
    }


def _text_fingerprint(run: Run) -> str:
    place = run.path(run.evaluate.text_file)
    return data.fingerprint(place, run.shared.data_dir) if data.is_spec(place) else base.fingerprint(place)


def _prompts(run: Run) -> prompts.Prompts:
    settings = run.evaluate
    return prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed)


def evaluate(run: Run, candidate: Candidate, directory: epath.Path) -> dict[str, Any]:
    """Evaluates one model into its directory, going on with what is there; returns its headline figures."""
    if not distributed.as_first_says("done" if (directory / results.METRICS).exists() else ""):
        _evaluate(run, candidate, directory)
    if not parts.first_process():
        return {}
    metrics = storage.read_json(directory / results.METRICS)
    (directory / PARTS).rmtree(missing_ok=True)
    print(results.describe(metrics), flush=True)
    return results.headline(metrics)


def _evaluate(run: Run, candidate: Candidate, directory: epath.Path) -> None:
    settings, asked = run.evaluate, _prompts(run)
    work = directory / PARTS
    if parts.first_process():
        score = scorers.get(run.path(settings.scorer))  # a mistake shows before the long work
    made, alone = _of_the_model(run, candidate, work, asked.texts)
    scores = np.zeros((settings.runs, len(asked.texts), settings.samples))
    if parts.first_process():  # a scorer sees the texts of one host; it is small, or far away
        for index, found in enumerate(made):
            path = work / f"run{index}.scores.npy"
            if not path.exists():
                storage.write_array(path, _scored(score, found.texts))
            scores[index] = storage.read_array(path)
    values, truncated = _perplexities(run, work, asked.texts, made)
    if parts.first_process():
        results.write(directory, settings, dataclasses.asdict(candidate), asked, made, scores, values, truncated, alone)


def _of_the_model(run: Run, candidate: Candidate, work: epath.Path, asked: Sequence[str]):
    """What needs the model itself: continuations of each run; and MMLU, a text's perplexity, harness by name. It is
    loaded when the first part is missing, and let go at the end."""
    settings = run.evaluate

    @functools.cache
    def subject():
        source = run.path(candidate.source)
        logging.info("evaluate: %s", source)
        return parts.load_model(run, source), checkpoint.load_tokenizer(source)

    def continuations(index: int):
        model, tokenizer = subject()
        found = generations.generate(
            model,
            tokenizer,
            asked,
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            warpers=_warpers(settings),
            seed=settings.seed + index,
            batch_size=settings.batch_size,
            bos=settings.prompt_bos and not settings.official,
            official=settings.official,
            label=f"run {index + 1} of {settings.runs}",
        )
        return [{"texts": texts, "ended": row.tolist()} for texts, row in zip(found.texts, found.ended, strict=True)]

    made = [
        base.cached(
            work / f"run{index}.texts.jsonl",
            functools.partial(continuations, index),
            storage.read_lines,
            storage.write_lines,
        )
        for index in range(settings.runs)
    ]
    wanted: dict[str, Callable[[], dict[str, Any]]] = {
        f"mmlu.{spec}": functools.partial(_mmlu, run, subject, knowledge(spec)) for spec in settings.mmlu
    }
    if settings.text_file:
        wanted["text"] = lambda: _text(run, subject)
    if settings.harness:
        wanted["harness"] = lambda: _harness(run, subject)
    alone = {
        name: base.cached(work / f"{name.replace(':', '-')}.json", make, storage.read_json, storage.write_json)
        for name, make in wanted.items()
    }
    return [
        generations.Continuations([row["texts"] for row in rows], np.array([row["ended"] for row in rows]))
        for rows in made
    ], alone


def _warpers(settings: EvaluateSettings) -> list[warpers.Warper]:
    chosen = [warpers.temperature(settings.temperature)]
    chosen += [warpers.top_k(settings.top_k)] if settings.top_k else []
    return chosen + ([warpers.top_p(settings.top_p)] if settings.top_p < 1 else [])


def _mmlu(run: Run, subject: Callable, wanted: Knowledge) -> dict[str, Any]:
    questions = data.load("mmlu", wanted.split, run.shared.data_dir)
    shots = data.load("mmlu", "dev", run.shared.data_dir)
    model, tokenizer = subject()
    size = run.evaluate.score_batch_size
    found = mmlu.evaluate(
        model, tokenizer, questions, shots, wanted.form, wanted.shots, size, label=f"mmlu {wanted.text}"
    )
    return {**found, "split": wanted.split}


def _text(run: Run, subject: Callable) -> dict[str, Any]:
    place = run.path(run.evaluate.text_file)
    size = run.evaluate.score_batch_size
    if data.is_spec(place):
        texts = data.texts(place, data_dir=run.shared.data_dir)
        found = perplexity.of_texts(*subject(), texts, place, batch_size=size, label="text")
    else:
        found = perplexity.of_file(*subject(), place, batch_size=size, label="text")
    return {"file": run.evaluate.text_file, **found}


def _harness(run: Run, subject: Callable) -> dict[str, Any]:
    from unidetox_jax.evaluation import harness  # an extra

    settings = run.evaluate
    return harness.evaluate(
        *subject(),
        [run.path(task) for task in settings.harness],
        shots=settings.harness_shots if settings.harness_shots >= 0 else None,
        limit=settings.harness_limit or None,
        batch_size=settings.score_batch_size,
    )


def _scored(score: scorers.Scorer, texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores [P, S] of P lists of S texts."""
    return score(list(itertools.chain.from_iterable(texts))).reshape(len(texts), -1)


def _perplexities(run: Run, work: epath.Path, asked: Sequence[str], made) -> tuple[np.ndarray | None, int]:
    """Perplexities [R, P, S] under the scorer model, and how many texts lost context; None where none is wanted."""
    settings = run.evaluate
    if not settings.perplexity_scorer:
        return None, 0
    source = run.path(settings.perplexity_scorer)

    @functools.cache
    def scorer():
        logging.info("evaluate: perplexity under %s", source)
        return parts.load_model(run, source), checkpoint.load_tokenizer(source)

    def measure(index: int) -> np.ndarray:
        values, truncated = perplexity.conditional(
            *scorer(),
            asked,
            made[index].texts,
            settings.score_batch_size,
            settings.official,
            label=f"perplexity {index + 1} of {settings.runs}",
        )
        return np.append(values.ravel(), truncated)

    found = np.stack(
        [
            base.cached(
                work / f"run{index}.perplexities.npy",
                functools.partial(measure, index),
                storage.read_array,
                storage.write_array,
            )
            for index in range(settings.runs)
        ]
    )
    return found[:, :-1].reshape(settings.runs, len(asked), settings.samples), int(found[:, -1].sum())
