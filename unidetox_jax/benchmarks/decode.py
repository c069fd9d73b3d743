"""Contrastive decoding measured: two models of one shape, from BOS alone, top-k 50 on both sides.

Weights are random, which changes no shape and no time; nothing ends a row before its last token. Bytes and operations
of a step are counted, not measured: what it could not do without. Contenders take turns, and of each the fastest round
counts, since whatever else a machine does only makes it slower.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from unidetox_jax import checkpoint, machine, models, sharding
from unidetox_jax.decoding import generate, loop, objectives, warpers
from unidetox_jax.decoding.generate import default_layer_loop, make_plan
from unidetox_jax.models import Model, ModelConfig
from unidetox_jax.progress import Progress

TOP_K = 50
ALPHA = 0.1
COLUMNS = ("implementation", "batch", "layer_loop", "tokens_per_second", "ms_per_step", "bandwidth_share",
           "matmul_share", "times_torch", "compile_seconds", "program_gigabytes")  # fmt: skip


def measure(run: Any) -> list[dict[str, Any]]:
    """A measurement for each batch size and layer loop, and one of PyTorch where `bench.against_torch` asks for it."""
    cfg = shape(run)
    mesh = sharding.make_mesh(run.shared.mesh)
    pair = [Model(models.init(cfg, jax.random.key(i), mesh, cfg.dtype), cfg) for i in range(2)]
    torch_pair = _torch_models(cfg) if run.bench.against_torch else None
    found, rounds = [], run.bench.repeats + 1
    bar = Progress(rounds * len(run.bench.batch_sizes), "rounds", "decode", disable=jax.process_index() != 0)
    for batch in run.bench.batch_sizes:
        compiled = {name: _compile(pair, batch, run.bench.new_tokens, name) for name in ("unroll", "scan")}
        contenders = {name: _ours(pair, batch, run.bench.new_tokens, name) for name in compiled}
        if torch_pair:
            contenders["torch"] = _theirs(torch_pair, cfg, batch, run.bench.new_tokens)
        best = _race(contenders, rounds, bar)
        for name, seconds in best.items():
            row = {
                "benchmark": "decode",
                "implementation": "torch" if name == "torch" else "jax",
                "model": run.bench.model,
                "dtype": cfg.dtype,
                "models": 2,
                "batch": batch,
                "new_tokens": run.bench.new_tokens,
                **_rates(cfg, batch, run.bench.new_tokens, seconds),
            }
            if name in compiled:
                row.update(layer_loop=name, default=name == default_layer_loop(), **compiled[name])
                row.update({"times_torch": best["torch"] / seconds} if "torch" in best else {})
            found.append({**row, **machine.describe()})
    bar.close()
    return found


def shape(run: Any) -> ModelConfig:
    """The benchmark's model: a published shape, or the shape of what a path holds; in the run's dtype."""
    name = run.bench.model
    known = name in models.PUBLISHED
    cfg = models.published_config(name) if known else checkpoint.load_config(run.path(name))
    return dataclasses.replace(cfg, dtype=run.shared.dtype or cfg.dtype)


def bytes_per_step(cfg: ModelConfig, batch: int, live: float, count: int = 2) -> float:
    """Bytes that a step of `count` models has to move: their weights, and the live keys and values of every row.

    live: cache slots with a token, on average. Of an embedding only the rows of the batch are read; a tied one is the
    head's matrix, and is read whole.
    """
    size = np.dtype(cfg.dtype).itemsize
    keys_and_values = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * live * batch
    return count * size * (_step_parameters(cfg, matrices=False) + keys_and_values)


def flops_per_step(cfg: ModelConfig, batch: int, live: float, count: int = 2) -> float:
    """Floating-point operations of the matrix products in a step of `count` models."""
    attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_size * live
    return count * batch * (2 * _step_parameters(cfg, matrices=True) + attention)


def _step_parameters(cfg: ModelConfig, matrices: bool) -> int:
    """Parameters that a step reads whole, or those of them that multiply."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(models.abstract_params(cfg)):
        name = sharding.path_string(path)
        looked_up = name.startswith("embed/") and name.endswith("embedding")
        if looked_up and not (name == "embed/tokens/embedding" and cfg.tie_word_embeddings):
            continue
        if matrices and not name.endswith(("kernel", "embedding")):
            continue
        total += leaf.size
    return total


def _rates(cfg: ModelConfig, batch: int, new_tokens: int, seconds: float) -> dict[str, float]:
    live = (1 + new_tokens) / 2  # a step reads what stands before it, and its own token
    step = seconds / new_tokens
    moved, operations = bytes_per_step(cfg, batch, live), flops_per_step(cfg, batch, live)
    return {
        "seconds": seconds,
        "tokens_per_second": batch / step,
        "ms_per_step": 1e3 * step,
        "bytes_per_step": moved,
        "flops_per_step": operations,
        "bandwidth_share": moved / machine.copy_bandwidth() / step / jax.device_count(),
        "matmul_share": operations / machine.matmul_rate(cfg.dtype) / step / jax.device_count(),
    }


def _settings() -> dict[str, Any]:
    return {"objective": objectives.get("contrastive", alpha=ALPHA), "warpers": (warpers.top_k(TOP_K),)}


def _ours(pair: Sequence[Model], batch: int, new_tokens: int, layer_loop: str) -> Callable[[], Any]:
    def work():
        return generate(
            pair, _prompts(pair[0].cfg, batch), **_settings(), max_new_tokens=new_tokens, eos_id=(),
            layer_loop=layer_loop,
        )  # fmt: skip

    return work


def _prompts(cfg: ModelConfig, batch: int) -> np.ndarray:
    return np.full((batch, 1), cfg.bos_token_id or 0, np.int32)


def _compile(pair: Sequence[Model], batch: int, new_tokens: int, layer_loop: str) -> dict[str, float]:
    """Seconds of tracing and compiling, with the persistent cache off, and the memory that the program takes."""
    prompts = tuple(_prompts(model.cfg, batch) for model in pair)
    inputs = loop.Inputs(
        prompts=prompts, masks=tuple(tokens >= 0 for tokens in prompts), row_ids=np.arange(batch, dtype=np.int32),
        live=np.ones(batch, bool), seed=np.uint32(0), limit=np.int32(new_tokens), eos_ids=np.zeros(0, np.int32),
        pad=np.int32(0),
    )  # fmt: skip
    plan = make_plan(
        [model.cfg for model in pair],
        [1, 1],
        new_tokens,
        layer_loop=layer_loop,
        transpose_head=jax.default_backend() == "cpu",
    )
    params, settings = tuple(model.params for model in pair), _settings()
    program = loop.program_of_backend(batch)
    cached, made = jax.config.jax_enable_compilation_cache, []

    def compile_it():
        lowered = program.lower(params, inputs, settings["objective"], settings["warpers"], plan=plan)
        made.append(lowered.compile())

    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.set_mesh(sharding.mesh_of(params)):
            seconds = machine.seconds(compile_it)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    memory = made[0].memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {"compile_seconds": seconds, "program_gigabytes": (used - memory.alias_size_in_bytes) / 1e9}


def _race(contenders: dict[str, Callable[[], Any]], rounds: int, bar: Progress) -> dict[str, float]:
    """The fastest of each contender's calls; they take turns, and the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            times[name].append(machine.seconds(work))
        bar.update()
    return {name: min(taken[1:]) for name, taken in times.items()}


def _torch_models(cfg: ModelConfig) -> list[Any]:
    """The same two shapes in PyTorch, on its GPU where JAX has one too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(**models.config_to_hf(cfg))
    dtype = getattr(torch, cfg.dtype)
    return [AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval() for _ in range(2)]


def _theirs(pair: Sequence[Any], cfg: ModelConfig, batch: int, new_tokens: int) -> Callable[[], Any]:
    """PyTorch's `generate` of the first model, with a logits processor that runs the second on a cache of its own."""
    import torch
    from transformers import DynamicCache, LogitsProcessorList

    first, second = pair

    class Contrast:
        def __init__(self):
            self.cache = DynamicCache(config=second.config)

        def __call__(self, ids, scores):
            out = second(input_ids=ids[:, -1:], past_key_values=self.cache, use_cache=True)
            contrast = scores - out.logits[:, -1]
            kept = scores >= scores.max(-1, keepdim=True).values + np.log(ALPHA)
            return torch.where(kept, contrast, -torch.inf)

    def work():
        prompts = torch.tensor(_prompts(cfg, batch), device=first.device, dtype=torch.long)
        with torch.inference_mode():
            return first.generate(
                prompts, attention_mask=torch.ones_like(prompts), logits_processor=LogitsProcessorList([Contrast()]),
                do_sample=True, top_k=TOP_K, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
                pad_token_id=0,
            ).cpu()  # fmt: skip

    return work
