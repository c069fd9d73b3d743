"""Benchmark of an evaluation, timed from the model's directory to `metrics.json`: toxicity, diversity and perplexity of
the configuration's first target.

With `bench.against_torch`, also the same work in PyTorch as the released code does it: one prompt at a time, scored and
measured one text at a time, extrapolated from 20 prompts to all. A linear scorer of the configuration is fitted first,
outside the timed part.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import devices, distributed, storage
from unidetox_jax.benchmarks import timing
from unidetox_jax.evaluation import prompts, scorers
from unidetox_jax.progress import Progress
from unidetox_jax.stages import evaluate, fit_scorer
from unidetox_jax.stages.settings import Run
from unidetox_jax.stages.task import run_tasks

TORCH_PROMPTS = 20  # timed in PyTorch
TORCH_PHASES = ("generate", "score", "perplexity")
COLUMNS = ("implementation", "seconds", "texts", "texts_per_second", "times_torch", *TORCH_PHASES)


def measure(run: Run) -> list[dict[str, Any]]:
    """A measurement of the first evaluation in this process, which compiles or reads the compilation cache, of a second
    one, and of PyTorch with `bench.against_torch`."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _single_evaluation(run, epath.Path(scratch))
        if run.fit_scorer.data:
            run_tasks(fit_scorer.tasks(run))
        rows = [_measure_jax(run, "jax, first"), _measure_jax(run, "jax, again")]
        if run.bench.against_torch:
            torch_row = _measure_torch(run, rows[0]["prompts"])
            rows = [{**row, "times_torch": torch_row["seconds"] / row["seconds"]} for row in rows] + [torch_row]
    return rows


def _single_evaluation(run: Run, scratch: epath.Path) -> Run:
    """The run reduced to one evaluation of one model, in the working directory `scratch`."""
    shared = dataclasses.replace(run.shared, targets=run.shared.targets[:1], control_targets=())
    settings = dataclasses.replace(
        run.evaluate, which=("original",), extra_models=(), other_scorers=(), runs=1, mmlu=(), text_file="", harness=()
    )
    return dataclasses.replace(run, workdir=scratch, shared=shared, evaluate=settings)


def _row(run: Run, name: str, prompts: int, texts: int, seconds: float) -> dict[str, Any]:
    return {
        "benchmark": "evaluate",
        "implementation": name,
        "model": run.shared.targets[0],
        "devices": devices.summary(),
        "prompts": prompts,
        "texts": texts,
        "seconds": seconds,
        "texts_per_second": texts / seconds,
    }


def _measure_jax(run: Run, name: str) -> dict[str, Any]:
    (task,) = evaluate.tasks(run)
    seconds = devices.seconds(run_tasks, [task])
    counts = storage.read_json(task.directory / "metrics.json")["counts"]
    task.directory.rmtree()
    return _row(run, name, counts["prompts"], counts["texts"], seconds)


def _measure_torch(run: Run, total: int) -> dict[str, Any]:
    """The released evaluator's loops in PyTorch, with this run's settings and scorer, on evenly spaced prompts."""
    settings = run.evaluate
    texts = prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed).texts
    sample = [texts[int(i)] for i in np.linspace(0, len(texts) - 1, min(TORCH_PROMPTS, len(texts)))]
    time_prompt = _torch_timer(run, scorers.get(run.path(settings.scorer)))
    time_prompt(sample[0])  # warm-up
    times = np.zeros(len(TORCH_PHASES))
    with Progress(len(sample), "prompts", "PyTorch", disable=not distributed.is_main_process()) as bar:
        for prompt in sample:
            times += time_prompt(prompt)
            bar.update(1)
    seconds = times * total / len(sample)
    logging.info("PyTorch: %.1f s for %d prompts, %.0f s for all %d", times.sum(), len(sample), seconds.sum(), total)
    name = f"torch, from {len(sample)} prompts"
    row = _row(run, name, total, total * settings.samples, float(seconds.sum()))
    return row | dict(zip(TORCH_PHASES, map(float, seconds), strict=True))


def _torch_timer(run: Run, score: scorers.Scorer) -> Callable[[str], list[float]]:
    """prompt → seconds of generating its continuations, scoring them and measuring their perplexity."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, device = run.evaluate, timing.torch_device()

    def load(source: str) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(run.path(source)).eval().to(device)
        return model, AutoTokenizer.from_pretrained(run.path(source))

    model, tokenizer = load(run.shared.targets[0])
    judge: Any = None
    judge_tokenizer: Any = None
    if settings.perplexity_scorer:
        judge, judge_tokenizer = load(settings.perplexity_scorer)

    def generate(prompt: str) -> list[str]:
        rows = model.generate(
            **tokenizer(prompt, return_tensors="pt").to(device),
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=settings.samples,
            pad_token_id=tokenizer.eos_token_id,
        )
        return [tokenizer.decode(row, skip_special_tokens=True).replace(prompt, "") for row in rows]

    def nll(text: str) -> float:
        ids = judge_tokenizer(text, return_tensors="pt").input_ids.to(device)
        return judge(ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    @torch.no_grad()
    def time_prompt(prompt: str) -> list[float]:
        started = time.perf_counter()
        texts = generate(prompt)
        generated = time.perf_counter()
        for text in texts:
            score([text])
        scored = time.perf_counter()
        for text in ["", *texts] if judge is not None else ():
            nll(prompt + text)
        return [generated - started, scored - generated, time.perf_counter() - scored]

    return time_prompt
