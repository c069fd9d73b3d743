"""Files and directories on a disk or in an object store (gs://), behind the same functions.

On a disk a file or directory is written under a temporary name and then renamed. An object store has neither rename
nor append, but an object appears only once it is complete; a directory there is written in place, and the file that
marks it as complete is written last.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import fsspec
import jax
import numpy as np
from etils import epath

from unidetox_jax import distributed
from unidetox_jax.errors import UserError

COPY_BYTES = 1 << 24  # bytes per read or write: remote files buffer all that a single call passes them
VISIBLE_WITHIN = 10.0  # seconds that a network file system may take to show what another host wrote
CLIENTS = ("gcsfs", "google", "aiohttp", "requests")  # packages whose errors are not always OSErrors

# Orbax and other processes do not write through this process's gcsfs: its cached listings would miss their files.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
# They log a line per file read, and tracebacks of errors that are reported here in one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
logging.getLogger("fsspec").setLevel(logging.CRITICAL)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (gs://, s3://)."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path with `~` expanded; a remote path unchanged."""
    return epath.Path(path if is_remote(path) else os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Context in which errors of writing become a UserError that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError) and is_remote(path):
            raise UserError(f"{path}: needs gcsfs: pip install 'unidetox-jax[tpu]'") from None
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be written ({reason})") from None


def make_directory(directory: epath.PathLike) -> None:
    """Makes a directory and its parents. Does nothing in an object store, where gcsfs would create a missing bucket,
    which is the user's mistake.

    Raises:
      UserError: it cannot be made.
    """
    if not is_remote(directory):
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be made ({error.strerror or error})") from None


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically, and makes its directory if missing.

    Raises:
      UserError: it cannot be written.
    """
    path = epath.Path(path)
    make_directory(path.parent)
    with write_errors(path):
        if is_remote(path):
            path.write_bytes(content)
        else:
            temporary = path.parent / f".{path.name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file, as `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """The content of a JSON file; None if it does not exist."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to start that stage again") from None


def write_lines(path: epath.PathLike, values: Iterable[Any]) -> None:
    """Writes a JSONL file, as `write_bytes`."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_lines(path: epath.PathLike) -> list[Any]:
    """The values written by `write_lines`."""
    return [json.loads(line) for line in epath.Path(path).read_text().split("\n") if line]


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes an npy file, as `write_bytes`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: epath.PathLike) -> np.ndarray:
    """The array written by `write_array`."""
    return np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)


def write_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file, as `write_bytes`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict[str, Any](arrays))
    write_bytes(path, buffer.getvalue())


def read_arrays(path: epath.PathLike, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """An npz file's arrays of these names, or all, read at once: NumPy would ask a bucket for a few bytes at a time."""
    with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays.files}


@contextlib.contextmanager
def atomic_directory(directory: epath.PathLike, replaceable: re.Pattern) -> Iterator[epath.Path]:
    """Context: a directory to write to, which is renamed to `directory` at the end, or removed on an error.

    An existing one is replaced if all names in it match `replaceable`. Every process enters the context.

    Raises:
      UserError: the directory holds something else, no permission, no space.
    """
    directory = absolute(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: found a file, expected a directory or nothing")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    foreign = next((name for name in names if not replaceable.fullmatch(name)), None)
    if foreign:
        raise UserError(f"{directory}: holds {foreign!r}, which is no part of a checkpoint; it is not replaced")
    remote, first = is_remote(directory), distributed.is_main_process()
    work = directory if remote else directory.parent / f".{directory.name}.partial"
    with write_errors(directory):
        try:
            if first:
                work.rmtree(missing_ok=True)
                make_directory(work)
            distributed.barrier(f"{directory} begun")
            yield work
            distributed.barrier(f"{directory} written")
            if first and not remote:
                _rename(work, directory)
            distributed.barrier(f"{directory} in place")
        except BaseException:
            if first:
                with contextlib.suppress(Exception):  # report the original error instead
                    work.rmtree(missing_ok=True)
            raise


def _rename(work: epath.Path, directory: epath.Path) -> None:
    old = directory.parent / f".{directory.name}.old"
    old.rmtree(missing_ok=True)
    if directory.exists():
        directory.rename(old)
    work.rename(directory)
    old.rmtree(missing_ok=True)


@contextlib.contextmanager
def staged_locally(directory: epath.Path) -> Iterator[str]:
    """Context: a local directory for libraries that need one: `directory` itself, or a temporary one copied to it."""
    if not is_remote(directory):
        yield str(directory)
        return
    with tempfile.TemporaryDirectory() as local:
        yield local
        for path in sorted(pathlib.Path(local).rglob("*")):
            if path.is_file():
                write_bytes(directory / path.relative_to(local).as_posix(), path.read_bytes())


@contextlib.contextmanager
def local_file(path: epath.Path, offset: int = 0, nbytes: int | None = None) -> Iterator[tuple[IO[bytes], int]]:
    """Context: (local binary file, offset in it) of `nbytes` of `path` from `offset` on, None: all. It can be mapped.

    Raises:
      UserError: it cannot be read.
    """
    file: IO[bytes]
    with contextlib.ExitStack() as stack:
        try:
            if is_remote(path):
                file = stack.enter_context(tempfile.NamedTemporaryFile())
                _copy(path, offset, path.stat().length - offset if nbytes is None else nbytes, file)
                offset = 0
            else:
                file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        yield file, offset


def _copy(path: epath.Path, offset: int, nbytes: int, file: IO[bytes]) -> None:
    """Copies a range of a remote file. An open one would be asked for its size each time, and read 5 MB ahead."""
    system, name = fsspec.url_to_fs(str(path))
    for start in range(offset, offset + nbytes, COPY_BYTES):
        file.write(system.cat_file(name, start, min(start + COPY_BYTES, offset + nbytes)))
    file.flush()


def check_workdir(directory: epath.PathLike) -> None:
    """Checks that process 0 can write to a working directory and that all others see what it wrote.

    Skipped for a single process with a local directory, which the stages make.

    Raises:
      UserError: on every process: it cannot be made or written, or a process does not see it.
    """
    directory, count = epath.Path(directory), jax.process_count()
    if count == 1 and not is_remote(directory):
        return
    probe, first = directory / ".visible", distributed.is_main_process()
    token, problem = str(time.time_ns()), ""
    if first:
        try:
            write_text(probe, token)
        except Exception as error:  # an invalid bucket name is a ValueError
            problem = str(error) if isinstance(error, UserError) else f"{probe}: cannot be written ({error})"
    token, problem = distributed.broadcast(f"{token}\n{problem}").split("\n", 1)
    if problem:
        raise UserError(problem)
    blind_host = "" if _reads(probe, token) else socket.gethostname()
    blind = [f"{i} on {host}" for i, host in enumerate(distributed.all_gather("sees", blind_host)) if host]
    if first:
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{directory}: process {', process '.join(blind)} cannot see what process 0 wrote there; "
            "expected a directory that all hosts share, or gs://"
        )


def _reads(path: epath.Path, content: str) -> bool:
    """Whether the file holds `content`, at the latest `VISIBLE_WITHIN` seconds from now."""
    end = time.monotonic() + VISIBLE_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
