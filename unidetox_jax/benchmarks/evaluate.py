"""One run of the configuration's evaluation, timed from the model's directory to `metrics.json`: toxicity, diversity,
perplexity of its first target on its prompts.

Beside it, where `bench.against_torch` asks for it, the same work in PyTorch as the released code does it: one prompt at
a time, scored and measured one text at a time, from 20 of the prompts to all of them by proportion. The surprising
thing: a linear scorer of the configuration is fitted first, into a directory of its own, outside the timed part.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import storage
from unidetox_jax.evaluation import prompts, scorers
from unidetox_jax.progress import Progress
from unidetox_jax.stages import base, evaluate, fit_scorer
from unidetox_jax.stages.settings import Run

TORCH_PROMPTS = 20  # timed of the PyTorch loop
COLUMNS = ("implementation", "seconds", "texts", "texts_per_second", "times_torch", "generate", "score", "perplexity")


def measure(run: Run) -> list[dict[str, Any]]:
    """A measurement of the first evaluation in this process, which compiles or reads the compilation cache, one of a
    second, and one of PyTorch where it is asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _alone(run, epath.Path(scratch))
        if run.fit_scorer.data:
            base.run_tasks(fit_scorer.tasks(run))
        found = [_ours(run, "jax, first"), _ours(run, "jax, again")]
        if run.bench.against_torch:
            theirs = _theirs(run, found[0]["prompts"])
            found = [{**row, "times_torch": theirs["seconds"] / row["seconds"]} for row in found] + [theirs]
    return found


def _alone(run: Run, scratch: epath.Path) -> Run:
    """The run reduced to one evaluation of one model, in a working directory of its own."""
    shared = dataclasses.replace(run.shared, targets=run.shared.targets[:1], control_targets=())
    settings = dataclasses.replace(
        run.evaluate, which=("original",), extra_models=(), runs=1, mmlu=(), text_file="", harness=()
    )
    return dataclasses.replace(run, workdir=scratch, shared=shared, evaluate=settings)


def _ours(run: Run, name: str) -> dict[str, Any]:
    (task,) = evaluate.tasks(run)
    started = time.perf_counter()
    base.run_tasks([task])
    seconds = time.perf_counter() - started
    counts = storage.read_json(task.directory / "metrics.json")["counts"]
    task.directory.rmtree()
    return {
        "benchmark": "evaluate",
        "implementation": name,
        "model": run.shared.targets[0],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "prompts": counts["prompts"],
        "texts": counts["texts"],
        "seconds": seconds,
        "texts_per_second": counts["texts"] / seconds,
    }


def _theirs(run: Run, total: int) -> dict[str, Any]:
    """The released evaluator's loops around PyTorch, with this run's settings and scorer, on evenly spaced prompts."""
    settings = run.evaluate
    texts = prompts.load(run.path(settings.prompts), run.shared.data_dir, settings.max_prompts, settings.seed).texts
    chosen = [texts[int(i)] for i in np.linspace(0, len(texts) - 1, min(TORCH_PROMPTS, len(texts)))]
    loop = _torch_loop(run, scorers.get(run.path(settings.scorer)))
    loop(chosen[0])  # what is done once is not counted
    parts = np.zeros(3)
    with Progress(len(chosen), "prompts", "PyTorch", disable=jax.process_index() > 0) as bar:
        for prompt in chosen:
            parts += loop(prompt)
            bar.update(1)
    seconds = parts * total / len(chosen)
    logging.info("PyTorch: %.1f s for %d prompts, %.0f s for all %d", parts.sum(), len(chosen), seconds.sum(), total)
    names = ("generate", "score", "perplexity")
    return {
        "benchmark": "evaluate",
        "implementation": f"torch, from {len(chosen)} prompts",
        "model": run.shared.targets[0],
        "prompts": total,
        "texts": total * settings.samples,
        "seconds": float(seconds.sum()),
        "texts_per_second": total * settings.samples / float(seconds.sum()),
        **dict(zip(names, map(float, seconds), strict=True)),
    }


def _torch_loop(run: Run, score: scorers.Scorer) -> Callable[[str], list[float]]:
    """prompt → seconds of generating, scoring and measuring the perplexity of its continuations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = run.evaluate
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(source: str):
        model = AutoModelForCausalLM.from_pretrained(run.path(source)).eval().to(device)
        return model, AutoTokenizer.from_pretrained(run.path(source))

    model, tokenizer = load(run.shared.targets[0])
    judge, judge_tokenizer = load(settings.perplexity_scorer) if settings.perplexity_scorer else (None, None)
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}

    def nll(text: str) -> float:
        ids = judge_tokenizer(text, return_tensors="pt").input_ids.to(device)
        return judge(ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    @torch.no_grad()
    def work(prompt: str) -> list[float]:
        times = [time.perf_counter()]
        out = model.generate(
            **tokenizer(prompt, return_tensors="pt").to(device),
            **sampling,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=settings.samples,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = [tokenizer.decode(row, skip_special_tokens=True).replace(prompt, "") for row in out]
        times.append(time.perf_counter())
        for text in texts:
            score([text])
        times.append(time.perf_counter())
        if judge is not None:
            nll(prompt)
            for text in texts:
                nll(prompt + text)
        times.append(time.perf_counter())
        return np.diff(times).tolist()

    return work
