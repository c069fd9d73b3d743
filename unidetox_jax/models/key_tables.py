"""Rows of a family's key table, which maps Hugging Face's tensors to our parameters for conversion both ways.

Our linear kernels are [in, out], attention's [in, heads, size] and [heads, size, out]; all else has the same layout.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Key(NamedTuple):
    """A Hugging Face tensor and the leaves of our parameters that it fills.

    hf: its name in a *ForCausalLM checkpoint, with {layer} if every layer has one.
    ours: paths of leaves; those under blocks/ have layers on axis 0.
    split: the tensor -> our leaves (one layer's), as NumPy views where possible. join: the inverse.
    """

    hf: str
    ours: tuple[str, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]


def same(hf: str, ours: str) -> Key:
    """The same layout."""
    return Key(hf, (ours,), lambda x: (x,), lambda x: x)


def linear(hf: str, ours: str) -> Key:
    """torch.nn.Linear's [out, in] <-> [in, out]."""
    return Key(hf, (ours,), lambda x: (x.T,), lambda x: x.T)


def heads_in(hf: str, ours: str, heads: int, size: int) -> Key:
    """torch.nn.Linear's [heads·size, in] <-> [in, heads, size]."""
    return Key(
        hf,
        (ours,),
        lambda x: (x.reshape(heads, size, -1).transpose(2, 0, 1),),
        lambda x: x.transpose(1, 2, 0).reshape(heads * size, -1),
    )


def heads_out(hf: str, ours: str, heads: int, size: int) -> Key:
    """torch.nn.Linear's [out, heads·size] <-> [heads, size, out]."""
    return Key(
        hf,
        (ours,),
        lambda x: (x.reshape(-1, heads, size).transpose(1, 2, 0),),
        lambda x: x.transpose(2, 0, 1).reshape(-1, heads * size),
    )


def reshaped(hf: str, ours: str, hf_shape: tuple[int, ...], our_shape: tuple[int, ...]) -> Key:
    """The same elements in the same order, in another shape (biases of heads; GPT-2's output kernel)."""
    return Key(hf, (ours,), lambda x: (x.reshape(our_shape),), lambda x: x.reshape(hf_shape))


def norm(hf: str, ours: str, bias: bool = True) -> list[Key]:
    """A norm's weight and bias."""
    keys = [same(f"{hf}.weight", f"{ours}/scale")]
    return [*keys, same(f"{hf}.bias", f"{ours}/bias")] if bias else keys
