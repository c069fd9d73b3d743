"""The programs that the stages of a configuration run on the devices."""

import dataclasses
from collections.abc import Iterator

from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.evaluation.likelihood_batches import FULL_BATCH_LENGTH
from unidetox_jax.models import ModelConfig
from unidetox_jax.plan.abstract_programs import decoding_program, scoring_program, training_program
from unidetox_jax.plan.compiler import Program
from unidetox_jax.stages import loading
from unidetox_jax.stages.evaluated_models import ORIGINAL, Form, forms
from unidetox_jax.stages.settings import DistillSettings, EvaluateSettings, Run, model_name

PROMPT_TOKENS = 64  # of an evaluation prompt; ToxiGen's are shorter
PROMPTS = 940  # of ToxiGen's annotated test set, unless config.evaluate.max_prompts is set
TEXT_TOKENS = 128  # of a text whose perplexity is measured
QUESTION_TOKENS = 1024  # of a few-shot question


def programs_by_stage(run: Run, dtype: str) -> Iterator[tuple[str, list[Program]]]:
    """(stage, programs that run on one mesh) of a configuration, in the stages' order."""
    base = loading.load_config(run, run.shared.base, dtype)
    targets = [(model_name(target), loading.load_config(run, target, dtype)) for target in run.shared.targets]
    if run.toxify.data:
        yield "toxify", [training_program(f"toxify {model_name(run.shared.base)}", base, run.toxify)]
    yield "distill", [distillation_program(run, run.distill, dtype)]
    for name, cfg in targets:
        yield "detoxify", [training_program(f"detoxify {name}", cfg, run.detoxify)]
    for name, cfg in targets if run.baselines.methods else ():
        yield "baselines", [training_program(f"baselines {name}", cfg, run.baselines)]
    for target in run.shared.targets:  # its other forms of one model have the same shape
        yield "evaluate", evaluation_programs(run, Form(model_name(target), ORIGINAL, Candidate((target,))), dtype)
    for form in forms(run):
        if not form.is_model:
            yield "evaluate", evaluation_programs(run, form, dtype)
    if scorer := run.evaluate.perplexity_scorer:
        yield "evaluate", perplexity_programs(run.evaluate, model_name(scorer), loading.load_config(run, scorer, dtype))


def evaluation_programs(run: Run, form: Form, dtype: str = "") -> list[Program]:
    """The programs that run on a form's models when it is evaluated."""
    settings, rows = run.evaluate, run.evaluate.score_batch_size
    configs = [_config(run, form, source, dtype) for source in form.candidate.models]
    programs = [
        decoding_program(
            f"evaluate {form.title}: generation",
            configs,
            objectives.get(run.path(form.candidate.objective)),
            warpers.choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p),
            rows=settings.batch_size,
            prompt=PROMPT_TOKENS,
            new_tokens=settings.max_new_tokens,
            batches=-(-_texts(settings) // settings.batch_size),
            samples=min(settings.samples, settings.batch_size),
            stored=True,
        )
    ]
    if settings.mmlu:
        questions = max(1, rows * FULL_BATCH_LENGTH // QUESTION_TOKENS)
        length = min(QUESTION_TOKENS, *(cfg.max_position_embeddings for cfg in configs))
        programs.append(scoring_program(f"evaluate {form.title}: knowledge", configs[0], questions, length, 16, 1))
    return programs


def _config(run: Run, form: Form, source: str, dtype: str) -> ModelConfig:
    """A model's configuration, or its target's if the model does not exist yet."""
    target = next((target for target in run.shared.targets if model_name(target) == form.name), source)
    pending = "{workdir}" in source and not loading.exists(run, source)
    return loading.load_config(run, target if pending else source, dtype)


def perplexity_programs(settings: EvaluateSettings, name: str, cfg: ModelConfig) -> list[Program]:
    """The programs of the scorer that measures the perplexity of an evaluation's texts."""
    rows = settings.score_batch_size
    name = f"evaluate: perplexity by {name}"
    return [scoring_program(name, cfg, rows, TEXT_TOKENS, 32, -(-_texts(settings) // rows))]


def _texts(settings: EvaluateSettings) -> int:
    return (settings.max_prompts or PROMPTS) * settings.samples * settings.runs


def distillation_program(run: Run, settings: DistillSettings, dtype: str = "") -> Program:
    """The generation of a batch of texts from BOS by all models of the objective."""
    configs = []
    for source in settings.models:
        path, _, first_layers = source.partition("@")
        layer, _, norm = first_layers.partition("+")
        cfg = loading.load_config(run, run.shared.base if path in ("base", "toxic") else path, dtype)
        configs.append(dataclasses.replace(cfg, num_layers=int(layer), skip_final_norm=not norm) if layer else cfg)
    return decoding_program(
        f"distill ({', '.join(settings.models)})",
        configs,
        objectives.get(run.path(settings.objective)),
        warpers.choose(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        ),
        rows=settings.batch_size,
        prompt=1,
        new_tokens=min(settings.max_length, *(cfg.max_position_embeddings for cfg in configs)) - 1,
        batches=-(-settings.num_texts // settings.batch_size),
        cache=settings.cache,
    )
