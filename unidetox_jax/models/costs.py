"""What a model costs, by its shapes alone: parameters, floating-point operations, bytes.

FLOPs are those of matrix products, 2 a parameter and token, and of attention; biases, norms and activations are not
counted. Bytes are in the compute dtype. `ways` is the size of the mesh's axis `model`: with it, costs are those of one
of the devices that it splits the work over, and what it does not divide is whole on each.
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
def read_params(cfg: ModelConfig, matrices: bool = False, ways: int = 1) -> int:
    """Parameters that a forward pass reads whole: all but tables whose rows are looked up (positions, and an embedding
    that is not the head as well).

    matrices: of them only what is in a matrix product.
    """
    total = 0
    for name, shape in _leaves(cfg):
        tied_head = name == "embed/tokens/embedding" and cfg.tie_word_embeddings
        table = name.startswith("embed/") and name.endswith("embedding") and not tied_head
        if not table and (not matrices or name.endswith(("kernel", "embedding"))):
            total += math.prod(shape) // sharding.parts(name, shape, {"model": ways})
    return total


@functools.cache
def _leaves(cfg: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
    return tuple((sharding.path_string(path), leaf.shape) for path, leaf in leaves)


def params_of_device(cfg: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Parameters that one device of a mesh with axes of these sizes holds."""
    return _params_of_device(cfg, tuple(sizes.items()))


@functools.cache
def _params_of_device(cfg: ModelConfig, items: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(items)
    return sum(math.prod(shape) // sharding.parts(name, shape, sizes) for name, shape in _leaves(cfg))


def split(count: int, ways: int) -> float:
    """Of so many heads or tokens of a vocabulary, those of one of the devices."""
    return count if count % ways else count / ways


def forward_flops(cfg: ModelConfig, keys: float, logits: float = 1.0, ways: int = 1) -> float:
    """FLOPs of a forward pass on one token that attends over `keys` tokens: in causal attention over a whole text, half
    its length on average.

    logits: the share of the tokens whose logits are computed.
    """
    matrices = read_params(cfg, True, ways) - (1 - logits) * split(cfg.vocab_size, ways) * cfg.embedding_size
    # queries · keys, and weights · values
    attention = 4 * split(cfg.num_heads, ways) * cfg.head_size * _seen(cfg, keys)
    return 2 * matrices + attention


def _seen(cfg: ModelConfig, tokens: float) -> float:
    """Of so many tokens, those that a query sees, or a cache holds, in all layers together."""
    return sum(min(tokens, cfg.window) if cfg.is_local(layer) else tokens for layer in range(cfg.num_layers))


def training_flops(cfg: ModelConfig, length: float, remat: str = "none", ways: int = 1) -> float:
    """FLOPs of training on one token of a text of `length`: the backward pass costs two forward passes (Chowdhery et
    al. 2022, appendix B), one where only an adapter is trained, and with remat "full" the forward pass runs again."""
    passes = (2 if cfg.lora.rank else 3) + (remat == "full")
    return passes * forward_flops(cfg, length / 2, ways=ways)


def param_bytes(cfg: ModelConfig, ways: int = 1) -> int:
    """Bytes of all parameters."""
    return np.dtype(cfg.dtype).itemsize * params_of_device(cfg, {"model": ways})


def read_bytes(cfg: ModelConfig, ways: int = 1) -> int:
    """Bytes of parameters that a forward pass reads."""
    return np.dtype(cfg.dtype).itemsize * read_params(cfg, ways=ways)


def cache_bytes(cfg: ModelConfig, tokens: float, ways: int = 1) -> float:
    """Bytes of the keys and values of a row of `tokens` tokens."""
    return np.dtype(cfg.dtype).itemsize * 2 * split(cfg.num_kv_heads, ways) * cfg.head_size * _seen(cfg, tokens)


def optimizer_bytes(params: float) -> float:
    """Bytes of AdamW's update of so many parameters: weights, gradients and both moments in float32, each read and
    written."""
    return 4 * 2 * 4 * params
