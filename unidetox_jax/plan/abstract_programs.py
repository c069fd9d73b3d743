"""The stages' programs on abstract arrays, without weights, a hub or the devices."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unidetox_jax import method, models, sharding, training
from unidetox_jax.decoding import loop, objectives, preparation
from unidetox_jax.decoding.generate import make_plan
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.warpers import Warper, in_order
from unidetox_jax.evaluation import likelihood
from unidetox_jax.models import ModelConfig
from unidetox_jax.models.attention import cudnn_applies
from unidetox_jax.models.wide_heads import LANES
from unidetox_jax.plan import cost_model
from unidetox_jax.plan.compiler import Program
from unidetox_jax.recipe import Lora, Recipe

TRAINING_UTILISATION = 0.40  # of peak FLOPs: what well-tuned training reaches
DECODING_UTILISATION = 0.60  # of memory bandwidth: this project's target
# Settings that reduce training's memory, as flags and as fields of a recipe, in order of suggestion
MEMORY_SAVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("remat=full", {"remat": "full"}),
    ("remat=full accumulation=4", {"remat": "full", "accumulation": 4}),
    ("precision=bfloat16", {"precision": "bfloat16"}),
    ("remat=full precision=bfloat16", {"remat": "full", "precision": "bfloat16"}),
    ("remat=full lora.rank=16", {"remat": "full", "lora": Lora(rank=16)}),
)


def training_program(name: str, cfg: ModelConfig, recipe: Recipe) -> Program:
    """An optimizer step on the largest possible batch: one text of maximal length a row.

    name: stage and model, such as "toxify gpt2-xl".
    """

    def memory_savers() -> Iterator[tuple[str, Program]]:
        for flags, changes in MEMORY_SAVERS:
            if (other := dataclasses.replace(recipe, **changes)) != recipe:
                flags = " ".join(f"--config.{name.split()[0]}.{flag}" for flag in flags.split())
                yield flags, training_program(name, cfg, other)

    length = min(recipe.max_length, cfg.max_position_embeddings)
    optimizer = method.optimizer(recipe, max(1, recipe.steps))
    cfg = dataclasses.replace(cfg, lora=recipe.lora, layer_loop="scan")

    def resident(mesh: Mesh):
        state = training.abstract_state(cfg, optimizer, mesh)
        if not recipe.lora.rank:
            return (state,)
        frozen = jax.eval_shape(lambda params: models.prepare(params, cfg), models.abstract_params(cfg))
        return state, _abstract(frozen, mesh)

    def lower(mesh: Mesh):
        shape = cost_model.padded_rows(recipe.batch_size, mesh.shape, recipe.accumulation), length
        rows = sharding.batch_sharding(mesh)
        dtypes = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "segment_ids": jnp.int32}
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}
        step = training.make_train_step(
            cfg,
            optimizer,
            mesh,
            accumulation=recipe.accumulation,
            remat=recipe.remat,
            dropout_seed=recipe.seed if recipe.dropout else None,
        )
        state, *frozen = resident(mesh)
        return step.lower(state, batch, *frozen)

    return Program(
        name,
        resident,
        lower,
        steps=recipe.steps,
        cost=lambda sizes, platform: cost_model.training(
            cfg, recipe, length, sizes, _is_fused(cfg, platform, recipe.dropout)
        ),
        utilisation=TRAINING_UTILISATION,
        memory_savers=memory_savers,
    )


def decoding_program(
    name: str,
    configs: Sequence[ModelConfig],
    objective: Objective,
    warpers: Sequence[Warper],
    *,
    rows: int,
    prompt: int,
    new_tokens: int,
    batches: int,
    samples: int = 1,
    cache: str = "own",
    stored: bool = False,
) -> Program:
    """One compiled generation.

    Layers are scanned here although they run unrolled: memory is the same to a few percent, and compilation takes
    minutes instead of an hour. Not so on GPUs, whose decoding is one loop; there they are unrolled. stored: the
    checkpoint's float32 weights are in memory beside those that the loop reads.
    """
    options: dict[str, Any] = {"cache": cache, "samples": samples}

    def plan_of(configs: Sequence[ModelConfig], new_tokens: int) -> loop.Plan:
        return make_plan(configs, [prompt] * len(configs), new_tokens, **options)

    def form(mesh: Mesh, configs: Sequence[ModelConfig], layer_loop: str = "scan") -> preparation.WeightLayout:
        if samples == 1 and all(models.has_decode_kernel(cfg, mesh) for cfg in configs):
            layer_loop = "unroll"
        return preparation.choose_layout(configs, mesh, layer_loop, side_by_side=cache == "own")

    def resident(mesh: Mesh):
        prepared = preparation.abstract(form(mesh, configs), mesh)
        return prepared, [_abstract_params(cfg, mesh) for cfg in configs if stored]

    def lower(mesh: Mesh, form: preparation.WeightLayout, new_tokens: int):
        plan = plan_of(form.configs, new_tokens)
        inputs = decoding_inputs(plan, max(1, rows // samples), mesh)
        with jax.set_mesh(mesh):
            params = preparation.abstract(form, mesh)
            program = loop.program_for(sharding.device_of(mesh).platform)
            return program.lower(params, inputs, objective, in_order(warpers), plan=plan)

    def shallow(mesh: Mesh, layers: int):
        few = [dataclasses.replace(cfg, num_layers=layers) for cfg in configs]
        return lower(mesh, form(mesh, few, "unroll"), loop.ROOM)

    def memory_savers() -> Iterator[tuple[str, Program]]:
        for fewer in (rows // 2, rows // 4):
            if fewer >= max(1, samples):
                smaller = decoding_program(
                    name, configs, objective, warpers, rows=fewer, prompt=prompt, new_tokens=new_tokens,
                    batches=batches * (rows // fewer), stored=stored, **options,
                )  # fmt: skip
                yield f"--config.{name.split()[0]}.batch_size={fewer}", smaller

    return Program(
        name,
        resident,
        lambda mesh: lower(mesh, form(mesh, configs), new_tokens),
        steps=batches * new_tokens,
        cost=lambda sizes, platform: cost_model.decoding(
            plan_of(configs, new_tokens), rows, prompt, sizes, LANES if platform == "tpu" else 1, stored
        ),
        utilisation=DECODING_UTILISATION,
        loops=len(plan_of(configs, new_tokens).segments),
        memory_savers=memory_savers,
        shallow=shallow,
        layers=sum(cfg.num_layers for cfg in configs) / len(configs),
    )


def decoding_inputs(plan: loop.Plan, prompts: int, mesh: Mesh) -> loop.Inputs:
    """The decoding loop's inputs for so many prompts, as ShapeDtypeStructs."""
    prompts = cost_model.padded_rows(prompts, mesh.shape)

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
        padded = cost_model.padded_rows(rows, mesh.shape)
        tokens, spans, own, last = (
            jax.ShapeDtypeStruct((padded, size), jnp.int32, sharding=sharding.batch_sharding(mesh))
            for size in (length, 2, scored, 1)
        )
        shape = likelihood.Shape((cfg,), (0,), likelihood.chunk_length([cfg], mesh, padded, scored))
        inputs = likelihood.Inputs((tokens,), spans, own, last)
        with jax.set_mesh(mesh):
            return likelihood.program(mesh).lower((resident(mesh),), inputs, objectives.get("base"), shape)

    return Program(
        name,
        resident,
        lower,
        steps=steps,
        cost=lambda sizes, platform: cost_model.scoring(cfg, rows, length, scored, sizes, _is_fused(cfg, platform)),
        utilisation=TRAINING_UTILISATION,
    )


def _is_fused(cfg: ModelConfig, platform: str, dropout: bool = False) -> bool:
    """Whether attention over whole texts does not store scores."""
    return (
        platform == "gpu"
        and cudnn_applies(cfg.dtype, cfg.head_size)
        and not (cfg.alibi or cfg.attention_cap or (dropout and cfg.attention_dropout))
    )


def _abstract_params(cfg: ModelConfig, mesh: Mesh):
    return _abstract(models.abstract_params(cfg), mesh)


def _abstract(tree, mesh: Mesh):
    """Shapes and dtypes with the parameters' shardings on the mesh."""
    shardings = sharding.param_shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
