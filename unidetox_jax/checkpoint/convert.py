"""`unidetox convert SRC DST`: a checkpoint from one form to the other, streamed through the devices.

Of MODEL+ADAPTER the whole model, merged, or with `--to=adapter` the adapter alone, in PEFT's form.
"""

import argparse

import jax
from etils import epath

from unidetox_jax import models, sharding, storage
from unidetox_jax.checkpoint import hf, store
from unidetox_jax.checkpoint.peft import save_adapter
from unidetox_jax.checkpoint.source import find, split
from unidetox_jax.checkpoint.tokenizer import copy_tokenizer, has_tokenizer
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model

FORMS = ("hf", "orbax", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="HF directory, hub id, directory of this program's; MODEL+ADAPTER"
    )
    parser.add_argument("destination", metavar="DST", help="directory to write")
    parser.add_argument("--to", choices=FORMS, help="the form to write (default: the other one; hf of MODEL+ADAPTER)")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--mesh", default="", help="mesh to stream through, such as fsdp:-1 (default: one device)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that DST holds")


def run_command(options: argparse.Namespace) -> int:
    """Converts, and says what was written. Raises UserError for a source or destination that will not do."""
    destination = epath.Path(options.destination).expanduser()
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        if not options.force:
            raise UserError(f"{destination}: exists already; --force replaces it")
    name, adapter = split(options.source)
    while split(name)[1]:
        name = split(name)[0]
    found = find(name)
    form = options.to or ("orbax" if found.kind == "hf" and not adapter else "hf")
    mesh = sharding.make_mesh(options.mesh) if options.mesh else None
    model = store.load(options.source, mesh, options.dtype)
    if form == "adapter":
        save_adapter(destination, model, name)
        print(f"{destination}: an adapter of rank {model.cfg.lora.rank} for {name}, written for PEFT")
        return 0
    model = models.lora.merge(model)
    write(destination, model, form, found.directory)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(f"{destination}: {model.cfg.family}, {size / 1e9:.2f} GB of parameters, written for {form}")
    return 0


def write(destination: epath.PathLike, model: Model, form: str, tokenizer_from: epath.Path) -> None:
    """Writes the model in one of FORMS, with the tokenizer's files of `tokenizer_from` copied as they are."""
    with storage.whole_directory(destination, store.NAMES) as work:
        if has_tokenizer(tokenizer_from) and jax.process_index() == 0:
            copy_tokenizer(tokenizer_from, work)
            (work / "config.json").unlink(missing_ok=True)  # the model's own follows, in HF's form alone
        if form == "hf":
            hf.write(work, model)
        else:
            store.write_orbax(work, model)
