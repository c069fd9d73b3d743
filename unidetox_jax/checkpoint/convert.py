"""`unidetox convert SRC DST`: converts a checkpoint between formats, streamed through the devices.

MODEL+ADAPTER becomes one merged model, or with `--to=adapter` the adapter alone, in PEFT's format.
"""

import argparse

import jax
from etils import epath

from unidetox_jax import models, sharding, storage
from unidetox_jax.checkpoint import hf, model_io
from unidetox_jax.checkpoint.peft import save_adapter
from unidetox_jax.checkpoint.source import resolve, split_adapter
from unidetox_jax.checkpoint.tokenizer import copy_tokenizer, has_tokenizer
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model

FORMATS = ("hf", "orbax", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="HF directory, hub id or a directory that unidetox wrote; or MODEL+ADAPTER"
    )
    parser.add_argument("destination", metavar="DST", help="directory to write")
    parser.add_argument("--to", choices=FORMATS, help="format (default: the other one; hf for MODEL+ADAPTER)")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--mesh", default="", help="mesh to stream through, such as fsdp:-1 (default: one device)")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint in DST")


def run_command(options: argparse.Namespace) -> int:
    """Converts, and prints what was written. Raises UserError for an unusable source or destination."""
    destination = epath.Path(options.destination).expanduser()
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        if not options.force:
            raise UserError(f"{destination}: exists already; --force replaces it")
    base, adapter = split_adapter(options.source)
    while split_adapter(base)[1]:
        base = split_adapter(base)[0]
    source = resolve(base)
    format = options.to or ("orbax" if source.kind == "hf" and not adapter else "hf")
    mesh = sharding.make_mesh(options.mesh) if options.mesh else None
    model = model_io.load(options.source, mesh, options.dtype)
    if format == "adapter":
        save_adapter(destination, model, base)
        print(f"{destination}: an adapter of rank {model.cfg.lora.rank} for {base}, written for PEFT")
        return 0
    model = models.lora.merge(model)
    write(destination, model, format, source.directory)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(f"{destination}: {model.cfg.family}, {size / 1e9:.2f} GB of parameters, written for {format}")
    return 0


def write(destination: epath.PathLike, model: Model, format: str, tokenizer_from: epath.Path) -> None:
    """Writes the model as "hf" or "orbax", with a copy of the tokenizer files in `tokenizer_from`."""
    with storage.atomic_directory(destination, model_io.FILE_NAMES) as work:
        if has_tokenizer(tokenizer_from) and jax.process_index() == 0:
            copy_tokenizer(tokenizer_from, work)
            (work / "config.json").unlink(missing_ok=True)  # HF's format writes its own, Orbax's has none
        if format == "hf":
            hf.write(work, model)
        else:
            model_io.write_orbax(work, model)
