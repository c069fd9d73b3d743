"""Files and directories, on a disk or in an object store (gs://): what differs between the two is here.

On a disk a file or directory is written under another name and then renamed. An object store has no rename and no
append, but an object appears only once it is whole; a directory there is written in place, and the file that its
reader looks for is written last.
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
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import fsspec
import jax
import numpy as np
from etils import epath

from unidetox_jax import distributed
from unidetox_jax.errors import UserError

COPY_BYTES = 1 << 24  # read or written at a time: object stores' files buffer what a single call hands them
CLIENTS = ("gcsfs", "google", "aiohttp", "requests")  # whose errors are not always OSErrors

# Orbax and the other processes write without this process's gcsfs, whose cached listings would hide their files.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
# They log a line for every file that is read, and tracebacks of what is reported here in one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
logging.getLogger("fsspec").setLevel(logging.CRITICAL)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an object store's (gs://, s3://)."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root on, a leading `~` expanded; an object store's as it is."""
    return epath.Path(path if is_remote(path) else os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Context: what goes wrong while `path` is written is a UserError that names it."""
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
    """Makes a directory and those above it, where missing. An object store has none, and a missing bucket is a mistake
    that gcsfs would hide by making one.

    Raises:
      UserError: it cannot be made.
    """
    if not is_remote(directory):
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be made ({error.strerror or error})") from None


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all; its directory is made where it is missing.

    Raises:
      UserError: it cannot be written.
    """
    path = epath.Path(path)
    make_directory(path.parent)
    with writing(path):
        if is_remote(path):
            path.write_bytes(content)
        else:
            temporary = path.parent / f".{path.name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """A JSON file's content; None when there is no such file."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to start that stage again") from None


def write_lines(path: epath.PathLike, values: Iterable[Any]) -> None:
    """Writes one JSON value a line, as `write_bytes` does."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_lines(path: epath.PathLike) -> list[Any]:
    """The values of `write_lines`."""
    return [json.loads(line) for line in epath.Path(path).read_text().split("\n") if line]


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes an npy file, as `write_bytes` does."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: epath.PathLike) -> np.ndarray:
    """The array of `write_array`."""
    return np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)


def write_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file, as `write_bytes` does."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict[str, Any](arrays))
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def whole_directory(directory: epath.PathLike, known: re.Pattern) -> Iterator[epath.Path]:
    """Context: a directory to write to, which takes the name `directory` at the end, or vanishes on an error.

    One that is there is replaced, if it holds nothing but `known` names. Every process enters.

    Raises:
      UserError: there is something else, or no permission, or no space.
    """
    directory = absolute(directory)
    check_replaceable(directory, known)
    remote, first = is_remote(directory), jax.process_index() == 0
    work = directory if remote else directory.parent / f".{directory.name}.partial"
    with writing(directory):
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
                with contextlib.suppress(Exception):  # the error that led here is the one to report
                    work.rmtree(missing_ok=True)
            raise


def check_replaceable(directory: epath.Path, known: re.Pattern) -> None:
    """Raises UserError where `directory` is a file, or holds a name that is not `known` (the first such)."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: a file; expected a directory, or nothing")
    foreign = sorted(path.name for path in directory.iterdir() if not known.fullmatch(path.name))
    if foreign:
        raise UserError(f"{directory}: holds {foreign[0]!r}, which no checkpoint does; it is not replaced")


def _rename(work: epath.Path, directory: epath.Path) -> None:
    old = directory.parent / f".{directory.name}.old"
    old.rmtree(missing_ok=True)
    if directory.exists():
        directory.rename(old)
    work.rename(directory)
    old.rmtree(missing_ok=True)


@contextlib.contextmanager
def written_locally(directory: epath.Path) -> Iterator[str]:
    """Context: a local directory for a library that writes files by name. It is `directory`, or is copied there."""
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
    """Context: (named binary file, offset) where the `nbytes` at `offset` of `path` can be mapped. None: all of it.

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
    with path.open("rb") as source:
        source.seek(offset)
        while nbytes and (chunk := source.read(min(nbytes, COPY_BYTES))):
            file.write(chunk)
            nbytes -= len(chunk)
    file.flush()


def check_workdir(directory: epath.PathLike) -> None:
    """Makes sure that every process can write to a working directory and sees what process 0 wrote there.

    A local one of a single process is not looked at: the stages make it.

    Raises:
      UserError: on every process, where it cannot be made or written, or one of them does not see it.
    """
    directory, count = epath.Path(directory), jax.process_count()
    if count == 1 and not is_remote(directory):
        return
    mark, first = directory / ".visible", jax.process_index() == 0
    token, problem = str(time.time_ns()), ""
    if first:
        try:
            write_text(mark, token)
        except Exception as error:  # a bucket's name that none can have is a ValueError
            problem = str(error) if isinstance(error, UserError) else f"{mark}: cannot be written ({error})"
    token, problem = distributed.as_first_says(f"{token}\n{problem}").split("\n", 1)
    if problem:
        raise UserError(problem)
    here = "" if _reads(mark, token) else socket.gethostname()
    blind = [f"{i} on {host}" for i, host in enumerate(distributed.exchange("sees", here)) if host]
    if first:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{directory}: process {', process '.join(blind)} cannot see what process 0 wrote there; "
            "expected a directory that all hosts share, or gs://"
        )


def _reads(path: epath.Path, content: str) -> bool:
    """Whether the file is there and holds this; network file systems may take seconds to show it."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        time.sleep(0.5)
    return False
