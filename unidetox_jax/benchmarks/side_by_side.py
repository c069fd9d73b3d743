"""What the benchmarks share: contenders that take turns, the cost of compiling, the same shape in PyTorch."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from unidetox_jax import devices, models
from unidetox_jax.models import ModelConfig
from unidetox_jax.progress import Progress

Work = Callable[[int], Any]  # does the work of a round


def race(contenders: Mapping[str, Work], rounds: int, bar: Progress) -> dict[str, list[float]]:
    """Seconds of each contender's rounds 0 … rounds-1, in turns, after one round each that warms up."""
    for work in contenders.values():
        devices.seconds(work, 0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, work in contenders.items():
            times[name].append(devices.seconds(work, number))
        bar.update()
    return times


def compile_programs(lower: Mapping[Any, Callable[[], Any]]) -> tuple[dict[Any, Any], dict[str, float]]:
    """Programs, each from a function that traces it, and what they cost: seconds of tracing and compiling all of them,
    with the persistent cache off, and the memory that the largest takes."""
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # made by jax at run time
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        started = time.perf_counter()
        programs = {name: trace().compile() for name, trace in lower.items()}
        seconds = time.perf_counter() - started
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    memory = [program.memory_analysis() for program in programs.values()]
    used = [
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
        for sizes in memory
    ]
    return programs, {"compile_seconds": seconds, "program_gigabytes": max(used) / 1e9}


def torch_device() -> str:
    """PyTorch's GPU where JAX has one too."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_model(cfg: ModelConfig, dtype: str) -> Any:
    """A model of the same shape in PyTorch, with random weights of `dtype`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**models.config_to_hf(cfg))
    with torch.device(torch_device()):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
