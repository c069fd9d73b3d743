"""What a program asks of one device of a mesh, by shapes alone: the model by which meshes are chosen before anything is
compiled. Work and traffic are counted; memory is an estimate, which leaves out what only the compiler knows.

Letters: D head size, N key-value heads; sizes are those of the mesh's axes.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from unidetox_jax import buckets, method
from unidetox_jax.decoding import loop, preparation
from unidetox_jax.errors import UserError
from unidetox_jax.models import ModelConfig, costs, lora, wide_heads
from unidetox_jax.recipe import Recipe

LOGITS = 1 << 29  # bytes of logits and their gradients that training and scoring hold at once
LANES = wide_heads.LANES
GROWTH = 1.25  # of a cache, while it grows

Sizes = Mapping[str, int]


class Work(NamedTuple):
    """Of one device: floating-point operations and bytes to and from memory of a step; bytes held at most; and by axis
    of the mesh, bytes received from the other devices on it, and the number of collectives that bring them."""

    flops: float
    traffic: float
    memory: float
    network: Mapping[str, float]
    collectives: Mapping[str, float]


def filled(rows: int, sizes: Sizes, accumulation: int = 1) -> int:
    """Rows of a batch that the mesh, and the parts of an accumulation, divide."""
    return buckets.round_up(rows, sizes["data"] * sizes["fsdp"] * accumulation)


def training(cfg: ModelConfig, recipe: Recipe, length: int, sizes: Sizes, fused: bool) -> Work:
    """Of an optimizer step. fused: attention keeps no scores."""
    ways, size, parts = sizes["model"], np.dtype(cfg.dtype).itemsize, recipe.accumulation
    tokens = filled(recipe.batch_size, sizes, parts) // (sizes["data"] * sizes["fsdp"]) * length
    owned, weights = _owned(cfg, sizes), costs.read_bytes(cfg, ways)
    again = recipe.remat == "full"
    sums = (6 if again else 4) * cfg.num_layers * parts  # of attention's and the feed-forward's parts, and back
    # weights and moments, and their gradients; with an adapter, the weights that it is beside
    trained = adapter if (adapter := _adapter(cfg)) else owned
    kept = np.dtype(method.optimizer(recipe, 1).param_dtype).itemsize  # bytes of a weight, and of each of its moments
    state = trained * (3 * kept + (size if parts == 1 else 4)) + bool(adapter) * size * owned
    saved = tokens // parts * cfg.num_layers * _saved(cfg, recipe.remat, length, ways, fused)
    return Work(
        flops=tokens * costs.training_flops(cfg, length, recipe.remat, ways),
        traffic=costs.optimizer_bytes(trained) + (4 if again else 3) * parts * weights,
        memory=state + saved + LOGITS,
        network={
            "fsdp": _share(sizes["fsdp"]) * 3 * parts * weights,  # gathered forward and back, gradients returned
            "data": _share(sizes["data"]) * 2 * parts * size * trained,
            "model": _share(ways) * 2 * sums * tokens // parts * cfg.hidden_size * size,
        },
        collectives={
            "fsdp": (sizes["fsdp"] > 1) * 3 * parts * cfg.num_layers,
            "data": (sizes["data"] > 1) * parts,
            "model": (ways > 1) * sums,
        },
    )


def decoding(plan: loop.Plan, rows: int, prompt: int, sizes: Sizes, lanes: int, stored: bool) -> Work:
    """Of one token more in each of `rows` rows, with half of the new tokens in the cache. lanes: what head sizes are
    padded to. stored: see `programs.decoding_program`."""
    shards, ways = sizes["data"] * sizes["fsdp"], sizes["model"]
    rows = filled(-(-rows // plan.samples), sizes) // shards * plan.samples
    gather = preparation.gather_fits(plan.configs, ways)
    flops = traffic = memory = gathered = summed = 0.0
    for cfg in plan.configs:
        size, weights = np.dtype(cfg.dtype).itemsize, costs.read_bytes(cfg, ways)
        owned = _owned(cfg, sizes)
        prepared = costs.param_bytes(cfg, ways) if gather else size * owned
        together = wide_heads.width(cfg, ways) if lanes > 1 else 1
        padded = buckets.round_up(together * cfg.head_size, lanes) / (together * cfg.head_size)
        flops += rows * costs.forward_flops(cfg, prompt + plan.size / 2, shards=ways)
        traffic += weights + padded * rows * costs.cache_bytes(cfg, prompt + plan.size / 2, ways)
        memory += 4 * owned * stored + prepared + 3 * 4 * rows * costs.split(cfg.vocab_size, ways)
        memory += padded * GROWTH * rows * costs.cache_bytes(cfg, plan.size + prompt / plan.samples, ways)
        gathered += weights / (plan.size if gather else 1)
        summed += 2 * cfg.num_layers * rows * cfg.hidden_size * size
    layers = sum(cfg.num_layers for cfg in plan.configs)
    return Work(
        flops,
        traffic,
        memory,
        network={"fsdp": _share(sizes["fsdp"]) * gathered, "model": _share(ways) * 2 * summed},
        collectives={
            "fsdp": (sizes["fsdp"] > 1) * layers / (plan.size if gather else 1),
            "model": (ways > 1) * 2 * layers,
        },
    )


def scoring(cfg: ModelConfig, rows: int, length: int, scored: int, sizes: Sizes, fused: bool) -> Work:
    """Of the log-probabilities of the last `scored` tokens of each row."""
    ways, size, layers = sizes["model"], np.dtype(cfg.dtype).itemsize, cfg.num_layers
    tokens = filled(rows, sizes) // (sizes["data"] * sizes["fsdp"]) * length
    weights = costs.read_bytes(cfg, ways)
    return Work(
        flops=tokens * costs.forward_flops(cfg, length / 2, scored / length, ways),
        traffic=weights,
        # with the weights in the compute dtype as well: TPUs' compiler casts them before the loop over layers
        memory=(4 + size) * _owned(cfg, sizes) + tokens * _saved(cfg, "none", length, ways, fused) + LOGITS,
        network={
            "fsdp": _share(sizes["fsdp"]) * weights,
            "model": _share(ways) * 2 * 2 * layers * tokens * cfg.hidden_size * size,
        },
        collectives={"fsdp": (sizes["fsdp"] > 1) * layers, "model": (ways > 1) * 2 * layers},
    )


def _owned(cfg: ModelConfig, sizes: Sizes) -> int:
    """Parameters of a device.

    Raises:
      UserError: an axis of which nothing in the model can make use.
    """
    for axis in ("fsdp", "model"):
        if sizes[axis] > 1 and costs.params_of_device(cfg, {axis: sizes[axis]}) == costs.params_of_device(cfg, {}):
            raise UserError(f"mesh: nothing of this model can be split {sizes[axis]} ways over {axis!r}")
    return costs.params_of_device(cfg, sizes)


@functools.cache
def _adapter(cfg: ModelConfig) -> int:
    """Parameters of a low-rank adapter; 0: there is none."""
    return sum(leaf.size for leaf in jax.tree.leaves(lora.abstract(cfg))) if cfg.lora.rank else 0


def _share(ways: int) -> float:
    """What a device receives of something that it has one of so many parts of."""
    return (ways - 1) / ways


def _saved(cfg: ModelConfig, remat: str, length: int, ways: int, fused: bool) -> float:
    """Bytes of a layer and token that the backward pass reads: what stands between blocks; with "dots" what matrices
    give as well; else also what stands between those, and scores and probabilities of attention that is not fused."""
    size = np.dtype(cfg.dtype).itemsize
    heads = (costs.split(cfg.num_heads, ways) + 2 * costs.split(cfg.num_kv_heads, ways)) * cfg.head_size
    inner = costs.split(cfg.intermediate_size, ways)
    if remat == "full":
        return size * cfg.hidden_size
    if remat == "dots":
        return size * (3 * cfg.hidden_size + heads + 2 * inner)
    scores = 0 if fused else (4 + size) * costs.split(cfg.num_heads, ways) * length
    return size * (6 * cfg.hidden_size + 2 * heads + 3 * inner) + scores
