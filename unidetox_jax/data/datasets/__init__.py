"""The data sets by name. To add one, write a class in a file of its own and add a line here.

A data set in any other file is named in a configuration as "package.module:Class":

    class Reviews(Dataset):
        name = "reviews"
        fields = {"text": TEXT, "stars": np.float32}
        patterns = (("reviews*.csv",),)  # in data_dir/reviews, or what `?file=PATH` names

        def examples(self):
            for content in self.contents:
                for where, row in files.rows(content, ("review", "stars")):
                    yield "train", {"text": row["review"], "stars": files.number_of(row["stars"], where)}
"""

from typing import Any

from unidetox_jax import extensions
from unidetox_jax.errors import UserError, suggest

PACKAGE = "unidetox_jax.data.datasets"
DATASETS = {
    "dghs": f"{PACKAGE}.dghs:Dghs",
    "toxigen": f"{PACKAGE}.toxigen:Toxigen",
    "mmlu": f"{PACKAGE}.mmlu:Mmlu",
    "realtoxicityprompts": f"{PACKAGE}.realtoxicityprompts:RealToxicityPrompts",
    "bold": f"{PACKAGE}.bold:Bold",
    "attaq": f"{PACKAGE}.attaq:Attaq",
    "politics": f"{PACKAGE}.politics:Politics",
    "text": f"{PACKAGE}.plain:Text",
    "distilled": f"{PACKAGE}.plain:Distilled",
    "csv": f"{PACKAGE}.plain:Table",
    "jsonl": f"{PACKAGE}.plain:Table",
}


def is_outside(name: str) -> bool:
    """Whether a name is package.module:Class, and not NAME:FILE of a known data set."""
    module, _, attribute = name.partition(":")
    return module not in DATASETS and all(part.isidentifier() for part in [*module.split("."), attribute])


def get(name: str) -> Any:
    """The `base.Dataset` subclass of a name in DATASETS or at package.module:Class. Imports TFDS only when called.

    Raises:
      UserError: neither of the two; suggests the closest known name.
    """
    if name not in DATASETS and not is_outside(name):
        raise UserError(f"no data set {name!r}{suggest(name, DATASETS)}")
    return extensions.load(DATASETS.get(name, name), "data set", "class", DATASETS)
