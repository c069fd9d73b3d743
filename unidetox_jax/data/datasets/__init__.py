"""The data sets by name. A new one is a class in a file of its own, which says all of it, and a line here.

One of your own, in any file, is named in a configuration as "package.module:Class":

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

HERE = "unidetox_jax.data.datasets"
DATASETS = {
    "dghs": f"{HERE}.dghs:Dghs",
    "toxigen": f"{HERE}.toxigen:Toxigen",
    "mmlu": f"{HERE}.mmlu:Mmlu",
    "realtoxicityprompts": f"{HERE}.realtoxicityprompts:RealToxicityPrompts",
    "bold": f"{HERE}.bold:Bold",
    "attaq": f"{HERE}.attaq:Attaq",
    "politics": f"{HERE}.politics:Politics",
    "text": f"{HERE}.plain:Text",
    "distilled": f"{HERE}.plain:Distilled",
    "csv": f"{HERE}.plain:Table",
    "jsonl": f"{HERE}.plain:Table",
}


def is_outside(name: str) -> bool:
    """Whether a name is that of a class of somebody's own: package.module:Class, and not NAME:FILE."""
    module, _, attribute = name.partition(":")
    return module not in DATASETS and all(part.isidentifier() for part in [*module.split("."), attribute])


def get(name: str) -> Any:
    """The class (a `base.Dataset`) of a name in DATASETS, or at package.module:Class. TFDS is imported now, not before.

    Raises:
      UserError: neither of the two; the nearest known name is given.
    """
    if name not in DATASETS and not is_outside(name):
        raise UserError(f"no data set {name!r}{suggest(name, DATASETS)}")
    return extensions.load(DATASETS.get(name, name), "data set", "class", DATASETS)
