"""`unidetox plan`: every stage's program, compiled for a topology that is not here, before it is rented.

Configurations of well-known checkpoints come with the package, so a plan needs neither weights nor a hub. What is
surprising: decoding is compiled with scanned layers, while it runs with unrolled ones; the memory is the same to a few
percent, and the compilation takes minutes instead of an hour.
"""

import argparse
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from unidetox_jax import buckets, checkpoint, models, planning, sharding, training
from unidetox_jax.decoding import loop, objectives, warpers
from unidetox_jax.decoding.generate import make_plan
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import likelihood
from unidetox_jax.models import ModelConfig
from unidetox_jax.planning import GIB, Program, Report, Topology
from unidetox_jax.stages.settings import Run, TrainingSettings, model_name

MESHES = ("fsdp:-1", "fsdp:-1,model:2", "fsdp:-1,model:4", "model:-1")  # tried in this order where the run's fails
PROMPT_TOKENS = 64  # of an evaluation prompt; ToxiGen's are shorter
PROMPTS = 940  # of ToxiGen's annotated test, where config.evaluate.max_prompts does not say
TEXT_TOKENS = 128  # of a text whose perplexity is measured
QUESTION_TOKENS = 1024  # of a few-shot question
# Rows of the table of BENCHMARKS.md, and the slices that it is for
TABLE_MODELS = (
    "openai-community/gpt2-xl",
    "facebook/opt-6.7b",
    "tiiuae/falcon-7b",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
)
TABLE_TOPOLOGIES = ("v5e-4", "v5e-16", "v5p-8", "v4-16", "v6e-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--topology", default="", help="v5e:4x4, v5e-16, … or local: the devices of this machine")
    parser.add_argument("--table", action="store_true", help="memory of distillation and fine-tuning on many slices")


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Prints the plan; 0 where every stage fits, 1 where one does not."""
    if options.table:
        chosen = options.topology.split(",") if options.topology else TABLE_TOPOLOGIES
        for line in table(run, TABLE_MODELS, [planning.topology(name) for name in chosen]):
            print(line, flush=True)
        return 0
    if not options.topology:
        raise UserError("--topology: missing; expected local, a slice such as v5e:4x4, or a type such as v5e-16")
    topology = planning.topology(options.topology)
    print(f"{topology.name}: {len(topology.devices)} x {topology.devices[0].device_kind} ({topology.slice})")
    fits = True
    for program in programs(run, _dtype(run, topology)):
        fits &= _plan_one(run, program, topology)
    return 0 if fits else 1


def programs(run: Run, dtype: str) -> Iterator[Program]:
    """What the stages of a configuration run on the devices, in their order."""
    base = _config(run, run.shared.base, dtype)
    if run.toxify.data:
        yield training_program(f"toxify {model_name(run.shared.base)}", base, run.toxify)
    yield distill_program(run, dtype)
    for target in run.shared.targets:
        yield training_program(f"detoxify {model_name(target)}", _config(run, target, dtype), run.detoxify)
    for target in run.shared.targets:
        cfg = _config(run, target, dtype)
        yield generation_program(run, f"evaluate {model_name(target)}: generation", cfg)
        if run.evaluate.mmlu:
            rows = max(1, run.evaluate.score_batch_size * likelihood.FULL_BATCH_LENGTH // QUESTION_TOKENS)
            length = min(QUESTION_TOKENS, cfg.max_position_embeddings)
            yield scoring_program(f"evaluate {model_name(target)}: knowledge", cfg, rows, length, 16, 1)
    if run.evaluate.perplexity_scorer:
        cfg = _config(run, run.evaluate.perplexity_scorer, dtype)
        texts = (run.evaluate.max_prompts or PROMPTS) * run.evaluate.samples * run.evaluate.runs
        rows = run.evaluate.score_batch_size
        name = f"evaluate: perplexity by {model_name(run.evaluate.perplexity_scorer)}"
        yield scoring_program(name, cfg, rows, TEXT_TOKENS, 32, -(-texts // rows))


def training_program(name: str, cfg: ModelConfig, settings: TrainingSettings) -> Program:
    """An optimizer step on the largest batch that can come: one text a row, each as long as it may be.

    name: of the stage and the model, "toxify gpt2-xl".
    """
    leaner = None
    if settings.remat != "full":
        again = training_program(name, cfg, dataclasses.replace(settings, remat="full"))
        leaner = f"--config.{name.split()[0]}.remat=full", again
    length = min(settings.max_length, cfg.max_position_embeddings)
    optimizer = training.Optimizer(
        learning_rate=settings.learning_rate,
        steps=max(1, settings.steps),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        official=settings.official,
    )

    def lower(mesh: Mesh):
        ways = sharding.batch_shards(mesh) * settings.accumulation
        rows = sharding.batch_sharding(mesh)
        shape = (buckets.multiple(settings.batch_size, ways), length)
        kinds = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "segment_ids": jnp.int32}
        batch = {kind: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for kind, dtype in kinds.items()}
        step = training.make_train_step(
            cfg,
            optimizer,
            mesh,
            accumulation=settings.accumulation,
            remat=settings.remat,
            dropout_seed=settings.seed if settings.dropout else None,
        )
        return step.lower(training.abstract_state(cfg, optimizer, mesh), batch)

    return Program(
        name,
        lower,
        planning.training_flops(cfg, settings.batch_size, length, settings.remat),
        lambda mesh: planning.optimizer_bytes(cfg),
        settings.steps,
        planning.TRAINING_UTILISATION,
        lambda mesh: training.abstract_state(cfg, optimizer, mesh),
        (1, cfg.num_layers * settings.accumulation),
        leaner,
    )


def distill_program(run: Run, dtype: str) -> Program:
    """The generation of a batch of texts from BOS by all models of the objective."""
    settings = run.distill
    configs = [_distill_config(run, source, dtype) for source in settings.models]
    drawn = warpers.choose(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
    )
    new_tokens = min(settings.max_length, *(cfg.max_position_embeddings for cfg in configs)) - 1
    return decoding_program(
        f"distill ({', '.join(settings.models)})",
        configs,
        objectives.get(settings.objective),
        drawn,
        rows=settings.batch_size,
        prompt=1,
        new_tokens=new_tokens,
        batches=-(-settings.num_texts // settings.batch_size),
        cache=settings.cache,
    )


def generation_program(run: Run, name: str, cfg: ModelConfig) -> Program:
    """The continuations of a batch of prompts by one model."""
    settings = run.evaluate
    texts = (settings.max_prompts or PROMPTS) * settings.samples * settings.runs
    return decoding_program(
        name,
        [cfg],
        objectives.get("base"),
        warpers.choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p),
        rows=settings.batch_size,
        prompt=PROMPT_TOKENS,
        new_tokens=settings.max_new_tokens,
        batches=-(-texts // settings.batch_size),
        samples=min(settings.samples, settings.batch_size),
    )


def decoding_program(
    name,
    configs,
    objective,
    drawn,
    *,
    rows: int,
    prompt: int,
    new_tokens: int,
    batches: int,
    samples: int = 1,
    cache: str = "own",
) -> Program:
    """The one compiled program of a generation, with weights in float32, as training leaves them."""
    plan = make_plan(configs, [prompt] * len(configs), new_tokens, cache=cache, layer_loop="scan", samples=samples)

    def params(mesh: Mesh):
        return tuple(_placed(models.abstract_params(cfg), mesh) for cfg in plan.configs)

    def lower(mesh: Mesh):
        ways = sharding.batch_shards(mesh)
        prompts = buckets.multiple(max(1, rows // samples), ways)
        over_rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

        def row(dtype, *shape, count=prompts * samples):
            return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=over_rows)

        def scalar(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

        inputs = loop.Inputs(
            prompts=tuple(row(jnp.int32, slots + 1, count=prompts) for slots in plan.prompt_slots),
            masks=tuple(row(jnp.bool_, slots + 1, count=prompts) for slots in plan.prompt_slots),
            row_ids=row(jnp.int32),
            live=row(jnp.bool_),
            seed=scalar(jnp.uint32),
            limit=scalar(jnp.int32),
            eos_ids=scalar(jnp.int32, 1),
            pad=scalar(jnp.int32),
        )
        with jax.set_mesh(mesh):
            return loop.program.lower(params(mesh), inputs, objective, warpers.in_order(drawn), plan=plan)

    def read(mesh: Mesh) -> float:
        caches = sum(planning.cache_bytes(cfg, rows, prompt + new_tokens / 2) for cfg in configs)
        return caches + sum(planning.weight_bytes(cfg, mesh) for cfg in configs)

    flops = sum(planning.decoding_flops(cfg, rows, prompt + new_tokens) for cfg in configs)
    loops = len(plan.segments)  # only one of them runs in any step
    layers = max(cfg.num_layers for cfg in configs)
    rounds = (0, 1 / loops, layers / loops)
    return Program(name, lower, flops, read, batches * new_tokens, planning.DECODING_UTILISATION, params, rounds)


def scoring_program(name: str, cfg: ModelConfig, rows: int, length: int, scored: int, steps: int) -> Program:
    """Log-probabilities of a batch of texts under one model."""

    def params(mesh: Mesh):
        return _placed(models.abstract_params(cfg), mesh)

    def lower(mesh: Mesh):
        ways = sharding.batch_shards(mesh)
        filled = buckets.multiple(rows, ways)
        shapes = ((filled, length), (filled, 2), (filled, scored), (filled, 1))
        over_rows = sharding.batch_sharding(mesh)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over_rows) for shape in shapes]
        piece = likelihood.piece_length(cfg, mesh, filled, scored)
        with jax.set_mesh(mesh):
            return likelihood.program(mesh).lower(params(mesh), arrays, cfg, piece, 1)

    return Program(
        name,
        lower,
        planning.scoring_flops(cfg, rows, length, scored),
        lambda mesh: planning.weight_bytes(cfg, mesh),
        steps,
        planning.TRAINING_UTILISATION,
        params,
        (1, cfg.num_layers),
    )


def table(run: Run, names, topologies, distill: bool = True) -> Iterator[str]:
    """Lines of a Markdown table: GiB a chip of distillation and of fine-tuning each model, slice by slice.

    Each cell is the first that fits of: the run's mesh without and with recomputation, then other meshes.
    """
    yield f"| GiB a chip | {' | '.join(topology.name for topology in topologies)} |"
    yield "|---|" + "---:|" * len(topologies)
    for name in (*["distill"] * distill, *names):
        label = f"distill {', '.join(run.distill.models)}" if name == "distill" else f"fine-tune {model_name(name)}"
        cells = []
        for topology in topologies:
            dtype = _dtype(run, topology)
            if name == "distill":
                tries = [(distill_program(run, dtype), mesh, mesh) for mesh in _meshes(run)]
            else:
                tries = list(_training_tries(run, name, _config(run, name, dtype)))
            cells.append(_cell(tries, topology))
            logging.info("plan: %s, %s: %s", label, topology.name, cells[-1])
        yield f"| {label} | {' | '.join(cells)} |"


def _cell(tries, topology: Topology) -> str:
    """The first that fits, or the least that is needed."""
    needed = []
    for program, layout, note in tries:
        report = _compile(program, layout, topology)
        if report is None:
            continue
        if not report.refusal:
            return f"{report.peak / GIB:.1f} ({note})"
        needed.append(report.peak)
    return f"no: at least {min(needed) / GIB:.1f}"


def _training_tries(run: Run, name: str, cfg: ModelConfig):
    for layout in _meshes(run):
        for remat in ("none", "full"):
            settings = dataclasses.replace(run.detoxify, remat=remat)
            note = layout if remat == "none" else f"{layout}, remat {remat}"
            yield training_program(f"detoxify {model_name(name)}", cfg, settings), layout, note


def _plan_one(run: Run, program: Program, topology: Topology) -> bool:
    """Prints what the compiler says of one program; whether it fits."""
    mesh = sharding.make_mesh(run.shared.mesh, topology.devices)
    report = planning.compile_program(program, mesh, topology.chip)
    print("\n".join(_describe(program, report, mesh, topology)), flush=True)
    if report.refusal:
        print(f"  suggestion  {_suggest(run, program, topology)}", flush=True)
    return not report.refusal


def _describe(program: Program, report: Report, mesh: Mesh, topology: Topology) -> Iterator[str]:
    memory = f" of {topology.chip.memory / GIB:.0f}" if topology.chip else ""
    verdict = f"DOES NOT FIT: {report.refusal}" if report.refusal else "fits"
    yield f"\n{program.name}: {verdict}"
    yield f"  mesh        {', '.join(f'{axis}:{size}' for axis, size in mesh.shape.items())}"
    yield (
        f"  GiB a chip  {report.arguments / GIB:.2f} arguments + {report.temporaries / GIB:.2f} temporaries, "
        f"peak {report.peak / GIB:.2f}{memory}"
    )
    moved, received = program.bytes(mesh) / 1e9, planning.network_bytes(program, report) / 1e9
    yield (
        f"  a step      {program.flops / 1e12:,.2f} TFLOP and {moved:,.2f} GB of memory traffic on all chips together, "
        f"{received:,.3f} GB received by each"
    )
    estimate = planning.step_seconds(program, report, mesh, topology)
    if estimate is not None:
        seconds, bound = estimate
        total = program.steps * seconds
        yield (
            f"  time        {seconds * 1e3:,.2f} ms a step at {program.utilisation:.0%} of the bound by {bound}; "
            f"{program.steps:,} steps {total / 60:,.1f} min, {total / 3600 * topology.chips:,.2f} chip-hours"
        )
    for index, line in enumerate(planning.describe_shardings(program.abstract(mesh))):
        yield f"  {'shardings' if index == 0 else '':<11} {line}"
    for index, found in enumerate(report.collectives):
        where = ("once", "in each round of the loop", "in each layer of each round")[min(found.depth, 2)]
        yield (
            f"  {'collectives' if index == 0 else '':<11} {found.count} {found.kind}, {where}: "
            f"{found.bytes / 1e6:,.2f} MB, the largest {found.largest}"
        )


def _suggest(run: Run, program: Program, topology: Topology) -> str:
    """What would fit, as flags: recomputation on the run's mesh, then the other meshes."""
    flag, program = program.leaner or ("", program)
    for layout in _meshes(run) if flag else _meshes(run)[1:]:
        report = _compile(program, layout, topology)
        if report is not None and not report.refusal:
            mesh = "" if layout == run.shared.mesh else f"--config.mesh={layout}"
            return f"{' '.join(filter(None, (flag, mesh)))} needs {report.peak / GIB:.1f} GiB"
    return "none of " + ", ".join(_meshes(run)) + " fits; take more chips, accumulation or a smaller batch"


def _compile(program: Program, layout: str, topology: Topology) -> Report | None:
    """The report for one mesh; None where the mesh does not go with the devices or the model."""
    try:
        mesh = sharding.make_mesh(layout, topology.devices)
        return planning.compile_program(program, mesh, topology.chip)
    except UserError:
        return None


def _meshes(run: Run) -> list[str]:
    return list(dict.fromkeys((run.shared.mesh, *MESHES)))


def _placed(tree, mesh: Mesh):
    shardings = sharding.param_shardings(tree, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def _dtype(run: Run, topology: Topology) -> str:
    return run.shared.dtype or (models.default_dtype() if topology.slice == "local" else "bfloat16")


def _config(run: Run, source: str, dtype: str) -> ModelConfig:
    cfg = models.published_config(source) or checkpoint.load_config(run.path(source))
    return dataclasses.replace(cfg, dtype=dtype)


def _distill_config(run: Run, source: str, dtype: str) -> ModelConfig:
    path, _, layer = source.partition("@")
    cfg = _config(run, run.shared.base if path in ("base", "toxic") else path, dtype)
    return dataclasses.replace(cfg, num_layers=int(layer)) if layer else cfg
