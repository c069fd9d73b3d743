"""Cost of a program's step on one device of a mesh, from shapes alone; it ranks meshes before anything is compiled.

FLOPs and traffic are counted. Memory is an estimate that leaves out what only the compiler knows.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from unidetox_jax import method, padded_sizes
from unidetox_jax.decoding import loop, preparation
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig, costs, lora, wide_heads
from unidetox_jax.recipe import Recipe

LOGITS_BYTES = 1 << 29  # logits and their gradients that training and scoring hold at a time
CACHE_GROWTH = 1.25  # peak over final size of a cache, while it grows

AxisSizes = Mapping[str, int]


class StepCost(NamedTuple):
    """Cost of a step on one device.

    flops; traffic: bytes to and from memory; memory: peak bytes; network: mesh axis → bytes received over it;
    collectives: mesh axis → their number.
    """

    flops: float
    traffic: float
    memory: float
    network: Mapping[str, float]
    collectives: Mapping[str, float]


def padded_rows(rows: int, sizes: AxisSizes, accumulation: int = 1) -> int:
    """Rows of a batch, rounded up so that the mesh and the accumulation divide them."""
    return padded_sizes.round_up(rows, sizes["data"] * sizes["fsdp"] * accumulation)


def training(cfg: ModelConfig, recipe: Recipe, length: int, sizes: AxisSizes, fused: bool) -> StepCost:
    """Cost of an optimizer step. fused: attention does not store scores."""
    shards, itemsize, micro_batches = sizes["model"], np.dtype(cfg.dtype).itemsize, recipe.accumulation
    tokens = padded_rows(recipe.batch_size, sizes, micro_batches) // (sizes["data"] * sizes["fsdp"]) * length
    local_params, weights = _local_params(cfg, sizes), costs.read_bytes(cfg, shards)
    recomputes = recipe.remat == "full"
    # all-reduces after attention and feed-forward, forward and backward
    sums = (6 if recomputes else 4) * cfg.num_layers * micro_batches
    # weights, moments and gradients; with an adapter its own, beside the frozen weights
    adapter_params = _adapter_params(cfg)
    trained = adapter_params or local_params
    stored_itemsize = np.dtype(method.optimizer(recipe, 1).param_dtype).itemsize  # of weights and moments
    state = trained * (3 * stored_itemsize + (itemsize if micro_batches == 1 else 4))
    state += bool(adapter_params) * itemsize * local_params
    saved = tokens // micro_batches * cfg.num_layers * _saved_bytes(cfg, recipe.remat, length, shards, fused)
    return StepCost(
        flops=tokens * costs.training_flops(cfg, length, recipe.remat, shards),
        traffic=costs.optimizer_bytes(trained) + (4 if recomputes else 3) * micro_batches * weights,
        memory=state + saved + LOGITS_BYTES,
        network={
            # weights gathered forward and backward, gradients scattered
            "fsdp": _received_share(sizes["fsdp"]) * 3 * micro_batches * weights,
            "data": _received_share(sizes["data"]) * 2 * micro_batches * itemsize * trained,
            "model": _received_share(shards) * 2 * sums * tokens // micro_batches * cfg.hidden_size * itemsize,
        },
        collectives={
            "fsdp": (sizes["fsdp"] > 1) * 3 * micro_batches * cfg.num_layers,
            "data": (sizes["data"] > 1) * micro_batches,
            "model": (shards > 1) * sums,
        },
    )


def decoding(plan: loop.Plan, rows: int, prompt: int, sizes: AxisSizes, lanes: int, stored: bool) -> StepCost:
    """Cost of one more token in each of `rows` rows, with half of the new tokens in the cache.

    lanes: head sizes are padded to a multiple of it. stored: see `abstract_programs.decoding_program`.
    """
    row_shards, shards = sizes["data"] * sizes["fsdp"], sizes["model"]
    rows = padded_rows(-(-rows // plan.samples), sizes) // row_shards * plan.samples
    gather = preparation.gather_fits(plan.configs, shards)
    flops = traffic = memory = gathered = summed = 0.0
    for cfg in plan.configs:
        itemsize, weights = np.dtype(cfg.dtype).itemsize, costs.read_bytes(cfg, shards)
        local_params = _local_params(cfg, sizes)
        prepared = costs.param_bytes(cfg, shards) if gather else itemsize * local_params
        together = wide_heads.width(cfg, shards) if lanes > 1 else 1
        padding = padded_sizes.round_up(together * cfg.head_size, lanes) / (together * cfg.head_size)
        flops += rows * costs.forward_flops(cfg, prompt + plan.size / 2, shards=shards)
        traffic += weights + padding * rows * costs.cache_bytes(cfg, prompt + plan.size / 2, shards)
        memory += 4 * local_params * stored + prepared + 3 * 4 * rows * costs.split(cfg.vocab_size, shards)
        memory += padding * CACHE_GROWTH * rows * costs.cache_bytes(cfg, plan.size + prompt / plan.samples, shards)
        gathered += weights / (plan.size if gather else 1)
        summed += 2 * cfg.num_layers * rows * cfg.hidden_size * itemsize
    layers = sum(cfg.num_layers for cfg in plan.configs)
    return StepCost(
        flops,
        traffic,
        memory,
        network={"fsdp": _received_share(sizes["fsdp"]) * gathered, "model": _received_share(shards) * 2 * summed},
        collectives={
            "fsdp": (sizes["fsdp"] > 1) * layers / (plan.size if gather else 1),
            "model": (shards > 1) * 2 * layers,
        },
    )


def scoring(cfg: ModelConfig, rows: int, length: int, scored: int, sizes: AxisSizes, fused: bool) -> StepCost:
    """Cost of the log-probabilities of the last `scored` tokens of each row."""
    shards, itemsize, layers = sizes["model"], np.dtype(cfg.dtype).itemsize, cfg.num_layers
    tokens = padded_rows(rows, sizes) // (sizes["data"] * sizes["fsdp"]) * length
    weights = costs.read_bytes(cfg, shards)
    # float32 weights and a copy in the compute dtype: the TPU compiler casts before the loop over layers
    memory = (4 + itemsize) * _local_params(cfg, sizes) + tokens * _saved_bytes(cfg, "none", length, shards, fused)
    return StepCost(
        flops=tokens * costs.forward_flops(cfg, length / 2, scored / length, shards),
        traffic=weights,
        memory=memory + LOGITS_BYTES,
        network={
            "fsdp": _received_share(sizes["fsdp"]) * weights,
            "model": _received_share(shards) * 2 * 2 * layers * tokens * cfg.hidden_size * itemsize,
        },
        collectives={"fsdp": (sizes["fsdp"] > 1) * layers, "model": (shards > 1) * 2 * layers},
    )


def _local_params(cfg: ModelConfig, sizes: AxisSizes) -> int:
    """Parameters on a device.

    Raises:
      UserError: an axis that cannot split anything in the model.
    """
    for axis in ("fsdp", "model"):
        if sizes[axis] > 1 and costs.params_of_device(cfg, {axis: sizes[axis]}) == costs.params_of_device(cfg, {}):
            raise UserError(f"mesh: nothing of this model can be split {sizes[axis]} ways over {axis!r}")
    return costs.params_of_device(cfg, sizes)


@functools.cache
def _adapter_params(cfg: ModelConfig) -> int:
    """Parameters of the low-rank adapter; 0 without one."""
    return sum(leaf.size for leaf in jax.tree.leaves(lora.abstract(cfg))) if cfg.lora.rank else 0


def _received_share(shards: int) -> float:
    """The share of an array that a device receives when it holds one of `shards` shards and gathers the rest."""
    return (shards - 1) / shards


def _saved_bytes(cfg: ModelConfig, remat: str, length: int, shards: int, fused: bool) -> float:
    """Bytes per layer and token saved for the backward pass: the block's input with remat "full"; matmul outputs too
    with "dots"; otherwise all activations, and scores and probabilities of attention that is not fused."""
    itemsize = np.dtype(cfg.dtype).itemsize
    heads = (costs.split(cfg.num_heads, shards) + 2 * costs.split(cfg.num_kv_heads, shards)) * cfg.head_size
    inner = costs.split(cfg.intermediate_size, shards)
    if remat == "full":
        return itemsize * cfg.hidden_size
    if remat == "dots":
        return itemsize * (3 * cfg.hidden_size + heads + 2 * inner)
    scores = 0 if fused else (4 + itemsize) * costs.split(cfg.num_heads, shards) * length
    return itemsize * (6 * cfg.hidden_size + 2 * heads + 3 * inner) + scores
