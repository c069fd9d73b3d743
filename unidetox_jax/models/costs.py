"""What a model costs, by its shapes alone: parameters, floating-point operations, bytes.

FLOPs are those of matrix products, 2 a parameter and token, and of attention; biases, norms and activations are not
counted. Bytes are in the compute dtype.
"""

import functools

import jax
import numpy as np

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.transformer import abstract_params, num_params


@functools.cache
def read_params(cfg: ModelConfig, matrices: bool = False) -> int:
    """Parameters that a forward pass reads whole: all but tables whose rows are looked up (positions, and an embedding
    that is not the head as well).

    matrices: of them only what is in a matrix product.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)):
        name = sharding.path_string(path)
        tied_head = name == "embed/tokens/embedding" and cfg.tie_word_embeddings
        table = name.startswith("embed/") and name.endswith("embedding") and not tied_head
        if not table and (not matrices or name.endswith(("kernel", "embedding"))):
            total += leaf.size
    return total


def forward_flops(cfg: ModelConfig, keys: float, logits: float = 1.0) -> float:
    """FLOPs of a forward pass on one token that attends over `keys` tokens: in causal attention over a whole text, half
    its length on average.

    logits: the share of the tokens whose logits are computed.
    """
    matrices = read_params(cfg, matrices=True) - (1 - logits) * cfg.vocab_size * cfg.embedding_size
    attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_size * keys  # queries · keys, and weights · values
    return 2 * matrices + attention


def training_flops(cfg: ModelConfig, length: float, remat: str = "none") -> float:
    """FLOPs of training on one token of a text of `length`: the backward pass costs two forward passes (Chowdhery et
    al. 2022, appendix B), and with remat "full" the forward pass runs again."""
    return (4 if remat == "full" else 3) * forward_flops(cfg, length / 2)


@functools.cache
def param_bytes(cfg: ModelConfig) -> int:
    """Bytes of all parameters."""
    return np.dtype(cfg.dtype).itemsize * num_params(cfg)


def read_bytes(cfg: ModelConfig) -> int:
    """Bytes of parameters that a forward pass reads."""
    return np.dtype(cfg.dtype).itemsize * read_params(cfg)


def cache_bytes(cfg: ModelConfig, tokens: float) -> float:
    """Bytes of the keys and values of `tokens` tokens."""
    return np.dtype(cfg.dtype).itemsize * 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * tokens


def optimizer_bytes(cfg: ModelConfig) -> int:
    """Bytes of AdamW's update: weights, gradients and both moments in float32, each read and written."""
    return 4 * 2 * 4 * num_params(cfg)
