"""Fine-tuning measured: AdamW steps of one shape on real or random texts, beside PyTorch where that is asked for.

PyTorch does what transformers.Trainer does with the released code's data: every text padded to the longest of all. Its
loop is written out, so the Trainer's own overhead is spared it. Contenders take turns, step by step and on the same
texts. MFU counts the texts' own tokens, not padding, against the measured rate of matrix products.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unidetox_jax import checkpoint, data, machine, models, sharding, training
from unidetox_jax.benchmarks import decode
from unidetox_jax.data.layout import Shape
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig
from unidetox_jax.progress import Progress
from unidetox_jax.training.metrics import flops_per_token

COLUMNS = ("implementation", "batch", "layout", "examples_per_second", "tokens_per_second", "ms_per_step", "mfu",
           "padded_share", "times_torch", "compile_seconds", "program_gigabytes")  # fmt: skip
LEARNING_RATE, STEPS = 1e-5, 15_126  # the toxic model's, so that no step is one of rate 0
SEED = 0


def measure(run: Any) -> list[dict[str, Any]]:
    """A measurement for each of `bench.train_batch_sizes`, and one of PyTorch where `bench.against_torch` asks for it.

    Raises:
      UserError: no step to time, or a model that cannot read the texts.
    """
    if run.bench.steps < 1:
        raise UserError(f"config.bench.steps: found {run.bench.steps}, expected at least 1")
    cfg = decode.shape(run)
    mesh = sharding.make_mesh(run.shared.mesh)
    tokens = _tokens(run, cfg)
    theirs = _Theirs(cfg, tokens) if run.bench.against_torch else None
    found = []
    bar = Progress(
        run.bench.steps * len(run.bench.train_batch_sizes), "steps", "train", disable=jax.process_index() > 0
    )
    for size in run.bench.train_batch_sizes:
        batches = data.Batches(tokens, size, seed=SEED, row_multiple=sharding.batch_shards(mesh))
        found += [{**row, **machine.describe()} for row in _measure(run, cfg, mesh, batches, theirs, bar)]
    bar.close()
    return found


def _measure(run: Any, cfg: ModelConfig, mesh: jax.sharding.Mesh, batches: data.Batches, theirs, bar: Progress):
    """The rows of one batch size."""
    count, size = run.bench.steps, batches.batch_size
    ours = _Ours(cfg, mesh, batches, count)
    shapes = {"jax": [batches.plan(step)[0] for step in range(count)]}
    steps: dict[str, Callable[[int], Any]] = {"jax": ours.step}
    if theirs is not None:
        steps["torch"] = lambda step: theirs.step(batches.indices(step))
        shapes["torch"] = [(size, theirs.length)] * count
    seconds = _race(steps, count, bar)
    for name, taken in seconds.items():
        row = {
            "benchmark": "train",
            "implementation": name,
            "model": run.bench.model,
            "data": run.bench.data or "random",
            "dtype": cfg.dtype,
            "batch": size,
            "layout": batches.layout if name == "jax" else "longest",
            **_rates(cfg, batches, taken, shapes[name]),
        }
        if name == "jax":
            row.update(ours.compiled)
            row.update({"times_torch": sum(seconds["torch"]) / sum(taken)} if theirs is not None else {})
        yield row


def _tokens(run: Any, cfg: ModelConfig) -> data.Tokens:
    """The configured texts, or random ones of `train_length` tokens, as many as the steps take."""
    length = run.bench.train_length
    if run.bench.data:
        source = run.path(run.bench.tokenizer or run.bench.model)
        texts = data.texts(run.path(run.bench.data), data_dir=run.shared.data_dir)
        tokenizer = checkpoint.load_tokenizer(source)
        return data.tokenize(texts, tokenizer, length, context=cfg.longest, vocab_size=cfg.vocab_size)
    cfg.check_length(length)
    count = run.bench.steps * max(run.bench.train_batch_sizes)
    ids = np.random.default_rng(SEED).integers(0, cfg.vocab_size, count * length).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return data.Tokens(ids, offsets, np.arange(count, dtype=np.int32), pad_id=0, max_length=length)


def _race(steps: dict[str, Callable[[int], Any]], count: int, bar: Progress) -> dict[str, list[float]]:
    """Seconds of each contender's steps 0 … count-1; they take turns, after one step each that warms up."""
    for work in steps.values():
        machine.seconds(lambda work=work: work(0))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in range(count):
        for name, work in steps.items():
            taken[name].append(machine.seconds(lambda work=work, step=step: work(step)))
        bar.update()
    return taken


def _rates(cfg: ModelConfig, batches: data.Batches, taken: list[float], shapes: list[Shape]) -> dict[str, Any]:
    lengths = batches.tokens.lengths[np.concatenate([batches.indices(step) for step in range(len(taken))])]
    seconds, real = sum(taken), int(lengths.sum())
    read = float((lengths**2).sum() / real)  # the length of the text that a token stands in, on average
    operations = real * flops_per_token(cfg, read)
    computed = sum(rows * length for rows, length in shapes)
    return {
        "steps": len(taken),
        "seconds": seconds,
        "examples_per_second": len(lengths) / seconds,
        "tokens_per_second": real / seconds,
        "ms_per_step": 1e3 * statistics.mean(taken),
        "flops": operations,
        "mfu": operations / seconds / machine.matmul_rate(cfg.dtype) / jax.device_count(),
        "padded_share": 1 - real / computed,
    }


class _Ours:
    """Our step, compiled beforehand for every shape that comes; `compiled` says at what cost."""

    def __init__(self, cfg: ModelConfig, mesh: jax.sharding.Mesh, batches: data.Batches, count: int):
        optimizer = training.Optimizer(LEARNING_RATE, STEPS)
        self._placement = sharding.batch_sharding(mesh)
        self._batches = [data.place(batches[step], self._placement) for step in range(count)]
        self._state = training.init_state(models.init(cfg, jax.random.key(SEED), mesh), optimizer)
        step = training.make_train_step(cfg, optimizer, mesh, dropout_seed=SEED)
        self._programs: dict[Shape, Any] = {}
        cached = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            seconds = machine.seconds(lambda: self._compile(step))
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        memory = [program.memory_analysis() for program in self._programs.values()]
        used = [
            part.argument_size_in_bytes + part.output_size_in_bytes + part.temp_size_in_bytes - part.alias_size_in_bytes
            for part in memory
        ]
        self.compiled = {
            "compile_seconds": seconds,
            "programs": len(self._programs),
            "program_gigabytes": max(used) / 1e9,
        }

    def step(self, step: int) -> Any:
        batch = self._batches[step]
        self._state, metrics = self._programs[batch["tokens"].shape](self._state, batch)
        return metrics

    def _compile(self, step) -> None:
        for batch in self._batches:
            shape = batch["tokens"].shape
            if shape not in self._programs:
                self._programs[shape] = step.lower(self._state, batch).compile()


class _Theirs:
    """The Trainer's step: AdamW, linear decay, clipping to 1, on PyTorch's GPU where JAX has one too."""

    def __init__(self, cfg: ModelConfig, tokens: data.Tokens):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, get_linear_schedule_with_warmup

        self._device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        config = AutoConfig.for_model(**models.config_to_hf(cfg))
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self._device).train()
        self._autocast = torch.autocast(self._device, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, 0, STEPS)
        self._clip = torch.nn.utils.clip_grad_norm_
        self._tokens, self.length = tokens, int(tokens.lengths.max())

    def step(self, indices: np.ndarray) -> float:
        import torch

        shape = (len(indices), self.length)
        batch = data.fill(self._tokens, shape, tuple((int(index),) for index in indices))
        ids = torch.from_numpy(batch["tokens"].astype(np.int64)).to(self._device)
        lengths = torch.from_numpy(self._tokens.lengths[indices])[:, None].to(self._device)
        real = torch.arange(self.length, device=self._device) < lengths
        with self._autocast:
            loss = self._model(ids, attention_mask=real.long(), labels=torch.where(real, ids, -100)).loss
        loss.backward()
        self._clip(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.item()
