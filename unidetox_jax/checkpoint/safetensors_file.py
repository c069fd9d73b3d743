"""Reads and writes one safetensors file, tensor by tensor.

The format: 8 bytes (little-endian length of the header), a JSON header, then the tensors' bytes. Mapped pages count as
the process's memory, so each tensor gets a map of its own, whose pages can be released.
"""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from unidetox_jax import storage
from unidetox_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # set by the format


class Spec(NamedTuple):
    """A tensor's dtype and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MappedTensor(NamedTuple):
    """A read-only view of a tensor in a file, and `release()`, which frees the pages read so far.

    The view stays valid after `release`: pages are read again on access.
    """

    array: np.ndarray
    release: Callable[[], None]


class SafetensorsFile:
    """An open safetensors file.

    Raises:
      UserError: the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.specs, self._offsets = _read_header(self.path)

    def open(self, name: str) -> MappedTensor:
        """The tensor, memory-mapped. Remote bytes are first copied to a temporary file."""
        spec, offset = self.specs[name], self._offsets[name]
        if not spec.nbytes:
            return MappedTensor(np.empty(spec.shape, spec.dtype), lambda: None)
        with storage.local_file(self.path, offset, spec.nbytes) as (file, offset):
            page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), offset + spec.nbytes - page, access=mmap.ACCESS_READ, offset=page)
        values = np.frombuffer(pages, np.uint8, spec.nbytes, offset - page)
        return MappedTensor(values.view(spec.dtype).reshape(spec.shape), lambda: pages.madvise(mmap.MADV_DONTNEED))


def _read_header(path: epath.Path) -> tuple[dict[str, Spec], dict[str, int]]:
    """(name → spec, name → offset in the file); the header must describe the file's exact size."""
    try:
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(f"{path}: found a Git LFS pointer instead of the weights (git lfs pull fetches them)")
            length = int.from_bytes(start, "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path}: truncated, or not a safetensors file ({size} bytes, header of {length})")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not a safetensors file (its header is not JSON: {error})") from None
    specs, offsets = {}, {}
    for name, entry in header.items():
        if name != METADATA:
            specs[name], offsets[name] = _read_entry(path, name, entry, 8 + length)
    end = max((offsets[name] + spec.nbytes for name, spec in specs.items()), default=8 + length)
    if end != size:
        raise UserError(f"{path}: truncated or damaged ({size} bytes, its header describes {end})")
    return specs, offsets


def _read_entry(path: epath.Path, name: str, entry: dict, base: int) -> tuple[Spec, int]:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: key {name!r}: damaged header entry ({entry})") from None
    if dtype not in DTYPES:
        raise UserError(f"{path}: key {name!r} has dtype {dtype}, expected {', '.join(DTYPES)}")
    spec = Spec(DTYPES[dtype], shape)
    if start < 0 or end - start != spec.nbytes:
        raise UserError(f"{path}: key {name!r} has {end - start} bytes, expected {spec.nbytes} for {dtype}{shape}")
    return spec, base + start


def write_file(path: epath.Path, specs: dict[str, Spec], tensors: Iterable[np.ndarray]) -> None:
    """Writes the tensors of `specs`, consumed one at a time, in the same order, from `tensors`.

    Raises:
      UserError: it cannot be written (a full disk, say).
    """
    header: dict = {METADATA: {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the tensors
    with storage.write_errors(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _blocks(specs, tensors):
            file.write(block)


def _blocks(specs: dict[str, Spec], tensors: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """The tensors' bytes, COPY_BYTES at a time."""
    for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
        if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name}: found {tensor.dtype}{tensor.shape}, expected {spec.dtype}{spec.shape}")
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for start in range(0, content.size, storage.COPY_BYTES):
            yield content[start : start + storage.COPY_BYTES].data
