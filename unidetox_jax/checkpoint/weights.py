"""The tensors of a Hugging Face directory, whichever files hold them.

Safetensors are preferred. `.bin` files are read by PyTorch's loader with `weights_only=True`; nothing else is ever
unpickled.
"""

import json
import mmap
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import storage
from unidetox_jax.checkpoint.safetensors_file import MappedTensor, SafetensorsFile, Spec
from unidetox_jax.errors import UserError

# In transformers' order of preference
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights:
    """Every tensor of a directory: `specs[name]`, `open(name)`, `path(name)`; `listing`: the index or only file.

    Raises:
      UserError: no weights, a file of the index is missing or damaged, a tensor is not in the file the index names.
    """

    def __init__(self, directory: epath.PathLike):
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        self.listing, files = _files(epath.Path(directory))
        for path, expected in files:
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            for name in expected:
                if name not in file.specs:
                    raise UserError(f"{path}: key {name!r} is missing; the index says it is there")
            self._files |= dict.fromkeys(file.specs, file)
        self.specs: dict[str, Spec] = {name: file.specs[name] for name, file in self._files.items()}

    def open(self, name: str) -> MappedTensor:
        """The tensor, memory-mapped if the file's format allows it."""
        return self._files[name].open(name)

    def path(self, name: str) -> epath.Path:
        """The file that holds the tensor."""
        return self._files[name].path


def _files(directory: epath.Path) -> tuple[epath.Path, list[tuple[epath.Path, list[str]]]]:
    """(index or only file, [(weights file, tensors it must hold by the index)]) of a directory."""
    existing = [name for name in (*SAFETENSORS, *TORCH) if (directory / name).exists()]
    if not existing:
        raise UserError(f"{directory}: no weights; expected one of {', '.join((*SAFETENSORS, *TORCH))}")
    listing = directory / existing[0]
    if len(existing) > 1:
        logging.info("reading %s, as transformers does, and ignoring %s", listing, ", ".join(existing[1:]))
    if listing.suffix != ".json":
        return listing, [(listing, [])]
    try:
        weight_map = json.loads(listing.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{listing}: not an index of weights ({type(error).__name__}: {error})") from None
    for name in names:
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: no such file; {listing.name} names it")
    return listing, [(directory / name, [key for key, file in weight_map.items() if file == name]) for name in names]


class TorchFile:
    """A `.bin` file: a dictionary of tensors saved by PyTorch.

    Raises:
      UserError: PyTorch is not installed; the file is damaged or holds anything but tensors.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        try:
            import torch
        except ImportError:
            raise UserError(f"{path}: reading .bin weights needs PyTorch: pip install 'unidetox-jax[torch]'") from None
        self._local = storage.local_file(path)  # kept open: the tensors are maps of it
        file, _ = self._local.__enter__()
        self._tensors, self._mapped = _load(torch, file.name, path)
        self.specs = {name: Spec(_dtype(x, path, name), tuple(x.shape)) for name, x in self._tensors.items()}

    def open(self, name: str) -> MappedTensor:
        """The tensor as a NumPy view of PyTorch's memory."""
        import torch

        tensor = self._tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
        return MappedTensor(array, _page_releaser(array) if self._mapped else lambda: None)


def _load(torch: Any, name: str, path: epath.Path) -> tuple[dict[str, Any], bool]:
    """(tensors by name, whether they are memory-mapped). Files from before PyTorch 1.6 cannot be."""
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            tensors, mapped = torch.load(name, mmap=True, **options), True
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            tensors, mapped = torch.load(name, **options), False
    except Exception as error:  # zip, pickle and PyTorch raise different ones for a damaged file
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{path}: damaged, or holds more than tensors ({reason})") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: found {type(tensors).__name__}, expected a dictionary of tensors")
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: key {key!r}: found {type(value).__name__}, expected a tensor")
    return tensors, mapped


def _dtype(tensor: Any, path: epath.Path, name: str) -> np.dtype:
    text = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(ml_dtypes.bfloat16) if text == "bfloat16" else np.dtype(text)
    except TypeError:
        raise UserError(f"{path}: key {name!r} has dtype {text}, which is not implemented") from None


def _page_releaser(array: np.ndarray) -> Callable[[], None]:
    """A function that frees the pages under an array that PyTorch mapped; they are read again on access."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return lambda: None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    size = mmap.PAGESIZE
    low, high = np.lib.array_utils.byte_bounds(array)
    low, high = -(-low // size) * size, high // size * size  # whole pages only: others are shared with other tensors

    def release() -> None:
        if low < high:
            libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(mmap.MADV_DONTNEED))

    return release
