"""A model's costs by its shapes: parameters, floating-point operations, bytes.

FLOPs count matrix products (2 per parameter and token) and attention, not biases, norms and activations. Bytes are in
the compute dtype. `shards` is the size of the mesh axis `model`: costs are then per device, and a dimension that it
does not divide counts in full.
"""

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.parameters import abstract_params


@functools.cache
def read_params(cfg: ModelConfig, matrices: bool = False, shards: int = 1) -> int:
    """Parameters that a forward pass reads: all but tables that are only indexed (positions, untied embeddings).

    matrices: count only those in matrix products.
    """
    total = 0
    for name, shape in _leaves(cfg):
        tied_head = name == "embed/tokens/embedding" and cfg.tie_word_embeddings
        table = name.startswith("embed/") and name.endswith("embedding") and not tied_head
        if not table and (not matrices or name.endswith(("kernel", "embedding"))):
            total += math.prod(shape) // sharding.num_shards(name, shape, {"model": shards})
    return total


@functools.cache
def _leaves(cfg: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
    return tuple((sharding.path_string(path), leaf.shape) for path, leaf in leaves)


def params_of_device(cfg: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Parameters on each device of a mesh with axes of these sizes."""
    return _params_of_device(cfg, tuple(sizes.items()))


@functools.cache
def _params_of_device(cfg: ModelConfig, items: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(items)
    return sum(math.prod(shape) // sharding.num_shards(name, shape, sizes) for name, shape in _leaves(cfg))


def split(count: int, shards: int) -> float:
    """Heads or vocabulary entries per device; all of them if they do not divide."""
    return count if count % shards else count / shards


def forward_flops(cfg: ModelConfig, keys: float, logits: float = 1.0, shards: int = 1) -> float:
    """FLOPs of a forward pass on one token that attends to `keys` tokens (a text's average is half its length).

    logits: the fraction of tokens whose logits are computed.
    """
    matrices = read_params(cfg, True, shards) - (1 - logits) * split(cfg.vocab_size, shards) * cfg.embedding_size
    # two products with the keys and values, 2 FLOPs per element
    attention = 4 * split(cfg.num_heads, shards) * cfg.head_size * _attended(cfg, keys)
    return 2 * matrices + attention


def _attended(cfg: ModelConfig, tokens: float) -> float:
    """How many of the last `tokens` tokens a query attends to, or a cache holds, summed over layers."""
    return sum(min(tokens, cfg.window) if cfg.is_local(layer) else tokens for layer in range(cfg.num_layers))


def training_flops(cfg: ModelConfig, length: float, remat: str = "none", shards: int = 1) -> float:
    """FLOPs of training on one token of a text of `length`.

    The backward pass costs two forward passes (Chowdhery et al. 2022, appendix B), one if only an adapter is trained;
    remat "full" adds another forward pass.
    """
    passes = (2 if cfg.lora.rank else 3) + (remat == "full")
    return passes * forward_flops(cfg, length / 2, shards=shards)


def param_bytes(cfg: ModelConfig, shards: int = 1) -> int:
    """Bytes of all parameters."""
    return np.dtype(cfg.dtype).itemsize * params_of_device(cfg, {"model": shards})


def read_bytes(cfg: ModelConfig, shards: int = 1) -> int:
    """Bytes of the parameters that a forward pass reads."""
    return np.dtype(cfg.dtype).itemsize * read_params(cfg, shards=shards)


def cache_bytes(cfg: ModelConfig, tokens: float, shards: int = 1) -> float:
    """Bytes of the keys and values of one row of `tokens` tokens."""
    return np.dtype(cfg.dtype).itemsize * 2 * split(cfg.num_kv_heads, shards) * cfg.head_size * _attended(cfg, tokens)


def optimizer_bytes(params: float) -> float:
    """Bytes that AdamW's update moves: weights, gradients and both moments in float32, each read and written."""
    return 4 * 2 * 4 * params
