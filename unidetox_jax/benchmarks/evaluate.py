"""One run of the configuration's evaluation, timed from the model's directory to `metrics.json`: toxicity, diversity,
perplexity of its first target on its prompts.

Beside it, where `bench.against_torch` asks for it, the same work in PyTorch as the released code does it: one prompt at
a time, scored and measured one text at a time, from 20 of the prompts to all of them by proportion. A linear scorer of
the configuration is fitted first, into a directory of its own, outside the timed part.
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
from unidetox_jax.benchmarks import side_by_side
from unidetox_jax.evaluation import prompts, scorers
from unidetox_jax.progress import Progress
from unidetox_jax.stages import base, evaluate, fit_scorer
from unidetox_jax.stages.settings import Run

TORCH_PROMPTS = 20  # timed of the PyTorch loop
TORCH_WORK = ("generate", "score", "perplexity")
COLUMNS = ("implementation", "seconds", "texts", "texts_per_second", "times_torch", *TORCH_WORK)


def measure(run: Run) -> list[dict[str, Any]]:
    """A measurement of the first evaluation in this process, which compiles or reads the compilation cache, one of a
    second, and one of PyTorch where it is asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _alone(run, epath.Path(scratch))
        if run.fit_scorer.data:
            base.run_tasks(fit_scorer.tasks(run))
        rows = [_ours(run, "jax, first"), _ours(run, "jax, again")]
        if run.bench.against_torch:
            theirs = _theirs(run, rows[0]["prompts"])
            rows = [{**row, "times_torch": theirs["seconds"] / row["seconds"]} for row in rows] + [theirs]
    return rows


def _alone(run: Run, scratch: epath.Path) -> Run:
    """The run reduced to one evaluation of one model, in a working directory of its own."""
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


def _ours(run: Run, name: str) -> dict[str, Any]:
    (task,) = evaluate.tasks(run)
    seconds = devices.seconds(base.run_tasks, [task])
    counts = storage.read_json(task.directory / "metrics.json")["counts"]
    task.directory.rmtree()
    return _row(run, name, counts["prompts"], counts["texts"], seconds)


def _theirs(run: Run, total: int) -> dict[str, Any]:
    """The released evaluator's loops around PyTorch, with this run's settings and scorer, on evenly spaced prompts."""
    settings = run.evaluate
    texts = prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed).texts
    chosen = [texts[int(i)] for i in np.linspace(0, len(texts) - 1, min(TORCH_PROMPTS, len(texts)))]
    work = _torch_work(run, scorers.get(run.path(settings.scorer)))
    work(chosen[0])  # what is done once is not counted
    times = np.zeros(len(TORCH_WORK))
    with Progress(len(chosen), "prompts", "PyTorch", disable=not distributed.first_process()) as bar:
        for prompt in chosen:
            times += work(prompt)
            bar.update(1)
    seconds = times * total / len(chosen)
    logging.info("PyTorch: %.1f s for %d prompts, %.0f s for all %d", times.sum(), len(chosen), seconds.sum(), total)
    name = f"torch, from {len(chosen)} prompts"
    row = _row(run, name, total, total * settings.samples, float(seconds.sum()))
    return row | dict(zip(TORCH_WORK, map(float, seconds), strict=True))


def _torch_work(run: Run, score: scorers.Scorer) -> Callable[[str], list[float]]:
    """prompt → seconds of generating, scoring and measuring the perplexity of its continuations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, device = run.evaluate, side_by_side.torch_device()

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
    def work(prompt: str) -> list[float]:
        started = time.perf_counter()
        texts = generate(prompt)
        generated = time.perf_counter()
        for text in texts:
            score([text])
        scored = time.perf_counter()
        for text in ["", *texts] if judge is not None else ():
            nll(prompt + text)
        return [generated - started, scored - generated, time.perf_counter() - scored]

    return work
