"""The programs of the stages, with shapes in place of arrays: nothing here needs weights, a hub or the devices."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unidetox_jax import buckets, method, models, sharding, training
from unidetox_jax.decoding import loop, objectives, warpers
from unidetox_jax.decoding.generate import make_plan
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.evaluation import likelihood
from unidetox_jax.models import ModelConfig, costs
from unidetox_jax.plan.compiler import Program
from unidetox_jax.recipe import Recipe
from unidetox_jax.stages import common
from unidetox_jax.stages.settings import Run, model_name

TRAINING_UTILISATION = 0.40  # of peak FLOPs: what well-tuned training reaches
DECODING_UTILISATION = 0.60  # of memory bandwidth: this project's own target
PROMPT_TOKENS = 64  # of an evaluation prompt; ToxiGen's are shorter
PROMPTS = 940  # of ToxiGen's annotated test, where config.evaluate.max_prompts does not say
TEXT_TOKENS = 128  # of a text whose perplexity is measured
QUESTION_TOKENS = 1024  # of a few-shot question


def programs(run: Run, dtype: str) -> Iterator[Program]:
    """What the stages of a configuration run on the devices, in their order."""
    base = common.load_config(run, run.shared.base, dtype)
    targets = [(model_name(target), common.load_config(run, target, dtype)) for target in run.shared.targets]
    settings = run.evaluate
    texts = (settings.max_prompts or PROMPTS) * settings.samples * settings.runs
    rows = settings.score_batch_size
    if run.toxify.data:
        yield training_program(f"toxify {model_name(run.shared.base)}", base, run.toxify)
    yield distillation(run, dtype)
    for name, cfg in targets:
        yield training_program(f"detoxify {name}", cfg, run.detoxify)
    for name, cfg in targets:
        yield decoding_program(
            f"evaluate {name}: generation",
            [cfg],
            objectives.get("base"),
            warpers.choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p),
            rows=settings.batch_size,
            prompt=PROMPT_TOKENS,
            new_tokens=settings.max_new_tokens,
            batches=-(-texts // settings.batch_size),
            samples=min(settings.samples, settings.batch_size),
        )
        if settings.mmlu:
            questions = max(1, rows * likelihood.FULL_BATCH_LENGTH // QUESTION_TOKENS)
            length = min(QUESTION_TOKENS, cfg.max_position_embeddings)
            yield scoring_program(f"evaluate {name}: knowledge", cfg, questions, length, 16, 1)
    if settings.perplexity_scorer:
        cfg = common.load_config(run, settings.perplexity_scorer, dtype)
        name = f"evaluate: perplexity by {model_name(settings.perplexity_scorer)}"
        yield scoring_program(name, cfg, rows, TEXT_TOKENS, 32, -(-texts // rows))


def distillation(run: Run, dtype: str) -> Program:
    """The generation of a batch of texts from BOS by all models of the objective."""
    settings = run.distill
    configs = []
    for source in settings.models:
        path, _, layer = source.partition("@")
        cfg = common.load_config(run, run.shared.base if path in ("base", "toxic") else path, dtype)
        configs.append(dataclasses.replace(cfg, num_layers=int(layer)) if layer else cfg)
    return decoding_program(
        f"distill ({', '.join(settings.models)})",
        configs,
        objectives.get(settings.objective),
        warpers.choose(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        ),
        rows=settings.batch_size,
        prompt=1,
        new_tokens=min(settings.max_length, *(cfg.max_position_embeddings for cfg in configs)) - 1,
        batches=-(-settings.num_texts // settings.batch_size),
        cache=settings.cache,
    )


def training_program(name: str, cfg: ModelConfig, recipe: Recipe) -> Program:
    """An optimizer step on the largest batch that can come: one text a row, each as long as it may be.

    name: of the stage and the model, "toxify gpt2-xl".
    """
    leaner = None
    if recipe.remat != "full":
        again = training_program(name, cfg, dataclasses.replace(recipe, remat="full"))
        leaner = f"--config.{name.split()[0]}.remat=full", again
    length = min(recipe.max_length, cfg.max_position_embeddings)
    optimizer = method.optimizer(recipe, max(1, recipe.steps))

    def resident(mesh: Mesh):
        return training.abstract_state(cfg, optimizer, mesh)

    def lower(mesh: Mesh):
        shape = _filled(recipe.batch_size, mesh, recipe.accumulation), length
        rows = sharding.batch_sharding(mesh)
        kinds = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "segment_ids": jnp.int32}
        batch = {kind: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for kind, dtype in kinds.items()}
        step = training.make_train_step(
            cfg,
            optimizer,
            mesh,
            accumulation=recipe.accumulation,
            remat=recipe.remat,
            dropout_seed=recipe.seed if recipe.dropout else None,
        )
        return step.lower(resident(mesh), batch)

    return Program(
        name,
        resident,
        lower,
        steps=recipe.steps,
        flops=recipe.batch_size * length * costs.training_flops(cfg, length, recipe.remat),
        traffic=lambda mesh: costs.optimizer_bytes(cfg),
        utilisation=TRAINING_UTILISATION,
        rounds=(1, cfg.num_layers * recipe.accumulation),
        leaner=leaner,
    )


def decoding_program(
    name: str,
    configs: Sequence[ModelConfig],
    objective: Objective,
    chosen: Sequence[warpers.Warper],
    *,
    rows: int,
    prompt: int,
    new_tokens: int,
    batches: int,
    samples: int = 1,
    cache: str = "own",
) -> Program:
    """One compiled generation, with weights in float32, as training leaves them.

    Layers are scanned, while they run unrolled: the memory is the same to a few percent, and the compilation takes
    minutes instead of an hour.
    """
    plan = make_plan(configs, [prompt] * len(configs), new_tokens, cache=cache, layer_loop="scan", samples=samples)

    def resident(mesh: Mesh):
        return tuple(_abstract_params(cfg, mesh) for cfg in plan.configs)

    def lower(mesh: Mesh):
        inputs = decoding_inputs(plan, max(1, rows // samples), mesh)
        with jax.set_mesh(mesh):
            return loop.program.lower(resident(mesh), inputs, objective, warpers.in_order(chosen), plan=plan)

    live = prompt + new_tokens / 2  # tokens in the cache, on average
    loops = len(plan.segments)  # only one of them runs in any step
    layers = max(cfg.num_layers for cfg in configs)
    return Program(
        name,
        resident,
        lower,
        steps=batches * new_tokens,
        flops=rows * sum(costs.forward_flops(cfg, live) for cfg in configs),
        traffic=lambda mesh: sum(_weight_traffic(cfg, mesh) + costs.cache_bytes(cfg, rows * live) for cfg in configs),
        utilisation=DECODING_UTILISATION,
        rounds=(0, 1 / loops, layers / loops),
    )


def decoding_inputs(plan: loop.Plan, prompts: int, mesh: Mesh) -> loop.Inputs:
    """What a generation of `prompts` prompts takes beside parameters and settings, as ShapeDtypeStructs."""
    prompts = _filled(prompts, mesh)

    def row(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    def scalar(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    return loop.Inputs(
        prompts=tuple(row(jnp.int32, prompts, slots + 1) for slots in plan.prompt_slots),
        masks=tuple(row(jnp.bool_, prompts, slots + 1) for slots in plan.prompt_slots),
        row_ids=row(jnp.int32, prompts * plan.samples),
        live=row(jnp.bool_, prompts * plan.samples),
        seed=scalar(jnp.uint32),
        limit=scalar(jnp.int32),
        eos_ids=scalar(jnp.int32, 1),
        pad=scalar(jnp.int32),
    )


def scoring_program(name: str, cfg: ModelConfig, rows: int, length: int, scored: int, steps: int) -> Program:
    """Log-probabilities of the last `scored` tokens of a batch of texts under one model."""

    def resident(mesh: Mesh):
        return _abstract_params(cfg, mesh)

    def lower(mesh: Mesh):
        filled = _filled(rows, mesh)
        shapes = ((filled, length), (filled, 2), (filled, scored), (filled, 1))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh)) for shape in shapes]
        piece = likelihood.piece_length(cfg, mesh, filled, scored)
        with jax.set_mesh(mesh):
            return likelihood.program(mesh).lower(resident(mesh), arrays, cfg, piece, 1)

    return Program(
        name,
        resident,
        lower,
        steps=steps,
        flops=rows * length * costs.forward_flops(cfg, length / 2, logits=scored / length),
        traffic=lambda mesh: _weight_traffic(cfg, mesh),
        utilisation=TRAINING_UTILISATION,
        rounds=(1, cfg.num_layers),
    )


def _filled(rows: int, mesh: Mesh, accumulation: int = 1) -> int:
    """Rows of a batch that the mesh, and the parts of an accumulation, divide."""
    return buckets.multiple(rows, sharding.batch_shards(mesh) * accumulation)


def _weight_traffic(cfg: ModelConfig, mesh: Mesh) -> int:
    """Bytes of weights that all devices together read in a forward pass: only `model` divides that work, whatever is
    cut over `fsdp` is whole when it is used."""
    return sharding.batch_shards(mesh) * costs.read_bytes(cfg)


def _abstract_params(cfg: ModelConfig, mesh: Mesh):
    params = models.abstract_params(cfg)
    shardings = sharding.param_shardings(params, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, shardings
    )
