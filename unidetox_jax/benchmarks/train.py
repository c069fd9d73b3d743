"""Benchmark of fine-tuning: AdamW steps on real or random texts, optionally beside PyTorch.

PyTorch does what transformers.Trainer does with the released code's data, every text padded to the longest of all, but
in a plain loop without the Trainer's overhead. Contenders take turns, step by step on the same texts. MFU counts the
texts' tokens, not padding, relative to the measured rate of matrix products.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import checkpoint, data, devices, distributed, models, sharding, training
from unidetox_jax.benchmarks import timing
from unidetox_jax.data.packing import Shape
from unidetox_jax.models import ModelConfig, costs
from unidetox_jax.plan.abstract_programs import training_program
from unidetox_jax.progress import Progress
from unidetox_jax.stages import loading
from unidetox_jax.stages.settings import Run, TrainingSettings

COLUMNS = ("implementation", "batch", "layout", "examples_per_second", "tokens_per_second", "ms_per_step", "mfu",
           "padded_share", "times_torch", "compile_seconds", "program_gigabytes")  # fmt: skip
LEARNING_RATE, STEPS = 1e-5, 15_126  # of the toxic model's schedule, so that no step has rate 0
SEED = 0


def measure(run: Run) -> list[dict[str, Any]]:
    """A measurement for each of `bench.train_batch_sizes` and layouts, and of PyTorch with `bench.against_torch`.

    Raises:
      UserError: the texts do not fit the model.
    """
    settings = run.bench
    cfg = loading.load_config(run, settings.model)
    recipe = TrainingSettings(
        batch_size=max(settings.train_batch_sizes),
        max_length=settings.train_length,
        steps=settings.steps,
        precision=settings.precision,
        remat=settings.remat,
    )
    mesh = loading.make_mesh(run, "bench", [training_program("train", cfg, recipe)])
    tokens = _tokens(run, cfg)
    torch_step = _torch_step(cfg, tokens) if settings.against_torch else None
    sizes = list(itertools.product(settings.train_batch_sizes, settings.layouts))
    rows = []
    with Progress(settings.steps * len(sizes), "steps", "train", disable=not distributed.is_main_process()) as bar:
        for size, layout in sizes:
            shards = sharding.batch_shards(mesh)
            batches = data.Batches(tokens, size, seed=SEED, layout=layout, row_multiple=shards)
            rows += _measure(run, cfg, mesh, batches, torch_step, bar)
    return rows


def _measure(run: Run, cfg: ModelConfig, mesh: Mesh, batches: data.Batches, torch_step, bar: Progress):
    """The rows of one batch size."""
    count, size = run.bench.steps, batches.batch_size
    jax_step, compiled = _jax_step(run, cfg, mesh, batches)
    contenders, shapes = {"jax": jax_step}, {"jax": [batches.plan(step)[0] for step in range(count)]}
    if torch_step is not None:
        contenders["torch"] = lambda step: torch_step(batches.indices(step))
        shapes["torch"] = [(size, int(batches.tokens.lengths.max()))] * count
    times = timing.race(contenders, count, bar)
    for name, seconds in times.items():
        row = {
            "benchmark": "train",
            "implementation": name,
            "model": run.bench.model,
            "data": run.bench.data or "random",
            "dtype": cfg.dtype,
            "batch": size,
            "layout": batches.layout if name == "jax" else "longest",
            **_rates(cfg, batches, seconds, shapes[name]),
        }
        if name == "jax":
            row |= {"precision": run.bench.precision, "remat": run.bench.remat, **compiled}
            row |= {"times_torch": sum(times["torch"]) / sum(seconds)} if torch_step is not None else {}
        yield {**row, **devices.describe()}


def _tokens(run: Run, cfg: ModelConfig) -> data.Tokens:
    """The configured texts, or as many random ones of up to `train_length` tokens as the steps take."""
    length = run.bench.train_length
    if run.bench.data:
        texts = data.texts(run.path(run.bench.data), data_dir=run.shared.data_dir)
        tokenizer = checkpoint.load_tokenizer(run.path(run.bench.tokenizer or run.bench.model))
        return data.tokenize(texts, tokenizer, length, context=cfg.length_limit, vocab_size=cfg.vocab_size)
    cfg.check_length(length)
    count = run.bench.steps * max(run.bench.train_batch_sizes)
    random = np.random.default_rng(SEED)
    lengths = random.integers(run.bench.train_shortest or length, length + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(0, cfg.vocab_size, offsets[-1]).astype(np.int32)
    return data.Tokens(ids, offsets, np.arange(count, dtype=np.int32), pad_id=0, max_length=length)


def _rates(cfg: ModelConfig, batches: data.Batches, times: list[float], shapes: Sequence[Shape]) -> dict[str, Any]:
    lengths = batches.tokens.lengths[np.concatenate([batches.indices(step) for step in range(len(times))])]
    seconds, tokens = sum(times), int(lengths.sum())
    mean_length = float((lengths**2).sum() / tokens)  # of a token's text, averaged over tokens
    flops = tokens * costs.training_flops(cfg, mean_length)
    return {
        "steps": len(times),
        "seconds": seconds,
        "examples_per_second": len(lengths) / seconds,
        "tokens_per_second": tokens / seconds,
        "ms_per_step": 1e3 * statistics.mean(times),
        "flops": flops,
        "mfu": flops / seconds / devices.matmul_rate(cfg.dtype) / jax.device_count(),
        "padded_share": 1 - tokens / sum(rows * length for rows, length in shapes),
    }


def _jax_step(run: Run, cfg: ModelConfig, mesh: Mesh, batches: data.Batches) -> tuple[timing.Round, dict[str, float]]:
    """(training step by number, compiled for every shape of batch; the cost of compiling)."""
    optimizer = training.Optimizer(LEARNING_RATE, STEPS, precision=run.bench.precision)
    placed = [sharding.put(batches[step], sharding.batch_sharding(mesh)) for step in range(run.bench.steps)]
    state = training.init_state(models.init(cfg, jax.random.key(SEED), mesh, optimizer.param_dtype), optimizer)
    train_step = training.make_train_step(cfg, optimizer, mesh, remat=run.bench.remat, dropout_seed=SEED)
    lower = {batch["tokens"].shape: functools.partial(train_step.lower, state, batch) for batch in placed}
    programs, compiled = timing.compile_programs(lower)

    def run_step(step: int) -> Any:
        nonlocal state
        batch = placed[step]
        state, metrics = programs[batch["tokens"].shape](state, batch)
        return metrics

    return run_step, {**compiled, "programs": len(programs)}


def _torch_step(cfg: ModelConfig, tokens: data.Tokens) -> Callable[[np.ndarray], float]:
    """The Trainer's step, from indices of texts to the loss: AdamW, linear decay, gradients clipped to 1."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    model, device = timing.torch_model(cfg, "float32").train(), timing.torch_device()
    autocast = torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    longest = int(tokens.lengths.max())

    def step(indices: np.ndarray) -> float:
        batch = data.collate(tokens, (len(indices), longest), tuple((int(index),) for index in indices))
        ids = torch.from_numpy(batch["tokens"].astype(np.int64)).to(device)
        lengths = torch.from_numpy(tokens.lengths[indices])[:, None].to(device)
        real = torch.arange(longest, device=device) < lengths
        with autocast:
            loss = model(ids, attention_mask=real.long(), labels=torch.where(real, ids, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step
