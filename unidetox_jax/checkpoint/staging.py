"""Directories that appear whole or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from unidetox_jax.checkpoint.safetensors_file import is_remote
from unidetox_jax.errors import UserError

# What a checkpoint's directory may hold; one that holds anything else is somebody's, and is not replaced.
OURS = re.compile(
    r"(config|generation_config|model|special_tokens_map|added_tokens|vocab|tokenizer\w*|.*\.index)\.json|merges\.txt"
    r"|chat_template\.\w+|tokenizer\.model|params|.*\.safetensors|pytorch_model.*\.bin|README\.md|LICENSE.*"
)


@contextlib.contextmanager
def whole_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """Context: a directory to write to, which takes the name `directory` at the end, or vanishes on an error.

    A checkpoint that is there is replaced. Every process enters; the directory is one that all of them see. On an
    object store, where nothing can be renamed, it is written in place, so that what marks it complete comes last.

    Raises:
      UserError: there is something else than a checkpoint, or no permission, or no space.
    """
    directory = epath.Path(directory).expanduser()
    directory = directory if is_remote(directory) else epath.Path(os.path.abspath(directory))
    check_replaceable(directory)
    remote, first = is_remote(directory), jax.process_index() == 0
    work = directory if remote else directory.parent / f".{directory.name}.partial"
    try:
        if first:
            work.rmtree(missing_ok=True)
            work.mkdir(parents=True)
        barrier(f"{directory} begun")
        yield work
        barrier(f"{directory} written")
        if first and not remote:
            _rename(work, directory)
        barrier(f"{directory} in place")
    except OSError as error:
        if first:
            _remove(work)
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        if first:
            _remove(work)
        raise


def check_replaceable(directory: epath.Path) -> None:
    """Raises UserError where `directory` is a file, or holds what no checkpoint holds (the first such name)."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: a file; expected a directory, or nothing")
    foreign = sorted(path.name for path in directory.iterdir() if not OURS.fullmatch(path.name))
    if foreign:
        raise UserError(f"{directory}: holds {foreign[0]!r}, which no checkpoint does; it is not replaced")


def barrier(name: str) -> None:
    """Waits for every process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _rename(work: epath.Path, directory: epath.Path) -> None:
    old = directory.parent / f".{directory.name}.old"
    old.rmtree(missing_ok=True)
    if directory.exists():
        directory.rename(old)
    work.rename(directory)
    old.rmtree(missing_ok=True)


def _remove(work: epath.Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        work.rmtree(missing_ok=True)
