"""Shared by the benchmarks: contenders timed in turns, the cost of compiling, the same model in PyTorch."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from unidetox_jax import devices, models
from unidetox_jax.models import ModelConfig
from unidetox_jax.progress import Progress

Round = Callable[[int], Any]  # runs the round of that number


def race(contenders: Mapping[str, Round], rounds: int, bar: Progress) -> dict[str, list[float]]:
    """Seconds of each contender's rounds 0 … rounds-1, taken in turns, after one warm-up round each."""
    for run_round in contenders.values():
        devices.seconds(run_round, 0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run_round in contenders.items():
            times[name].append(devices.seconds(run_round, number))
        bar.update()
    return times


def compile_programs(lower: Mapping[Any, Callable[[], Any]]) -> tuple[dict[Any, Any], dict[str, float]]:
    """(compiled programs from functions that trace them, their cost): seconds of tracing and compiling all, with the
    persistent cache off, and memory of the largest."""
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # defined by jax at run time
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
    """The GPU if both JAX and PyTorch have one, else the CPU."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_model(cfg: ModelConfig, dtype: str) -> Any:
    """The same model in PyTorch, with random weights of `dtype`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**models.config_to_hf(cfg))
    with torch.device(torch_device()):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
