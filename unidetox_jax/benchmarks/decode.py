"""Benchmark of contrastive decoding: two models of one shape, from BOS alone, top-k 50 in JAX and PyTorch.

Weights are random, which changes no timing; no row ends before its last token. Bytes and FLOPs of a step are counted,
not measured: the minimum that it needs. Contenders take turns, and the fastest round of each counts, since other load
on the machine only makes it slower.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unidetox_jax import devices, distributed, models, sharding
from unidetox_jax.benchmarks import timing
from unidetox_jax.decoding import generate, loop, objectives, warpers
from unidetox_jax.decoding.generate import make_plan
from unidetox_jax.decoding.preparation import LAYER_LOOP, prepare
from unidetox_jax.models import Model, ModelConfig, costs
from unidetox_jax.plan.abstract_programs import decoding_inputs, decoding_program
from unidetox_jax.progress import Progress
from unidetox_jax.stages import loading
from unidetox_jax.stages.settings import Run

TOP_K = 50
ALPHA = 0.1
SETTINGS: dict[str, Any] = {"objective": objectives.get("contrastive", alpha=ALPHA), "warpers": (warpers.top_k(TOP_K),)}
COLUMNS = ("implementation", "batch", "layer_loop", "tokens_per_second", "ms_per_step", "bandwidth_share",
           "matmul_share", "times_torch", "compile_seconds", "program_gigabytes")  # fmt: skip


def measure(run: Run) -> list[dict[str, Any]]:
    """A measurement for each batch size and layer loop, and of PyTorch with `bench.against_torch`."""
    settings = run.bench
    cfg = loading.load_config(run, settings.model)
    program = decoding_program(
        "decode", [cfg, cfg], **SETTINGS, rows=max(settings.batch_sizes), prompt=1, new_tokens=settings.new_tokens,
        batches=1,
    )  # fmt: skip
    mesh = loading.make_mesh(run, "bench", [program])
    pair = [Model(models.init(cfg, jax.random.key(i), mesh, cfg.dtype), cfg) for i in range(2)]
    # On GPUs only the default: there a scan copies the weights of every layer in every step
    layer_loops = ("unroll", "scan") if sharding.device_of(mesh).platform == "cpu" else (LAYER_LOOP,)
    prepared = {name: prepare(pair, layer_loop=name) for name in layer_loops}
    torch_pair = [timing.torch_model(cfg, cfg.dtype).eval() for _ in range(2)] if settings.against_torch else None
    rounds = settings.repeats * len(settings.batch_sizes)
    rows = []
    with Progress(rounds, "rounds", "decode", disable=not distributed.is_main_process()) as bar:
        for batch in settings.batch_sizes:
            size = batch, settings.new_tokens
            compiled = {name: _compile(prepared[name], *size, mesh) for name in layer_loops}
            contenders = {name: functools.partial(_generate, prepared[name], *size) for name in layer_loops}
            if torch_pair:
                contenders["torch"] = functools.partial(_generate_torch, torch_pair, cfg, *size)
            times = timing.race(contenders, settings.repeats, bar)
            best = {name: min(seconds) for name, seconds in times.items()}
            for name, seconds in best.items():
                row = {
                    "benchmark": "decode",
                    "implementation": "torch" if name == "torch" else "jax",
                    "model": settings.model,
                    "dtype": cfg.dtype,
                    "models": 2,
                    "batch": batch,
                    "new_tokens": settings.new_tokens,
                    **_rates(cfg, *size, seconds),
                }
                if name in compiled:
                    row |= {"layer_loop": name, "default": name == LAYER_LOOP, **compiled[name]}
                    row |= {"times_torch": best["torch"] / seconds} if "torch" in best else {}
                rows.append({**row, **devices.describe()})
    return rows


def _rates(cfg: ModelConfig, batch: int, new_tokens: int, seconds: float) -> dict[str, float]:
    cached = (1 + new_tokens) / 2  # tokens that a step attends to, on average
    step = seconds / new_tokens
    bytes_read = 2 * (costs.read_bytes(cfg) + batch * costs.cache_bytes(cfg, cached))
    flops = 2 * batch * costs.forward_flops(cfg, cached)
    return {
        "seconds": seconds,
        "tokens_per_second": batch / step,
        "ms_per_step": 1e3 * step,
        "bytes_per_step": bytes_read,
        "flops_per_step": flops,
        "bandwidth_share": bytes_read / devices.copy_bandwidth() / step / jax.device_count(),
        "matmul_share": flops / devices.matmul_rate(cfg.dtype) / step / jax.device_count(),
    }


def _prompts(cfg: ModelConfig, batch: int) -> np.ndarray:
    return np.full((batch, 1), cfg.bos_token_id or 0, np.int32)


def _compile(pair: Sequence[Model], batch: int, new_tokens: int, mesh) -> dict[str, float]:
    """The cost of compiling the program of `_generate`."""
    platform, prepared = sharding.device_of(mesh).platform, pair[0].params
    plan = make_plan(prepared.configs, [1, 1], new_tokens)
    inputs = decoding_inputs(plan, batch, mesh)
    with jax.set_mesh(mesh):
        lower = functools.partial(loop.program_for(platform).lower, prepared.trees, inputs, **SETTINGS, plan=plan)
        return timing.compile_programs({"": lower})[1]


def _generate(pair: Sequence[Model], batch: int, new_tokens: int, seed: int) -> Any:
    prompts = _prompts(pair[0].cfg, batch)
    return generate(pair, prompts, **SETTINGS, max_new_tokens=new_tokens, eos_id=(), seed=seed)


def _generate_torch(pair: Sequence[Any], cfg: ModelConfig, batch: int, new_tokens: int, seed: int) -> Any:
    """`generate` of the first model, with a logits processor that runs the second on its own cache."""
    import torch
    from transformers import DynamicCache, LogitsProcessorList

    first, second = pair
    cache = DynamicCache(config=second.config)

    def contrast(ids, scores):
        other = second(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        plausible = scores >= scores.max(-1, keepdim=True).values + np.log(ALPHA)
        return torch.where(plausible, scores - other, -torch.inf)

    torch.manual_seed(seed)
    prompts = torch.tensor(_prompts(cfg, batch), device=first.device, dtype=torch.long)
    with torch.inference_mode():
        return first.generate(
            prompts, attention_mask=torch.ones_like(prompts), logits_processor=LogitsProcessorList([contrast]),
            do_sample=True, top_k=TOP_K, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
            pad_token_id=0,
        ).cpu()  # fmt: skip
